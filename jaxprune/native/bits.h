// The product with up to eight rows of activations, for a weight whose inputs are bits: memory bounds it, so that it is
// read once, as it lies, and as little of it as there can be.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "finish.h"
#include "kernels.h"
#include "vectors.h"

namespace jaxprune {
namespace {

constexpr int64_t kAheadBytes = 4096;  // of the values, between what is asked of memory and what is used
constexpr int kPerWord = kWord / kLanes;

inline int64_t CountBits(uint64_t word) { return __builtin_popcountll(word); }

// How a word's values become vectors, and in which order the activations then lie: `Source` says which of the word's
// inputs is at a place.
template <class Value>
struct Word {
  static constexpr int Source(int place) { return place; }

  static void Expanded(uint64_t word, const Value* values, Vec (&out)[kPerWord]) {
    for (int part = 0; part < kPerWord; ++part) {
      const int from = part * kLanes;
      const int64_t before = CountBits(word & ((uint64_t{1} << from) - 1));
      out[part] = Expand(static_cast<uint32_t>(word >> from), Load(values + before));
    }
  }
};

#if defined(JAXPRUNE_VNNI)
// Two in a lane: a shift makes a float of the even one, a mask of the odd one.
template <>
struct Word<BF16> {
  static constexpr int Source(int place) { return place / 32 * 32 + place % 16 * 2 + place / 16 % 2; }

  static void Expanded(uint64_t word, const BF16* values, Vec (&out)[kPerWord]) {
    const int64_t before = CountBits(word & 0xffffffff);
    for (int half = 0; half < 2; ++half) {
      const __m512i packed = _mm512_loadu_si512(values + (half ? before : 0));
      const Bits both = (Bits)_mm512_maskz_expand_epi16(static_cast<__mmask32>(word >> (32 * half)), packed);
      out[2 * half] = (Vec)(both << 16);
      out[2 * half + 1] = (Vec)(both & 0xffff0000);
    }
  }
};
#endif

// Reads the words of one output after the other; nothing is read outside, whatever bits and bounds say.
template <class Value>
class Reader {
 public:
  explicit Reader(const BitWeight& w) : w_(w) {}

  // Whether output o begins at one of the values, and has no bits beyond the last input.
  bool Begin(int64_t o) {
    at_ = w_.bounds[o];
    bits_ = w_.bits + o * w_.words() * sizeof(uint64_t);
    if (at_ < 0 || at_ > w_.stored) return false;
    if (w_.n_in % kWord == 0) return true;
    uint64_t last;
    std::memcpy(&last, bits_ + (w_.words() - 1) * sizeof last, sizeof last);
    return last >> (w_.n_in % kWord) == 0;
  }

  // The next word and its values, of which a whole word may be read.
  const Value* Next(uint64_t* word) {
    std::memcpy(word, bits_, sizeof *word);
    bits_ += sizeof *word;
    const Value* values = static_cast<const Value*>(w_.values) + at_;
    const char* ahead = reinterpret_cast<const char*>(values) + kAheadBytes;
    for (size_t line = 0; line < (sizeof(Value) + 1) / 2; ++line) __builtin_prefetch(ahead + line * 64);
    if (__builtin_expect(at_ + kWord > w_.stored, false)) values = Rest();
    at_ += CountBits(*word);
    return values;
  }

  // Whether output o, whose words have been read, ends where the next one begins.
  bool End(int64_t o) const { return at_ == w_.bounds[o + 1] && at_ <= w_.stored; }

 private:
  // The last values, and zeros.
  __attribute__((noinline)) const Value* Rest() {
    const int64_t left = std::max<int64_t>(w_.stored - at_, 0);
    std::memset(rest_, 0, sizeof rest_);
    if (left) std::memcpy(rest_, static_cast<const Value*>(w_.values) + at_, left * sizeof(Value));
    return rest_;
  }

