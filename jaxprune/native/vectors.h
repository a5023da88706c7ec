// Vectors of VECTOR_BYTES, loads and stores that widen and narrow, and the transpose of a square of vectors. In an
// unnamed namespace: every instruction set has its own.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#if VECTOR_BYTES > 16
#include <immintrin.h>
#endif

namespace jaxprune {
namespace {

constexpr int kLanes = VECTOR_BYTES / sizeof(float);
typedef float Vec __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
typedef int8_t Bytes __attribute__((vector_size(VECTOR_BYTES / 4), aligned(1)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2)));

// As a member, since an argument of a template would lose its alignment.
template <int kWidth>
struct Floats {
  typedef float Type __attribute__((vector_size(kWidth * sizeof(float)), aligned(4)));
};

struct BF16 {
  uint16_t bits;
};

struct F16 {
  uint16_t bits;
};

inline float Widen(float value) { return value; }
inline float Widen(int8_t value) { return value; }
inline float Widen(BF16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline float Widen(F16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, rest = value.bits & 0x7fff;
  // The exponent is moved by a product, which makes subnormal numbers normal; the largest one means infinity, or none.
  const uint32_t shifted = rest << 13;
  float wide;
  std::memcpy(&wide, &shifted, sizeof wide);
  wide *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &wide, sizeof bits);
  bits = sign | (rest >= 0x7c00 ? bits | 0x7f800000 : bits);
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void Narrow(float value, float* to) { *to = value; }
// Rounds to the nearest, ties to even; a NaN stays one.
inline void Narrow(float value, BF16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to->bits = value != value ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline Vec Load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline Vec Load(const BF16* from) {
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Bits) << 16);
}
inline Vec Load(const int8_t* from) {
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(from), Vec);
}
inline Vec Load(const F16* from) {
#if VECTOR_BYTES == 64
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif VECTOR_BYTES == 32
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vec wide{};
  for (int i = 0; i < kLanes; ++i) wide[i] = Widen(from[i]);
  return wide;
#endif
}

inline void Store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }
inline void Store(BF16* to, Vec value) {
  const Bits bits = (Bits)value;
  const Bits nan = (Bits)(value != value);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits kept = (nan & ((bits >> 16) | 0x40)) | (~nan & rounded);
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector(kept, Halves);
}

// The same bits in all lanes.
inline Vec Filled(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (Vec)(Bits{} + bits);
}

// The sum of all lanes.
inline float Total(Vec sums) {
  float lanes[kLanes];
  Store(lanes, sums);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

#if VECTOR_BYTES == 32
// For each mask of eight lanes, where each lane finds its value.
constexpr std::array<std::array<uint8_t, 8>, 256> ExpansionTable() {
  std::array<std::array<uint8_t, 8>, 256> table{};
  for (int mask = 0; mask < 256; ++mask) {
    for (int lane = 0, next = 0; lane < 8; ++lane) table[mask][lane] = mask >> lane & 1 ? next++ : 0;
  }
  return table;
}

alignas(64) constexpr auto kExpansion = ExpansionTable();
#endif

// The first values, one after the other, in those of the lanes whose bit is set; the other lanes are zero. Higher bits
// count for nothing.
inline Vec Expand(uint32_t mask, Vec values) {
#if VECTOR_BYTES == 64
  return (Vec)_mm512_maskz_expand_ps(static_cast<__mmask16>(mask), (__m512)values);
#elif VECTOR_BYTES == 32
  const auto* entry = reinterpret_cast<const __m128i*>(kExpansion[mask & 0xff].data());
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i there = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), bit), bit);
  const __m256 moved = _mm256_permutevar8x32_ps((__m256)values, _mm256_cvtepu8_epi32(_mm_loadl_epi64(entry)));
  return (Vec)_mm256_and_ps(moved, _mm256_castsi256_ps(there));
#else
  Vec expanded{};
  for (int lane = 0, next = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) expanded[lane] = values[next++];
  }
  return expanded;
#endif
}

// Lane i of the first or second half of a butterfly over blocks of `step` lanes.
constexpr int Pick(int i, int step, bool second) {
  const int block = i / (2 * step), within = i % (2 * step);
  return within < step ? block * 2 * step + within + (second ? step : 0)
                       : block * 2 * step + within - step + (second ? step : 0) + kLanes;
}

template <int kStep, bool kSecond, int... I>
inline Vec Mix(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, Pick(I, kStep, kSecond)...);
}

template <int kStep>
inline void Butterfly(Vec (&square)[kLanes]) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const Vec a = square[i], b = square[i + kStep];
    square[i] = Mix<kStep, false>(a, b, Lanes{});
    square[i + kStep] = Mix<kStep, true>(a, b, Lanes{});
  }
}

template <int kStep = kLanes / 2>
inline void Transpose(Vec (&square)[kLanes]) {
  Butterfly<kStep>(square);
  if constexpr (kStep > 1) Transpose<kStep / 2>(square);
}

}  // namespace
}  // namespace jaxprune
