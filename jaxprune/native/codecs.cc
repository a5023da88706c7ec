// The codecs of jaxprune.storage, one pass over memory each; called through ctypes. Bits are those of a mask: one for
// each weight, the first in the highest bit of a byte. What comes out of a file is trusted in nothing, and may begin at
// any address. Bytes of integers are those of little-endian machines, as in the file.
#include <cstdint>
#include <cstring>

#include "kernels.h"

#ifdef JAXPRUNE_X86
#include <immintrin.h>
#endif

#define JAXPRUNE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

template <typename T>
T Load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// ---- between an array, and bits and values ----

struct Turned {
  uint8_t of[256];
  constexpr Turned() : of() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit)
        if (byte >> bit & 1) of[byte] |= 128 >> bit;
  }
};
constexpr Turned kTurned;

template <typename T>
void Spread(const uint8_t* bits, int64_t from, int64_t count, const char* values, T* dense) {
  for (int64_t i = from; i < count; ++i) {
    const bool alive = bits[i >> 3] >> (7 - (i & 7)) & 1;
    dense[i] = alive ? Load<T>(values) : T(0);
    values += alive ? sizeof(T) : 0;
  }
}

template <typename T>
int64_t Gather(const T* dense, int64_t from, int64_t count, uint8_t* bits, T* values) {
  const T* const first = values;
  for (int64_t i = from; i < count; ++i) {
    if ((i & 7) == 0) bits[i >> 3] = 0;
    const bool alive = dense[i] != 0;
    bits[i >> 3] |= alive << (7 - (i & 7));
    *values = dense[i];
    values += alive;
  }
  return values - first;
}

#ifdef JAXPRUNE_X86
#define JAXPRUNE_WIDE __attribute__((target("avx512f,popcnt")))

// Of 16 weights at a time; returns where it has stopped.
JAXPRUNE_WIDE int64_t SpreadWide(const uint8_t* bits, int64_t count, const char* values, int64_t stored,
                                 uint32_t* dense, int64_t* used) {
  int64_t i = 0, at = 0;
  for (; i + 16 <= count && at + 16 <= stored; i += 16) {
    const __mmask16 alive = kTurned.of[bits[i >> 3]] | kTurned.of[bits[(i >> 3) + 1]] << 8;
    const __m512i next = _mm512_loadu_si512(values + 4 * at);
    _mm512_storeu_si512(dense + i, _mm512_maskz_expand_epi32(alive, next));
    at += __builtin_popcount(alive);
  }
  *used = at;
  return i;
}

JAXPRUNE_WIDE int64_t GatherWide(const uint32_t* dense, int64_t count, uint8_t* bits, uint32_t* values,
                                 int64_t* made) {
  int64_t i = 0, at = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512i here = _mm512_loadu_si512(dense + i);
    const unsigned alive = _mm512_test_epi32_mask(here, here);
    bits[i >> 3] = kTurned.of[alive & 255];
    bits[(i >> 3) + 1] = kTurned.of[alive >> 8];
    _mm512_storeu_si512(values + at, _mm512_maskz_compress_epi32(alive, here));
    at += __builtin_popcount(alive);
  }
  *made = at;
  return i;
}

bool Wide() { return std::strcmp(jaxprune::BestKernels().name, "avx512") == 0; }
#endif

// ---- positions ----

// Calls use(i) for each bit i that is set. What fills the last byte is not set.
template <typename Use>
void ForBits(const uint8_t* bits, int64_t count, const Use& use) {
  const int64_t bytes = (count + 7) / 8;
  const auto of_word = [&](int64_t first, uint64_t word) {
    while (word) {
      const int zeros = __builtin_clzll(word);
      use(8 * first + zeros);
      word ^= uint64_t{1} << 63 >> zeros;
    }
  };
  int64_t first = 0;
  for (; first + 8 <= bytes; first += 8) of_word(first, __builtin_bswap64(Load<uint64_t>(bits + first)));
  for (; first < bytes; ++first) of_word(first, uint64_t{bits[first]} << 56);
}

void Set(uint8_t* bits, int64_t i) { bits[i >> 3] |= 128 >> (i & 7); }

// Codes of up to 16 bits side by side, the highest bit first.
struct Writer {
  uint8_t* at;
  int width;
  uint64_t held = 0;
  int bits = 0;

  void Put(uint64_t code) {
    held = held << width | code;
    bits += width;
    if (bits < 32) return;
    bits -= 32;
    const uint32_t full = __builtin_bswap32(held >> bits);
    std::memcpy(at, &full, 4);
    at += 4;
  }
  void End() {
    for (; bits > 0; bits -= 8) *at++ = bits >= 8 ? held >> (bits - 8) : held << (8 - bits);
  }
};

template <typename T>
void Csr(const uint8_t* bits, int64_t rows, int64_t cols, uint32_t* ends, T* columns) {
  int64_t row = 0, start = 0;
  uint32_t stored = 0;
  ForBits(bits, rows * cols, [&](int64_t i) {
    for (; i >= start + cols; start += cols) ends[row++] = stored;
    columns[stored++] = i - start;
  });
  while (row < rows) ends[row++] = stored;
}

