// The product with a single position, which memory bounds.
#pragma once

#include <algorithm>

#include "finish.h"
#include "kernels.h"
#include "spans.h"
#include "trust.h"
#include "vectors.h"

namespace jaxprune {
namespace {

constexpr int64_t kAhead = 512;  // non-zeros between what is asked of memory and what is used
constexpr int64_t kChecked = 8;  // groups whose indices are checked just before they are used

// Bound by memory, so that is asked early; and four sums, so that additions do not wait for each other.
template <class Value, class Index, class X>
float Dot(const Value* values, const Index* index, int64_t n, const X* x) {
  float a = 0, b = 0, c = 0, d = 0;
  const auto four = [&](int64_t i) {
    a += Widen(values[i]) * Widen(x[index[i]]);
    b += Widen(values[i + 1]) * Widen(x[index[i + 1]]);
    c += Widen(values[i + 2]) * Widen(x[index[i + 2]]);
    d += Widen(values[i + 3]) * Widen(x[index[i + 3]]);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __builtin_prefetch(values + i + kAhead);
    __builtin_prefetch(index + i + kAhead);
    for (int64_t j = i; j < i + 16; j += 4) four(j);
  }
  for (; i + 4 <= n; i += 4) four(i);
  for (; i < n; ++i) a += Widen(values[i]) * Widen(x[index[i]]);
  return (a + b) + (c + d);
}

// The same for a group's outputs, side by side.
template <class Value, class Index, class X>
void GroupDot(const Value* values, const Index* index, int64_t n, const X* x, float* sums) {
  for (int64_t i = 0; i < n; ++i) {
    for (int o = 0; o < kGroup; ++o) sums[o] += Widen(values[i * kGroup + o]) * Widen(x[index[i]]);
  }
}

// At most kAtOnce groups, tile by tile, so that memory is read as it lies; what is read is checked just before.
template <class Value, class Index, class X>
bool Dots(const Weight& w, const Operands& ops, const Task& task) {
  float sums[kAtOnce][kGroup] = {};
  for (int64_t tile = 0; tile < w.n_tiles; ++tile) {
    const int32_t* bounds = w.bounds + tile * (w.groups() + 1);
    const X* x = static_cast<const X*>(ops.x) + tile * w.tile;
    for (int64_t first = task.first; first < task.last; first += kChecked) {
      const int64_t last = std::min(first + kChecked, task.last);
      if (!Sound(w, tile, first, last)) return false;
      for (int64_t g = first; g < last; ++g) {
        const Value* values = static_cast<const Value*>(w.values) + bounds[g] * w.group;
        const Index* index = static_cast<const Index*>(w.index) + bounds[g];
        const int64_t n = bounds[g + 1] - bounds[g];
        float* sum = sums[g - task.first];
        w.group == 1 ? void(*sum += Dot(values, index, n, x)) : GroupDot(values, index, n, x, sum);
      }
    }
  }
  for (int64_t g = task.first; g < task.last; ++g) {
    for (int64_t i = 0; i < w.group; ++i) FinishOne(sums[g - task.first][i], w, ops, 0, g * w.group + i);
  }
  return true;
}

template <class Value, class Index>
bool DotsOf(const Weight& w, const Operands& ops, const Task& task) {
  return ops.x_type == Type::kF32 ? Dots<Value, Index, float>(w, ops, task) : Dots<Value, Index, BF16>(w, ops, task);
}

template <class Value>
bool VectorOf(const Weight& w, const Operands& ops, const Task& task) {
  const int64_t span = SpanOf(w);
  for (int64_t first = task.first; first < task.last; first += kAtOnce) {
    const Task some{0, 1, first, std::min(first + kAtOnce, task.last)};
    if (span && InSpans(w, span, some.first, some.last)) {
      SpanDotsOf<Value>(w, span, ops, some);
    } else if (!(w.wide ? DotsOf<Value, uint16_t>(w, ops, some) : DotsOf<Value, uint8_t>(w, ops, some))) {
      return false;
    }
  }
  return true;
}

bool Vector(const Weight& w, const Operands& ops, const Task& task) {
  return w.type == Type::kF32    ? VectorOf<float>(w, ops, task)
         : w.type == Type::kBF16 ? VectorOf<BF16>(w, ops, task)
                                 : VectorOf<int8_t>(w, ops, task);
}

}  // namespace
}  // namespace jaxprune