  const BitWeight& w_;
  const uint8_t* bits_ = nullptr;
  int64_t at_ = 0;
  Value rest_[kWord];
};

template <class T, int kTimes, class Of>
std::array<T, kTimes> Repeated(const Of& of) {
  if constexpr (kTimes == 1) return {T(of)};
  else return {T(of), T(of)};
}

// A loop over outputs with so many side by side, then with one for those that are left.
template <int kOutputs, class Loop>
bool SideBySide(int64_t first, int64_t last, Loop loop) {
  const int64_t middle = first + (last - first) / kOutputs * kOutputs;
  return loop(std::integral_constant<int, kOutputs>(), first, middle) &&
         (middle == last || loop(std::integral_constant<int, 1>(), middle, last));
}

// Rows of activations that do not fit the first level are loaded once for both of two outputs.
template <int kRows>
constexpr int kOutputsAtOnce = kRows > 1 && VECTOR_BYTES == 64 ? 2 : 1;

#define JAXPRUNE_UNROLLED _Pragma("GCC unroll 16")  // what a loop adds to stays in registers only so

template <class Value, int kRows, int kOutputs>
bool BitDots(const BitWeight& w, const Operands& ops, const BitInputs& in, int64_t first, int64_t last) {
  constexpr int kSums = kRows == 1 ? kPerWord : kRows < 4 ? 2 : 1;  // so that additions do not wait for each other
  const int64_t words = w.words(), stride = words * kWord;
  std::array<Reader<Value>, kOutputs> readers = Repeated<Reader<Value>, kOutputs>(w);
  for (int64_t o = first; o < last; o += kOutputs) {
    for (int i = 0; i < kOutputs; ++i) {
      if (!readers[i].Begin(o + i)) return false;
    }
    Vec sums[kOutputs][kRows][kSums] = {};
    for (int64_t k = 0; k < words; ++k) {
      Vec expanded[kOutputs][kPerWord];
      JAXPRUNE_UNROLLED
      for (int i = 0; i < kOutputs; ++i) {
        uint64_t word;
        const Value* values = readers[i].Next(&word);
        Word<Value>::Expanded(word, values, expanded[i]);
      }
      const float* x = static_cast<const float*>(in.data) + k * kWord;
      JAXPRUNE_UNROLLED
      for (int part = 0; part < kPerWord; ++part) {
        JAXPRUNE_UNROLLED
        for (int row = 0; row < kRows; ++row) {
          const Vec here = Load(x + row * stride + part * kLanes);
          JAXPRUNE_UNROLLED
          for (int i = 0; i < kOutputs; ++i) sums[i][row][part % kSums] += expanded[i][part] * here;
        }
      }
    }
    JAXPRUNE_UNROLLED
    for (int i = 0; i < kOutputs; ++i) {
      if (!readers[i].End(o + i)) return false;
      JAXPRUNE_UNROLLED
      for (int row = 0; row < kRows; ++row) {
        Vec sum = sums[i][row][0];
        JAXPRUNE_UNROLLED
        for (int j = 1; j < kSums; ++j) sum += sums[i][row][j];
        FinishOne(Total(sum), w, ops, in.row + row, o + i);
      }
    }
  }
  return true;
}

// What no zero may meet: infinities, and what is no number.
template <class Value, class X>
bool BitDotsOneByOne(const BitWeight& w, const Operands& ops, const BitInputs& in, int64_t first, int64_t last) {
  Reader<Value> reader(w);
  for (int64_t o = first; o < last; ++o) {
    if (!reader.Begin(o)) return false;
    float sums[kRowsAtOnce] = {};
    for (int64_t k = 0; k < w.words(); ++k) {
      uint64_t word;
      for (const Value* value = reader.Next(&word); word; word &= word - 1, ++value) {
        const int64_t input = k * kWord + __builtin_ctzll(word);
        for (int64_t row = 0; row < in.rows; ++row) {
          sums[row] += Widen(*value) * Widen(static_cast<const X*>(ops.x)[(in.row + row) * w.n_in + input]);
        }
      }
    }
    if (!reader.End(o)) return false;
    for (int64_t row = 0; row < in.rows; ++row) FinishOne(sums[row], w, ops, in.row + row, o);
  }
  return true;
}

template <class X>
float Largest(const X* x, int64_t n) {
  float largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const float size = std::fabs(Widen(x[i]));
    largest = std::max(largest, size);
    finite &= size <= std::numeric_limits<float>::max();
  }
  return finite ? largest : -1;
}

template <class Value, class X>
void ArrangeFloats(const X* x, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += kWord) {
    for (int place = 0; place < kWord; ++place) {
      const int64_t from = i + Word<Value>::Source(place);
      to[i + place] = from < n ? Widen(x[from]) : 0;
    }
  }
}

#if defined(JAXPRUNE_VNNI)
constexpr int kBytes = 3;  // of an activation in fixed point
constexpr int kHalf = 8 * kBytes - 1;

