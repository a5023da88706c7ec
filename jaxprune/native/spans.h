// N:M weights and a single position. Where 16 weights are stored of every 32 or 64 inputs, as of 2:4 or 1:4, and
// indices are bytes, the activations are picked out of registers, 16 at once, not out of memory one by one.
#pragma once

#include <algorithm>

#include "finish.h"
#include "kernels.h"
#include "vectors.h"

namespace jaxprune {
namespace {

constexpr int64_t kOfSpan = 16;  // weights stored of a span
constexpr int64_t kAtOnce = 64;  // groups whose sums are kept

#if VECTOR_BYTES == 64
// The inputs of a span, 32 or 64, if the numbers of weights and inputs allow for it; else 0.
int64_t SpanOf(const Weight& w) {
  for (int64_t span : {2 * kOfSpan, 4 * kOfSpan}) {
    const bool regular = w.group == 1 && !w.wide && w.tile % span == 0 && w.n_in % span == 0;
    if (regular && w.inputs == w.n_out * (w.n_in / span) * kOfSpan) return span;
  }
  return 0;
}

__m128i Bytes16(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

// Whether the runs of outputs [first, last) are within the index, and each holds 16 inputs of every span.
bool InSpans(const Weight& w, int64_t span, int64_t first, int64_t last) {
  const __m128i high_bits = _mm_set1_epi8(static_cast<char>(-span));  // which span an input is in
  for (int64_t tile = 0; tile < w.n_tiles; ++tile) {
    const int64_t length = std::min(w.tile, w.n_in - tile * w.tile) / span * kOfSpan;
    const int32_t* bounds = w.bounds + tile * (w.groups() + 1);
    for (int64_t o = first; o < last; ++o) {
      if (bounds[o] < 0 || bounds[o] + length > w.inputs || bounds[o] + length != bounds[o + 1]) return false;
      const uint8_t* index = static_cast<const uint8_t*>(w.index) + bounds[o];
      __m128i elsewhere = _mm_setzero_si128(), here = _mm_setzero_si128();
      for (int64_t i = 0; i < length; i += kOfSpan) {
        elsewhere = _mm_or_si128(elsewhere, _mm_xor_si128(_mm_and_si128(Bytes16(index + i), high_bits), here));
        here = _mm_add_epi8(here, _mm_set1_epi8(static_cast<char>(span)));
      }
      if (!_mm_testz_si128(elsewhere, elsewhere)) return false;
    }
  }
  return true;
}

// A span is kTables vectors of activations; `index` counts from the tile's first, so its low bits from the span's.
template <class Value, class X, int kTables>
Vec SpanSums(const Value* values, const uint8_t* index, int64_t n, const X* x) {
  Vec sum{};
  for (int64_t i = 0; i < n; i += kOfSpan, x += kTables * kLanes) {
    const __m512i at = _mm512_maskz_cvtepu8_epi32(0xffff, Bytes16(index + i));
    __m512 picked = _mm512_permutex2var_ps(Load(x), at, Load(x + kLanes));
    if constexpr (kTables == 4) {
      const __m512 high = _mm512_permutex2var_ps(Load(x + 2 * kLanes), at, Load(x + 3 * kLanes));
      picked = _mm512_mask_mov_ps(picked, _mm512_test_epi32_mask(at, _mm512_set1_epi32(2 * kLanes)), high);
    }
    sum += Load(values + i) * picked;
  }
  return sum;
}

// For at most kAtOnce outputs, tile by tile, so that memory is read as it lies.
template <class Value, class X, int kTables>
void SpanDots(const Weight& w, const Operands& ops, const Task& task) {
  Vec sums[kAtOnce] = {};
  for (int64_t tile = 0; tile < w.n_tiles; ++tile) {
    const int32_t* bounds = w.bounds + tile * (w.groups() + 1);
    const X* x = static_cast<const X*>(ops.x) + tile * w.tile;
    for (int64_t o = task.first; o < task.last; ++o) {
      sums[o - task.first] += SpanSums<Value, X, kTables>(static_cast<const Value*>(w.values) + bounds[o],
                                                          static_cast<const uint8_t*>(w.index) + bounds[o],
                                                          bounds[o + 1] - bounds[o], x);
    }
  }
  for (int64_t o = task.first; o < task.last; ++o) FinishOne(Total(sums[o - task.first]), w, ops, 0, o);
}

template <class Value>
void SpanDotsOf(const Weight& w, int64_t span, const Operands& ops, const Task& task) {
  const bool two = span == 2 * kOfSpan;
  if (ops.x_type == Type::kF32) {
    two ? SpanDots<Value, float, 2>(w, ops, task) : SpanDots<Value, float, 4>(w, ops, task);
  } else {
    two ? SpanDots<Value, BF16, 2>(w, ops, task) : SpanDots<Value, BF16, 4>(w, ops, task);
  }
}
#else
int64_t SpanOf(const Weight&) { return 0; }
bool InSpans(const Weight&, int64_t, int64_t, int64_t) { return false; }

template <class Value>
void SpanDotsOf(const Weight&, int64_t, const Operands&, const Task&) {}
#endif

}  // namespace
}  // namespace jaxprune
