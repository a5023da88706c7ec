// Sums over the batch of the products of one input and one output each: the derivative of x W^T in the non-zeros of W.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "pack.h"
#include "trust.h"
#include "vectors.h"

namespace jaxprune {
namespace {

// Channels [first, last) of rows [row, row + count) of x (rows, channels), as (channel, row) with so many rows in whole
// vectors; rows beyond the last are zeros.
template <class X>
void LayRows(const X* x, int64_t channels, int64_t row, int64_t count, int64_t first, int64_t last, float* to) {
  const int64_t columns = (count + kLanes - 1) / kLanes * kLanes, squares = (last - first) / kLanes;
  const X* rows[kPanel] = {};
  for (int64_t p = 0; p < count; ++p) rows[p] = x + (row + p) * channels + first;
  PackSquares(rows, squares, columns, 0.0f, to + first * columns);
  for (int64_t c = squares * kLanes; c < last - first; ++c) {
    float* column = to + (first + c) * columns;
    for (int64_t p = 0; p < columns; ++p) column[p] = p < count ? Widen(rows[p][c]) : 0.0f;
  }
}

void Lay(const Rows& x, int64_t row, int64_t count, int64_t first, int64_t last, float* to) {
  x.type == Type::kF32 ? LayRows(static_cast<const float*>(x.data), x.channels, row, count, first, last, to)
                       : LayRows(static_cast<const BF16*>(x.data), x.channels, row, count, first, last, to);
}

// Of every second block of `step` lanes those of b, of the others those of a; or, `crossed`, their neighbours.
template <int kStep, bool kCrossed, int... I>
inline Vec Alternate(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((kCrossed ? I ^ kStep : I) + (I & kStep ? kLanes : 0))...);
}

// Lane i is the sum of row i.
template <int kStep = kLanes / 2>
inline Vec Totals(Vec (&rows)[kLanes]) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
  for (int i = 0; i < kStep; ++i) {
    const Vec a = rows[i], b = rows[i + kStep];
    rows[i] = Alternate<kStep, false>(a, b, Lanes{}) + Alternate<kStep, true>(a, b, Lanes{});
  }
  if constexpr (kStep > 1) return Totals<kStep / 2>(rows);
  return rows[0];
}

// The runs of outputs [first, last) of a tile. An output's columns stay in registers for its run; the sums of kLanes
// non-zeros, of whatever outputs, are added up together.
template <class Index, int kVecs>
void SampleRuns(const Weight& w, int64_t tile, int64_t first, int64_t last, const float* x, const float* y, bool add,
                float* to) {
  constexpr int64_t kColumns = kVecs * kLanes;
  const Index* index = static_cast<const Index*>(w.index);
  const int32_t* bounds = w.bounds + tile * (w.groups() + 1);
  alignas(VECTOR_BYTES) Vec sums[kLanes];
  int waiting = 0;
  to += bounds[first];
  for (int64_t o = first; o < last; ++o) {
    Vec of_output[kVecs];
    for (int v = 0; v < kVecs; ++v) of_output[v] = Load(y + o * kColumns + v * kLanes);
    for (int32_t i = bounds[o]; i < bounds[o + 1]; ++i) {
      const float* row = x + int64_t{index[i]} * kColumns;
      Vec sum = of_output[0] * Load(row);
      for (int v = 1; v < kVecs; ++v) sum += of_output[v] * Load(row + v * kLanes);
      sums[waiting] = sum;
      if (++waiting < kLanes) continue;
      waiting = 0;
      const Vec totals = Totals(sums);
      Store(to, add ? Load(to) + totals : totals);
      to += kLanes;
    }
  }
  if (!waiting) return;
  std::fill(sums + waiting, sums + kLanes, Vec{});
  const Vec totals = Totals(sums);
  for (int i = 0; i < waiting; ++i) to[i] = add ? to[i] + totals[i] : totals[i];
}

using SampleLoop = void (*)(const Weight&, int64_t, int64_t, int64_t, const float*, const float*, bool, float*);

template <class Index, int kVecs = 1>
SampleLoop SampleLoopFor(int64_t count) {
  if constexpr (kVecs < kMaxVecs) {
    if (count > kVecs * kLanes) return SampleLoopFor<Index, kVecs + 1>(count);
  }
  return &SampleRuns<Index, kVecs>;
}

bool Sampled(const Weight& w, int64_t tile, int64_t first, int64_t last, const Panels& panels, float* to) {
  if (!Sound(w, tile, first, last)) return false;
  bool add = panels.add;
  const float *x = panels.x, *y = panels.y;
  for (int64_t row = 0; row < panels.rows; row += panels.columns, x += panels.columns * w.n_in) {
    const int64_t count = std::min(panels.columns, panels.rows - row);
    const int64_t columns = (count + kLanes - 1) / kLanes * kLanes;
    const SampleLoop loop = w.wide ? SampleLoopFor<uint16_t>(count) : SampleLoopFor<uint8_t>(count);
    loop(w, tile, first, last, x + tile * w.tile * columns, y, add, to);
    y += panels.columns * w.n_out;
    add = true;
  }
  return true;
}

}  // namespace
}  // namespace jaxprune
