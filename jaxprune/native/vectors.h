// Vectors of VECTOR_BYTES, loads and stores that widen and narrow, and the transpose of a square of vectors. In an
// unnamed namespace: every instruction set has its own.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

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

inline float Widen(float value) { return value; }
inline float Widen(int8_t value) { return value; }
inline float Widen(BF16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
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
inline void Store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }
inline void Store(BF16* to, Vec value) {
  const Bits bits = (Bits)value;
  const Bits nan = (Bits)(value != value);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits kept = (nan & ((bits >> 16) | 0x40)) | (~nan & rounded);
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector(kept, Halves);
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