// Activations as integers of 24 bits against the largest of their row, 2^23 added so that no byte has a sign; a plane
// for each byte. Sums are exact, so that only this rounding counts, at most 2^-23 of the largest activation.
template <class X>
void ArrangeFixed(const X* x, int64_t n, float largest, uint8_t* to, int64_t plane, double* unit) {
  int exponent = 0;
  std::frexp(largest, &exponent);
  *unit = std::ldexp(1.0, exponent - kHalf);
  const __m512 scale = _mm512_set1_ps(static_cast<float>(kHalf - exponent));
  for (int64_t i = 0; i < plane; i += kLanes) {
    Vec values{};
    if (i + kLanes <= n) values = Load(x + i);
    for (int64_t j = i; i + kLanes > n && j < n; ++j) values[j - i] = Widen(x[j]);
    const __m512 scaled = _mm512_maskz_scalef_ps(0xffff, (__m512)values, scale);
    Bits fixed = (Bits)_mm512_maskz_cvtps_epi32(0xffff, scaled) + (1u << kHalf);
    fixed = (Bits)_mm512_maskz_min_epu32(0xffff, (__m512i)fixed, _mm512_set1_epi32((2 << kHalf) - 1));
    for (int byte = 0; byte < kBytes; ++byte, fixed >>= 8) {
      const __m128i low = _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)fixed);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + byte * plane + i), low);
    }
  }
}

// The sum of all lanes, which 32 bits hold.
inline int64_t TotalOfIntegers(__m512i sums) {
  typedef int32_t Integers __attribute__((vector_size(64)));
  typedef int32_t Fewer __attribute__((vector_size(32)));
  typedef int32_t Fewest __attribute__((vector_size(16)));
  const Integers all = (Integers)sums;
  const Fewer eight = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
  const Fewest four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                      __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return four[0] + four[1] + four[2] + four[3];
}

constexpr int kFixedRows = 4;  // whose sums fit in registers

template <int kRows, int kOutputs>
bool BitDotsFixed(const BitWeight& w, const Operands& ops, const BitInputs& in, int skipped, int64_t first,
                  int64_t last) {
  const int64_t words = w.words(), plane = words * kWord;
  const __m512i ones = _mm512_set1_epi8(1);
  std::array<Reader<int8_t>, kOutputs> readers = Repeated<Reader<int8_t>, kOutputs>(w);
  for (int64_t o = first; o < last; o += kOutputs) {
    for (int i = 0; i < kOutputs; ++i) {
      if (!readers[i].Begin(o + i)) return false;
    }
    __m512i sums[kOutputs][kRows][kBytes] = {}, weights[kOutputs] = {};
    for (int64_t k = 0; k < words; ++k) {
      __m512i expanded[kOutputs];
      JAXPRUNE_UNROLLED
      for (int i = 0; i < kOutputs; ++i) {
        uint64_t word;
        const int8_t* values = readers[i].Next(&word);
        expanded[i] = _mm512_maskz_expand_epi8(word, _mm512_loadu_si512(values));
        weights[i] = _mm512_dpbusd_epi32(weights[i], ones, expanded[i]);
      }
      const uint8_t* x = static_cast<const uint8_t*>(in.data) + skipped * kBytes * plane + k * kWord;
      JAXPRUNE_UNROLLED
      for (int row = 0; row < kRows; ++row) {
        JAXPRUNE_UNROLLED
        for (int byte = 0; byte < kBytes; ++byte) {
          const __m512i here = _mm512_loadu_si512(x + (row * kBytes + byte) * plane);
          JAXPRUNE_UNROLLED
          for (int i = 0; i < kOutputs; ++i) {
            sums[i][row][byte] = _mm512_dpbusd_epi32(sums[i][row][byte], here, expanded[i]);
          }
        }
      }
    }
    JAXPRUNE_UNROLLED
    for (int i = 0; i < kOutputs; ++i) {
      if (!readers[i].End(o + i)) return false;
      const int64_t added = TotalOfIntegers(weights[i]) * (int64_t{1} << kHalf);
      JAXPRUNE_UNROLLED
      for (int row = 0; row < kRows; ++row) {
        int64_t sum = -added;
        JAXPRUNE_UNROLLED
        for (int byte = 0; byte < kBytes; ++byte) {
          sum += TotalOfIntegers(sums[i][row][byte]) * (int64_t{1} << (8 * byte));
        }
        const double exact = static_cast<double>(sum) * in.unit[skipped + row];
        FinishOne(static_cast<float>(exact), w, ops, in.row + skipped + row, o + i);
      }
    }
  }
  return true;
}

