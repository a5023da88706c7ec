// The product with a single position, which memory bounds.
#pragma once

#include <algorithm>

#include "finish.h"
#include "kernels.h"
#include "trust.h"
#include "vectors.h"

namespace jaxprune {
namespace {

constexpr int64_t kAhead = 512;  // non-zeros between what is asked of memory and what is used
constexpr int64_t kChecked = 8;    // groups whose indices are checked just before they are used

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

template <class Value, class Index, class X>
void Dots(const Weight& w, const Operands& ops, const Task& task) {
  for (int64_t g = task.first; g < task.last; ++g) {
    float sums[kGroup] = {};
    for (int64_t tile = 0; tile < w.n_tiles; ++tile) {
      const int32_t* bounds = w.bounds + tile * (w.groups() + 1) + g;
      const Value* values = static_cast<const Value*>(w.values) + bounds[0] * w.group;
      const Index* index = static_cast<const Index*>(w.index) + bounds[0];
      const X* x = static_cast<const X*>(ops.x) + tile * w.tile;
      const int64_t n = bounds[1] - bounds[0];
      w.group == 1 ? void(sums[0] += Dot(values, index, n, x)) : GroupDot(values, index, n, x, sums);
    }
    for (int64_t i = 0; i < w.group; ++i) {
      const int64_t o = g * w.group + i;
      ops.y_type == Type::kF32 ? Finish<float>(sums[i], w, ops, 0, o) : Finish<BF16>(sums[i], w, ops, 0, o);
    }
  }
}

template <class Value, class Index>
void DotsOf(const Weight& w, const Operands& ops, const Task& task) {
  ops.x_type == Type::kF32 ? Dots<Value, Index, float>(w, ops, task) : Dots<Value, Index, BF16>(w, ops, task);
}

using DotsLoop = void (*)(const Weight&, const Operands&, const Task&);

template <class Value>
DotsLoop DotsOfValue(const Weight& w) {
  return w.wide ? &DotsOf<Value, uint16_t> : &DotsOf<Value, uint8_t>;
}

bool Vector(const Weight& w, const Operands& ops, const Task& task) {
  const DotsLoop dots = w.type == Type::kF32    ? DotsOfValue<float>(w)
                        : w.type == Type::kBF16 ? DotsOfValue<BF16>(w)
                                                : DotsOfValue<int8_t>(w);
  for (int64_t first = task.first; first < task.last; first += kChecked) {
    const int64_t last = std::min(first + kChecked, task.last);
    if (!SoundTiles(w, first, last)) return false;
    dots(w, ops, {0, 1, first, last});
  }
  return true;
}

}  // namespace
}  // namespace jaxprune
