// Codecs: between a dense array and its non-zeros with a bit for each weight, the first weight in the highest bit of a
// byte. One pass over memory each; called by jaxprune.storage through ctypes, on part of an array by each thread.
#include <cstdint>
#include <cstring>

#include "kernels.h"

#ifdef JAXPRUNE_X86
#include <immintrin.h>
#endif

namespace {

struct Turned {
  uint8_t of[256];
  constexpr Turned() : of() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit)
        if (byte >> bit & 1) of[byte] |= 128 >> bit;
  }
};
constexpr Turned kTurned;

// Weights [from, count); `values` has as many as there are bits, and may begin anywhere.
template <typename T>
void Spread(const uint8_t* mask, int64_t from, int64_t count, const char* values, T* dense) {
  for (int64_t i = from; i < count; ++i) {
    dense[i] = 0;
    if (mask[i >> 3] >> (7 - (i & 7)) & 1) {
      std::memcpy(dense + i, values, sizeof(T));
      values += sizeof(T);
    }
  }
}

template <typename T>
int64_t Gather(const T* dense, int64_t from, int64_t count, uint8_t* mask, T* values) {
  const T* const first = values;
  for (int64_t i = from; i < count; ++i) {
    if ((i & 7) == 0) mask[i >> 3] = 0;
    const bool alive = dense[i] != 0;
    mask[i >> 3] |= alive << (7 - (i & 7));
    *values = dense[i];
    values += alive;
  }
  return values - first;
}

#ifdef JAXPRUNE_X86
__attribute__((target("avx512f,popcnt"))) int64_t SpreadWide(const uint8_t* mask, int64_t count, const char* values,
                                                             int64_t stored, uint32_t* dense, int64_t* used) {
  int64_t i = 0, at = 0;
  for (; i + 16 <= count && at + 16 <= stored; i += 16) {
    const __mmask16 alive = kTurned.of[mask[i >> 3]] | kTurned.of[mask[(i >> 3) + 1]] << 8;
    const __m512i next = _mm512_loadu_si512(values + 4 * at);
    _mm512_storeu_si512(dense + i, _mm512_maskz_expand_epi32(alive, next));
    at += __builtin_popcount(alive);
  }
  *used = at;
  return i;
}

// `values` needs room for 16 more than there are.
__attribute__((target("avx512f,popcnt"))) int64_t GatherWide(const uint32_t* dense, int64_t count, uint8_t* mask,
                                                             uint32_t* values, int64_t* made) {
  int64_t i = 0, at = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512i here = _mm512_loadu_si512(dense + i);
    const unsigned alive = _mm512_test_epi32_mask(here, here);
    mask[i >> 3] = kTurned.of[alive & 255];
    mask[(i >> 3) + 1] = kTurned.of[alive >> 8];
    _mm512_storeu_si512(values + at, _mm512_maskz_compress_epi32(alive, here));
    at += __builtin_popcount(alive);
  }
  *made = at;
  return i;
}

bool Wide() { return std::strcmp(jaxprune::BestKernels().name, "avx512") == 0; }
#endif

}  // namespace

#define JAXPRUNE_EXPORT extern "C" __attribute__((visibility("default")))

// dense[i] = the next value where a bit is set, 0 elsewhere. `stored` is the number of bits set.
JAXPRUNE_EXPORT void jaxprune_spread(const uint8_t* mask, int64_t count, const void* values, int64_t stored,
                                     int itemsize, void* dense) {
  int64_t from = 0, used = 0;
#ifdef JAXPRUNE_X86
  if (itemsize == 4 && Wide())
    from = SpreadWide(mask, count, static_cast<const char*>(values), stored, static_cast<uint32_t*>(dense), &used);
#endif
  const auto rest = [&](auto zero) {
    using T = decltype(zero);
    Spread<T>(mask, from, count, static_cast<const char*>(values) + used * sizeof(T), static_cast<T*>(dense));
  };
  if (itemsize == 1) rest(uint8_t(0));
  if (itemsize == 2) rest(uint16_t(0));
  if (itemsize == 4) rest(uint32_t(0));
  if (itemsize == 8) rest(uint64_t(0));
}

// Bits and values of what is not zero; returns how many. Room for count + 16 values.
JAXPRUNE_EXPORT int64_t jaxprune_gather(const void* dense, int64_t count, int itemsize, uint8_t* mask, void* values) {
  int64_t from = 0, made = 0;
#ifdef JAXPRUNE_X86
  if (itemsize == 4 && Wide())
    from = GatherWide(static_cast<const uint32_t*>(dense), count, mask, static_cast<uint32_t*>(values), &made);
#endif
  const auto rest = [&](auto zero) {
    using T = decltype(zero);
    return made + Gather<T>(static_cast<const T*>(dense), from, count, mask, static_cast<T*>(values) + made);
  };
  if (itemsize == 1) return rest(uint8_t(0));
  if (itemsize == 2) return rest(uint16_t(0));
  if (itemsize == 4) return rest(uint32_t(0));
  return rest(uint64_t(0));
}