template <int kRows>
bool BitDotsFixed(const BitWeight& w, const Operands& ops, const BitInputs& in, int skipped, int64_t first,
                  int64_t last) {
  return SideBySide<kOutputsAtOnce<kRows>>(first, last, [&](auto outputs, int64_t from, int64_t to) {
    return BitDotsFixed<kRows, decltype(outputs)::value>(w, ops, in, skipped, from, to);
  });
}
#endif

// Whether activations are in fixed point: 32 bits hold the sums over so many inputs.
inline bool IsFixed(const BitWeight& w) {
#if defined(JAXPRUNE_VNNI)
  return w.type == Type::kS8 && w.n_in <= (1 << 16);
#else
  return false;
#endif
}

template <class Value, class X>
void ArrangeAs(const BitWeight& w, const Operands& ops, BitInputs* in) {
  const int64_t words = w.words() * kWord;
  in->finite = true;
  for (int64_t row = 0; row < in->rows; ++row) {
    const X* x = static_cast<const X*>(ops.x) + (in->row + row) * w.n_in;
    const float largest = Largest(x, w.n_in);
    in->finite &= largest >= 0;
    if (!in->finite) return;
#if defined(JAXPRUNE_VNNI)
    if (IsFixed(w)) {
      ArrangeFixed(x, w.n_in, largest, static_cast<uint8_t*>(in->data) + row * kBytes * words, words, &in->unit[row]);
      continue;
    }
#endif
    ArrangeFloats<Value>(x, w.n_in, static_cast<float*>(in->data) + row * words);
  }
}

template <class Value>
void ArrangeOf(const BitWeight& w, const Operands& ops, BitInputs* in) {
  ops.x_type == Type::kF32 ? ArrangeAs<Value, float>(w, ops, in) : ArrangeAs<Value, BF16>(w, ops, in);
}

void Arrange(const BitWeight& w, const Operands& ops, BitInputs* in) {
  w.type == Type::kF32    ? ArrangeOf<float>(w, ops, in)
  : w.type == Type::kBF16 ? ArrangeOf<BF16>(w, ops, in)
  : w.type == Type::kF16  ? ArrangeOf<F16>(w, ops, in)
                          : ArrangeOf<int8_t>(w, ops, in);
}

template <class Value, int kRows = kRowsAtOnce>
bool BitDotsOf(const BitWeight& w, const Operands& ops, const BitInputs& in, int64_t first, int64_t last) {
  if constexpr (kRows > 1) {
    if (in.rows < kRows) return BitDotsOf<Value, kRows - 1>(w, ops, in, first, last);
  }
#if defined(JAXPRUNE_VNNI)
  if constexpr (sizeof(Value) == 1) {
    if (IsFixed(w)) {
      constexpr int kFirst = std::min(kRows, kFixedRows);
      if (!BitDotsFixed<kFirst>(w, ops, in, 0, first, last)) return false;
      if constexpr (kRows > kFirst) return BitDotsFixed<kRows - kFirst>(w, ops, in, kFirst, first, last);
      return true;
    }
  }
#endif
  return SideBySide<kOutputsAtOnce<kRows>>(first, last, [&](auto outputs, int64_t from, int64_t to) {
    return BitDots<Value, kRows, decltype(outputs)::value>(w, ops, in, from, to);
  });
}

template <class Value>
bool BitsOf(const BitWeight& w, const Operands& ops, const BitInputs& in, int64_t first, int64_t last) {
  if (in.finite) return BitDotsOf<Value>(w, ops, in, first, last);
  return ops.x_type == Type::kF32 ? BitDotsOneByOne<Value, float>(w, ops, in, first, last)
                                  : BitDotsOneByOne<Value, BF16>(w, ops, in, first, last);
}

bool BitProduct(const BitWeight& w, const Operands& ops, const BitInputs& in, int64_t first, int64_t last) {
  return w.type == Type::kF32    ? BitsOf<float>(w, ops, in, first, last)
         : w.type == Type::kBF16 ? BitsOf<BF16>(w, ops, in, first, last)
         : w.type == Type::kF16  ? BitsOf<F16>(w, ops, in, first, last)
                                 : BitsOf<int8_t>(w, ops, in, first, last);
}

