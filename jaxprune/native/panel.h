// The product with a panel of positions.
#pragma once

#include <algorithm>
#include <type_traits>

#include "codes.h"
#include "finish.h"
#include "kernels.h"
#include "pack.h"
#include "trust.h"
#include "vectors.h"

namespace jaxprune {
namespace {

constexpr int64_t kSums = 512;  // outputs whose sums are kept at once: with 64 columns 128 KiB of second-level cache

// A value of the weight, to be multiplied by vectors of the panel.
template <class Value, int kWidth>
struct TimesPanel {
  using V = typename Floats<kWidth>::Type;
  static constexpr int kWidest = kLanes;
  float value;

  explicit TimesPanel(Value from) : value(Widen(from)) {}
  void AddTo(V& sum, V x) const { sum += value * x; }
};

template <int kWidth>
struct TimesPanel<FourCodes, kWidth> : TimesCodes<kWidth> {
  using TimesCodes<kWidth>::TimesCodes;
  static constexpr int kWidest = kCodeLanes;
};

// One tile's runs times its packed panel of kVecs vectors of kWidth floats a row. Sums stay in registers for a run, and
// come from and go to `sums`, which the second-level cache holds. A group's outputs share the loads from the panel.
template <class Value, class Index, int kOutputs, int kWidth, int kVecs>
void Runs(const Weight& w, int64_t tile, int64_t first, int64_t last, const float* panel, float* sums, int64_t stride) {
  using Times = TimesPanel<Value, kWidth>;
  using V = typename Times::V;
  constexpr int kSets = kOutputs * kVecs >= 4 ? 1 : kVecs == 1 ? 4 : 2;  // so that additions do not wait for each other
  const Value* values = static_cast<const Value*>(w.values);
  const Index* index = static_cast<const Index*>(w.index);
  const int32_t* bounds = w.bounds + tile * (w.groups() + 1);
  for (int64_t g = first; g < last; ++g, sums += kOutputs * stride) {
    V sum[kSets][kOutputs][kVecs] = {};
    if (tile > 0) {
      for (int o = 0; o < kOutputs; ++o) {
        for (int v = 0; v < kVecs; ++v) sum[0][o][v] = *reinterpret_cast<const V*>(sums + o * stride + v * kWidth);
      }
    }
    const auto add = [&](int32_t i, V(&to)[kOutputs][kVecs]) {
      const float* row = panel + int64_t{index[i]} * stride;
      for (int o = 0; o < kOutputs; ++o) {
        const Times value(values[int64_t{i} * kOutputs + o]);
        for (int v = 0; v < kVecs; ++v) value.AddTo(to[o][v], *reinterpret_cast<const V*>(row + v * kWidth));
      }
    };
    int32_t i = bounds[g];
    for (; i + kSets <= bounds[g + 1]; i += kSets) {
      for (int s = 0; s < kSets; ++s) add(i + s, sum[s]);
    }
    for (; kSets > 1 && i < bounds[g + 1]; ++i) add(i, sum[0]);
    for (int o = 0; o < kOutputs; ++o) {
      for (int v = 0; v < kVecs; ++v) {
        V total = sum[0][o][v];
        for (int s = 1; s < kSets; ++s) total += sum[s][o][v];
        *reinterpret_cast<V*>(sums + o * stride + v * kWidth) = total;
      }
    }
  }
}

// A panel of kUnits units, in parts whose sums fit the registers.
template <class Value, class Index, int kOutputs, int kUnits>
void TileTimesPanel(const Weight& w, int64_t tile, int64_t first, int64_t last, const float* panel, float* sums) {
  constexpr int kColumns = kUnits * kUnit, kWidest = TimesPanel<Value, kUnit>::kWidest;
  constexpr int kWidth = kColumns % kWidest == 0 ? kWidest : kUnit, kVecs = kColumns / kWidth;
  constexpr int kPart = kOutputs == 1 || VECTOR_BYTES == 64 ? kVecs : std::min(kVecs, 2);
  constexpr int kFull = kVecs / kPart * kPart, kRest = kVecs - kFull;
  for (int v = 0; v < kFull; v += kPart) {
    Runs<Value, Index, kOutputs, kWidth, kPart>(w, tile, first, last, panel + v * kWidth, sums + v * kWidth, kColumns);
  }
  if constexpr (kRest > 0) {
    constexpr int kAt = kFull * kWidth;
    Runs<Value, Index, kOutputs, kWidth, kRest>(w, tile, first, last, panel + kAt, sums + kAt, kColumns);
  }
}

using TileLoop = void (*)(const Weight&, int64_t, int64_t, int64_t, const float*, float*);

template <class Value, class Index, int kOutputs, int kUnits = 1>
TileLoop LoopOfWidth(int64_t columns) {
  if constexpr (kUnits * kUnit > kPanel) {
    return nullptr;
  } else {
    return columns == kUnits * kUnit ? &TileTimesPanel<Value, Index, kOutputs, kUnits>
                                     : LoopOfWidth<Value, Index, kOutputs, kUnits + 1>(columns);
  }
}

template <class Value, class Index>
TileLoop LoopOfIndex(const Weight& w, int64_t columns) {
  if constexpr (!std::is_same_v<Value, FourCodes>) {
    if (w.group == kGroup) return LoopOfWidth<Value, Index, kGroup>(columns);
  }
  return LoopOfWidth<Value, Index, 1>(columns);
}

template <class Value>
TileLoop LoopOfValue(const Weight& w, int64_t columns) {
  return w.wide ? LoopOfIndex<Value, uint16_t>(w, columns) : LoopOfIndex<Value, uint8_t>(w, columns);
}

TileLoop LoopFor(const Weight& w, int64_t columns) {
  return w.type == Type::kF32     ? LoopOfValue<float>(w, columns)
         : w.type == Type::kBF16  ? LoopOfValue<BF16>(w, columns)
         : w.type == Type::kCodes ? LoopOfValue<FourCodes>(w, columns)
                                  : LoopOfValue<int8_t>(w, columns);
}

// Groups that are worked on at once. One tile needs no sums between tiles, so they stay in the first level.
int64_t GroupsAtOnce(const Weight& w, int64_t groups) {
  return std::min(groups, (w.n_tiles == 1 ? int64_t{64} : kSums) / w.group);
}

int64_t PanelRows(const Weight& w, int64_t groups) {
  return GroupsAtOnce(w, groups) < groups ? w.n_in : std::min(w.tile, w.n_in);
}

int64_t ScratchFloats(const Weight& w, const Window& win, int64_t count, int64_t groups) {
  const int64_t beyond = kLanes;  // what is read as whole vectors, but not used
  const int64_t largest = win.pool() > 1 ? groups * w.group : 0;
  return (PanelRows(w, groups) + GroupsAtOnce(w, groups) * w.group + largest) * Columns(count) + beyond;
}

// Scales sums of outputs [first, last), and keeps the largest; a NaN counts as larger than all.
void KeepLargest(const Weight& w, int64_t first, int64_t last, bool none_yet, const float* sums, int64_t columns,
                 float* largest) {
  for (int64_t o = first; o < last; ++o, sums += columns, largest += columns) {
    const float scale = w.scale ? w.scale[o] : 1.0f;
    for (int64_t p = 0; p < columns; ++p) {
      const float sum = sums[p] * scale, other = none_yet ? sum : largest[p];
      largest[p] = !(other < sum) && sum == sum ? other : sum;
    }
  }
}

template <class X, class Y>
bool PanelProduct(const Weight& w, const Window& win, const Operands& ops, const Task& task, float* scratch) {
  if (!SoundTiles(w, task.first, task.last)) return false;
  const int64_t columns = Columns(task.count), groups = task.last - task.first;
  const int64_t at_once = GroupsAtOnce(w, groups);
  const bool keep = at_once < groups;  // the packed tiles, for the next groups
  float* sums = scratch + PanelRows(w, groups) * columns;
  float* largest = sums + at_once * w.group * columns;
  Segment<X> segments[kPanel];
  const TileLoop loop = LoopFor(w, columns);
  const float outside = w.codes ? FourTimes(w.codes->x.zero) : 0.0f;
  for (int64_t i = 0; i < win.pool(); ++i) {
    const Window part = win.Neighbour(i);
    const int64_t n_segments = FindSegments(part, static_cast<const X*>(ops.x), task, segments);
    for (int64_t first = task.first; first < task.last; first += at_once) {
      const int64_t last = std::min(first + at_once, task.last);
      if (w.n_tiles == 0) std::fill_n(sums, (last - first) * w.group * columns, 0.0f);
      for (int64_t tile = 0; tile < w.n_tiles; ++tile) {
        float* panel = scratch + (keep ? tile * w.tile * columns : 0);
        if (first == task.first || !keep) {
          PackTile(w, part, segments, n_segments, tile, columns, outside, panel);
        }
        loop(w, tile, first, last, panel, sums);
      }
      if (w.codes) FloatsOfSums(*w.codes, first, last, columns, sums);
      if (win.pool() == 1) {
        WriteOut<Y>(w, ops, task, first * w.group, last * w.group, sums, columns);
      } else {
        float* to = largest + (first - task.first) * w.group * columns;
        KeepLargest(w, first * w.group, last * w.group, i == 0, sums, columns, to);
      }
    }
  }
  if (win.pool() > 1) {
    Weight scaled = w;
    scaled.scale = nullptr;
    WriteOut<Y>(scaled, ops, task, task.first * w.group, task.last * w.group, largest, columns);
  }
  return true;
}

bool Panel(const Weight& w, const Window& win, const Operands& ops, const Task& task, float* scratch) {
  const bool x_wide = ops.x_type == Type::kF32, y_wide = ops.y_type == Type::kF32;
  return (x_wide ? (y_wide ? &PanelProduct<float, float> : &PanelProduct<float, BF16>)
                 : (y_wide ? &PanelProduct<BF16, float> : &PanelProduct<BF16, BF16>))(w, win, ops, task, scratch);
}

}  // namespace
}  // namespace jaxprune
