// Products of codes of 8 bits: activations of 0 to 255, weights of -128 to 127, four inputs at a time, sums in 32 bits
// without any rounding, so that every instruction set has the same. As many products as a call may have never overflow;
// numbers that nobody rounded may, and sums wrap then.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "vectors.h"

namespace jaxprune {
namespace {

struct FourCodes {
  int8_t codes[kRun];
};

// The four codes as one number.
inline int32_t BitsOf(FourCodes from) {
  int32_t bits;
  std::memcpy(&bits, &from, sizeof bits);
  return bits;
}

template <int kWidth>
struct Integers {
  typedef uint32_t Type __attribute__((vector_size(kWidth * sizeof(uint32_t)), aligned(4), may_alias));
};

// Lanes of the widest vector of sums, and four codes of a weight, to be multiplied by four codes of activations in each.
#if defined(JAXPRUNE_VNNI)
constexpr int kCodeLanes = 16;

template <int kWidth>
struct TimesCodes;

template <>
struct TimesCodes<16> {
  using V = Integers<16>::Type;
  __m512i four;

  explicit TimesCodes(FourCodes from) : four(_mm512_set1_epi32(BitsOf(from))) {}
  void AddTo(V& sum, V x) const { sum = (V)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, four); }
};

template <>
struct TimesCodes<8> {
  using V = Integers<8>::Type;
  __m256i four;

  explicit TimesCodes(FourCodes from) : four(_mm256_set1_epi32(BitsOf(from))) {}
  void AddTo(V& sum, V x) const { sum = (V)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)x, four); }
};
#elif VECTOR_BYTES >= 32
constexpr int kCodeLanes = 8;

template <int kWidth>
struct TimesCodes {
  static_assert(kWidth == 8);
  using V = Integers<8>::Type;
  __m256i even, odd;  // in 16 bits, since sums of two products saturate there

  explicit TimesCodes(FourCodes from) {
    const __m256i four = _mm256_set1_epi32(BitsOf(from));
    even = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
    odd = _mm256_srai_epi16(four, 8);
  }
  void AddTo(V& sum, V x) const {
    const __m256i low = _mm256_and_si256((__m256i)x, _mm256_set1_epi16(255)), high = _mm256_srli_epi16((__m256i)x, 8);
    sum += (V)_mm256_madd_epi16(low, even) + (V)_mm256_madd_epi16(high, odd);
  }
};
#else
constexpr int kCodeLanes = kLanes;

template <int kWidth>
struct TimesCodes {
  using V = typename Integers<kWidth>::Type;
  FourCodes four;

  explicit TimesCodes(FourCodes from) : four(from) {}
  void AddTo(V& sum, V x) const {
    for (int i = 0; i < kRun; ++i) sum += (x >> (8 * i) & 255) * static_cast<uint32_t>(int32_t{four.codes[i]});
  }
};
#endif

inline int64_t WholeRuns(int64_t channels) { return (channels + kRun - 1) / kRun * kRun; }

// A run of the same code.
inline float FourTimes(int32_t code) {
  const uint32_t bits = static_cast<uint32_t>(code) * 0x01010101u;
  float four;
  std::memcpy(&four, &bits, sizeof four);
  return four;
}

// In place, results for sums over codes of outputs [first, last): s_x s_w (sum - zero * total). Rounded to float32 before
// anything is added, as `jaxprune.quantize.int8` rounds: in memory, where no compiler makes one operation of two.
inline void FloatsOfSums(const Codes& codes, int64_t first, int64_t last, int64_t columns, float* sums) {
  constexpr int kWidth = VECTOR_BYTES == 64 ? kLanes / 2 : kLanes;  // a unit of columns
  using V = typename Integers<kWidth>::Type;
  typedef int32_t Signed __attribute__((vector_size(kWidth * sizeof(int32_t))));
  for (int64_t o = first; o < last; ++o, sums += columns) {
    const uint32_t surplus = static_cast<uint32_t>(codes.x.zero) * static_cast<uint32_t>(codes.totals[o]);
    const float scale = codes.scale[o] * codes.x.scale;
    for (int64_t p = 0; p < columns; p += kWidth) {
      const Signed exact = (Signed)(*reinterpret_cast<const V*>(sums + p) - surplus);
      *reinterpret_cast<typename Floats<kWidth>::Type*>(sums + p) =
          __builtin_convertvector(exact, typename Floats<kWidth>::Type) * scale;
    }
  }
}

// The nearest code, ties to even, of what is cut off at either end; as `jaxprune.quantize.scales.to_codes` rounds, whose
// result for what is no number is 0 as an integer of 8 bits with sign.
class Encoder {
 public:
  explicit Encoder(const Grid& grid)
      : inverse_(1.0f / grid.scale),
        low_(Vec{} - static_cast<float>(grid.zero)),
        high_(low_ + 255.0f),
        none_(low_ + 128.0f),
        zero_(grid.zero) {}

  Bytes operator()(Vec x) const {
    Vec steps = x * inverse_;
    steps = steps < low_ ? low_ : steps;
    steps = steps > high_ ? high_ : steps;
    steps = steps == steps ? steps : none_;
    return __builtin_convertvector((Bits)(steps + kWhole) + zero_, Bytes);  // of the sum's bits the last are the integer
  }

  void Write(Vec x, uint8_t* to) const {
    const Bytes codes = (*this)(x);
    std::memcpy(to, &codes, kLanes);
  }

 private:
  static constexpr float kWhole = 0x1.8p23f;  // what is added to it is rounded to an integer
  float inverse_;
  Vec low_, high_, none_;
  uint32_t zero_;
};

template <class X>
void EncodeRow(const Encoder& encoder, const X* x, int64_t n, uint8_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) encoder.Write(Load(x + i), to + i);
  if (i == n) return;
  Vec rest{};
  for (int64_t j = i; j < n; ++j) rest[j - i] = Widen(x[j]);
  const Bytes codes = encoder(rest);
  std::memcpy(to + i, &codes, n - i);
}

template <class X>
void EncodeAs(const X* x, int64_t channels, const Grid& grid, int64_t first, int64_t last, uint8_t* to) {
  const Encoder encoder(grid);
  const int64_t padded = WholeRuns(channels);
  if (padded == channels) return EncodeRow(encoder, x + first * channels, (last - first) * channels, to + first * padded);
  for (int64_t pixel = first; pixel < last; ++pixel) {
    EncodeRow(encoder, x + pixel * channels, channels, to + pixel * padded);
    std::fill_n(to + pixel * padded + channels, padded - channels, static_cast<uint8_t>(grid.zero));
  }
}

void Encode(const void* x, Type type, int64_t channels, const Grid& grid, int64_t first, int64_t last, uint8_t* to) {
  type == Type::kF32 ? EncodeAs(static_cast<const float*>(x), channels, grid, first, last, to)
                     : EncodeAs(static_cast<const BF16*>(x), channels, grid, first, last, to);
}

}  // namespace
}  // namespace jaxprune