// Adds x W for outputs [first, last) and kRows rows to `sums`, whose places are those of `Word`. Two outputs at once, so
// that sums are loaded and stored half as often.
template <class Value, int kRows, int kOutputs>
bool AddTransposed(const BitWeight& w, const float* x, float* sums, int64_t first, int64_t last) {
  const int64_t words = w.words(), stride = words * kWord;
  std::array<Reader<Value>, kOutputs> readers = Repeated<Reader<Value>, kOutputs>(w);
  for (int64_t o = first; o < last; o += kOutputs) {
    for (int i = 0; i < kOutputs; ++i) {
      if (!readers[i].Begin(o + i)) return false;
    }
    for (int64_t k = 0; k < words; ++k) {
      Vec expanded[kOutputs][kPerWord];
      JAXPRUNE_UNROLLED
      for (int i = 0; i < kOutputs; ++i) {
        uint64_t word;
        const Value* values = readers[i].Next(&word);
        Word<Value>::Expanded(word, values, expanded[i]);
      }
      for (int row = 0; row < kRows; ++row) {
        float* here = sums + row * stride + k * kWord;
        JAXPRUNE_UNROLLED
        for (int part = 0; part < kPerWord; ++part) {
          Vec sum = Load(here + part * kLanes);
          JAXPRUNE_UNROLLED
          for (int i = 0; i < kOutputs; ++i) sum += expanded[i][part] * x[row * w.n_out + o + i];
          Store(here + part * kLanes, sum);
        }
      }
    }
    for (int i = 0; i < kOutputs; ++i) {
      if (!readers[i].End(o + i)) return false;
    }
  }
  return true;
}

template <class Value>
bool AddOneByOne(const BitWeight& w, const float* x, float* sums, int64_t rows, int64_t first, int64_t last) {
  Reader<Value> reader(w);
  for (int64_t o = first; o < last; ++o) {
    if (!reader.Begin(o)) return false;
    for (int64_t k = 0; k < w.words(); ++k) {
      uint64_t word;
      for (const Value* value = reader.Next(&word); word; word &= word - 1, ++value) {
        const int64_t input = k * kWord + __builtin_ctzll(word);
        for (int64_t row = 0; row < rows; ++row) {
          sums[row * w.words() * kWord + input] += Widen(*value) * x[row * w.n_out + o];
        }
      }
    }
    if (!reader.End(o)) return false;
  }
  return true;
}

template <class Value, int kRows = kRowsAtOnce>
bool AddTransposedOf(const BitWeight& w, const float* x, float* sums, int64_t rows, int64_t first, int64_t last) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return AddTransposedOf<Value, kRows - 1>(w, x, sums, rows, first, last);
  }
  return SideBySide<2>(first, last, [&](auto outputs, int64_t from, int64_t to) {
    return AddTransposed<Value, kRows, decltype(outputs)::value>(w, x, sums, from, to);
  });
}

template <class Value>
bool TransposedOf(const BitWeight& w, const float* x, float* sums, int64_t rows, bool finite, int64_t first,
                  int64_t last) {
  const int64_t stride = w.words() * kWord;
  std::fill_n(sums, rows * stride, 0.0f);
  if (!finite) return AddOneByOne<Value>(w, x, sums, rows, first, last);
  if (!AddTransposedOf<Value>(w, x, sums, rows, first, last)) return false;
  for (int64_t at = 0; at < rows * stride; at += kWord) {  // back in the order of inputs
    float ordered[kWord];
    for (int place = 0; place < kWord; ++place) ordered[Word<Value>::Source(place)] = sums[at + place];
    std::copy_n(ordered, kWord, sums + at);
  }
  return true;
}

bool Transposed(const BitWeight& w, const float* x, float* sums, int64_t rows, bool finite, int64_t first,
                int64_t last) {
  return w.type == Type::kF32    ? TransposedOf<float>(w, x, sums, rows, finite, first, last)
         : w.type == Type::kBF16 ? TransposedOf<BF16>(w, x, sums, rows, finite, first, last)
         : w.type == Type::kF16  ? TransposedOf<F16>(w, x, sums, rows, finite, first, last)
                                 : TransposedOf<int8_t>(w, x, sums, rows, finite, first, last);
}

}  // namespace
}  // namespace jaxprune