template <typename T>
bool BitsOfCsr(const char* ends, const char* columns, int64_t rows, int64_t cols, int64_t stored, uint8_t* bits) {
  int64_t at = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t end = Load<uint32_t>(ends + 4 * row);
    if (end < at || end > stored) return false;
    for (int64_t before = -1; at < end; ++at) {
      const int64_t column = Load<T>(columns + sizeof(T) * at);
      if (column <= before || column >= cols) return false;
      Set(bits, row * cols + column);
      before = column;
    }
  }
  return at == stored;
}

}  // namespace

// dense[i] = the next value where a bit is set, 0 elsewhere. `stored` is the number of bits set.
JAXPRUNE_EXPORT int64_t jaxprune_spread(const uint8_t* bits, int64_t count, const char* values, int64_t stored,
                                        int64_t itemsize, void* dense) {
  int64_t from = 0, used = 0;
#ifdef JAXPRUNE_X86
  if (itemsize == 4 && Wide()) from = SpreadWide(bits, count, values, stored, static_cast<uint32_t*>(dense), &used);
#endif
  const auto rest = [&](auto zero) {
    Spread(bits, from, count, values + used * sizeof(zero), static_cast<decltype(zero)*>(dense));
  };
  if (itemsize == 1) rest(uint8_t(0));
  if (itemsize == 2) rest(uint16_t(0));
  if (itemsize == 4) rest(uint32_t(0));
  if (itemsize == 8) rest(uint64_t(0));
  return 0;
}

// Bits and values of what is not zero; returns how many. Room for count + 16 values.
JAXPRUNE_EXPORT int64_t jaxprune_gather(const void* dense, int64_t count, int64_t itemsize, uint8_t* bits,
                                        void* values) {
  int64_t from = 0, made = 0;
#ifdef JAXPRUNE_X86
  if (itemsize == 4 && Wide())
    from = GatherWide(static_cast<const uint32_t*>(dense), count, bits, static_cast<uint32_t*>(values), &made);
#endif
  const auto rest = [&](auto zero) {
    using T = decltype(zero);
    return made + Gather(static_cast<const T*>(dense), from, count, bits, static_cast<T*>(values) + made);
  };
  if (itemsize == 1) return rest(uint8_t(0));
  if (itemsize == 2) return rest(uint16_t(0));
  if (itemsize == 4) return rest(uint32_t(0));
  return rest(uint64_t(0));
}

// A code for each bit set: the zeros before it, 2^width - 1 of them being a code of their own. Returns the bytes.
JAXPRUNE_EXPORT int64_t jaxprune_gaps(const uint8_t* bits, int64_t count, int64_t width, uint8_t* codes) {
  const int64_t skip = (int64_t{1} << width) - 1;
  Writer writer{codes, static_cast<int>(width)};
  int64_t next = 0;
  ForBits(bits, count, [&](int64_t i) {
    int64_t gap = i - next;
    for (; gap >= skip; gap -= skip) writer.Put(skip);
    writer.Put(gap);
    next = i + 1;
  });
  writer.End();
  return writer.at - codes;
}

// Sets at most `stored` bits, which are zeros before; returns how many, or -1 if one is outside. `used`: codes.
JAXPRUNE_EXPORT int64_t jaxprune_bits_of_gaps(const uint8_t* codes, int64_t bytes, int64_t width, int64_t stored,
                                              int64_t count, uint8_t* bits, int64_t* used) {
  const uint64_t skip = (uint64_t{1} << width) - 1;
  const uint8_t* const end = codes + bytes;
  uint64_t held = 0;
  int64_t at = 0, seen = 0, read = 0, last = 0;
  for (int have = 0; seen < stored;) {
    if (have < width && end - codes >= 4) {
      held = held << 32 | __builtin_bswap32(Load<uint32_t>(codes));
      codes += 4, have += 32;
    }
    for (; have < width && codes < end; have += 8) held = held << 8 | *codes++;
    if (have < width) break;
    have -= width;
    const uint64_t code = held >> have & skip;
    const bool living = code != skip;
    at += code;
    ++read;
    if (at >= count) {
      if (living) return -1;
      continue;
    }
    // Without a branch: which codes are gaps cannot be foretold.
    bits[at >> 3] |= living << (7 - (at & 7));
    at += living;
    seen += living;
    last = living ? read : last;
  }
  *used = last;
  return seen;
}

JAXPRUNE_EXPORT int64_t jaxprune_csr(const uint8_t* bits, int64_t rows, int64_t cols, int64_t width, uint32_t* ends,
                                     void* columns) {
  if (width == 2) Csr(bits, rows, cols, ends, static_cast<uint16_t*>(columns));
  if (width == 4) Csr(bits, rows, cols, ends, static_cast<uint32_t*>(columns));
  return 0;
}

// Sets the bits, which are zeros before; whether rows end where the columns do, and those ascend and are within.
JAXPRUNE_EXPORT int64_t jaxprune_bits_of_csr(const char* ends, const char* columns, int64_t rows, int64_t cols,
                                             int64_t width, int64_t stored, uint8_t* bits) {
  return width == 2 ? BitsOfCsr<uint16_t>(ends, columns, rows, cols, stored, bits)
                    : BitsOfCsr<uint32_t>(ends, columns, rows, cols, stored, bits);
}
