// The loops. Compiled once for each instruction set: KERNELS names the table, VECTOR_BYTES the width of a vector.
#include "kernels.h"

#include <algorithm>
#include <cstring>

#include "vectors.h"

namespace jaxprune {
namespace {

constexpr int kMaxVecs = VECTOR_BYTES == 64 ? 4 : 8;
constexpr int kPanel = kMaxVecs * kLanes;
// Columns of a panel come in units. Wide vectors are also used by half, since then a panel takes less of the cache.
constexpr int kUnit = VECTOR_BYTES == 64 ? kLanes / 2 : kLanes;
constexpr int64_t kSums = 512;  // outputs whose sums are kept at once: with 64 columns 128 KiB of second-level cache

int64_t Columns(int64_t count) { return (count + kUnit - 1) / kUnit * kUnit; }

// ---- what may be trusted ----

template <class Index>
bool Within(const Index* index, int64_t n, int64_t rows) {
  Index largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, index[i]);
  return n <= 0 || largest < rows;
}

// Whether the runs of groups [first, last) of a tile stay within the index, and the index within the tile.
bool Sound(const Weight& w, int64_t tile, int64_t first, int64_t last) {
  const int32_t* bounds = w.bounds + tile * (w.groups() + 1);
  bool climbs = bounds[first] >= 0 && bounds[last] <= w.inputs;
  for (int64_t g = first; g < last; ++g) climbs &= bounds[g] <= bounds[g + 1];
  if (!climbs) return false;
  const int64_t rows = std::min(w.tile, w.n_in - tile * w.tile), begin = bounds[first], n = bounds[last] - begin;
  return w.wide ? Within(static_cast<const uint16_t*>(w.index) + begin, n, rows)
                : Within(static_cast<const uint8_t*>(w.index) + begin, n, rows);
}

bool SoundTiles(const Weight& w, int64_t first, int64_t last) {
  for (int64_t tile = 0; tile < w.n_tiles; ++tile) {
    if (!Sound(w, tile, first, last)) return false;
  }
  return true;
}

// ---- activations in: (position, channel) -> panel rows (input, position) ----

// Neighbours in one row of the result: positions [first, first + count) of a panel, and the corner of the first's window.
template <class X>
struct Segment {
  const X* image;
  int64_t h, w, first, count;
};

// Segments are at most as many as positions.
template <class X>
int64_t FindSegments(const Window& win, const X* x, const Task& task, Segment<X>* segments) {
  const int64_t plane = win.out_height * win.out_width;
  int64_t n = 0;
  for (int64_t p = 0; p < task.count; p += segments[n++].count) {
    const int64_t position = task.position + p, image = position / plane, pixel = position % plane;
    const int64_t row = pixel / win.out_width, column = pixel % win.out_width;
    segments[n] = {x + image * win.height * win.width * win.channels, row * win.stride_h - win.pad_top,
                   column * win.stride_w - win.pad_left, p, std::min(win.out_width - column, task.count - p)};
  }
  return n;
}

// Calls visit(first position, count, activation of the first, step to the next) for what one tap of the window, `dh` and
// `dw` from its corner, sees of the image; elsewhere it sees zeros.
template <class X, class Visit>
void EachInside(const Window& win, const Segment<X>* segments, int64_t n, int64_t dh, int64_t dw, const Visit& visit) {
  const int64_t step = win.stride_w;
  for (const Segment<X>* s = segments; s < segments + n; ++s) {
    const int64_t h = s->h + dh, w = s->w + dw;
    const int64_t begin = w < 0 ? (step - 1 - w) / step : 0;
    const int64_t end = w < win.width ? std::min(s->count, (win.width - 1 - w) / step + 1) : 0;
    if (h < 0 || h >= win.height || begin >= end) continue;
    visit(s->first + begin, end - begin, s->image + (h * win.width + w + begin * step) * win.channels, step * win.channels);
  }
}

// Rows of the panel for `squares` whole vectors of channels; rows[p] is where position p's channels begin, null for zeros.
template <class X>
void PackSquares(const X* const* rows, int64_t squares, int64_t columns, float* panel) {
  for (int64_t c = 0; c < squares * kLanes; c += kLanes) {
    for (int64_t p = 0; p < columns; p += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = rows[p + i] ? Load(rows[p + i] + c) : Vec{};
      Transpose(square);
      float* to = panel + c * columns + p;
      if (p + kLanes <= columns) {
        for (int i = 0; i < kLanes; ++i) Store(to + i * columns, square[i]);
      } else {
        for (int i = 0; i < kLanes; ++i) std::memcpy(to + i * columns, &square[i], kUnit * sizeof(float));
      }
    }
  }
}

template <class X>
void PackTile(const Weight& w, const Window& win, const Segment<X>* segments, int64_t n_segments, int64_t tile,
              int64_t columns, float* panel) {
  const int64_t begin = tile * w.tile, end = std::min(begin + w.tile, w.n_in);
  for (int64_t r = begin; r < end;) {
    const int64_t tap = r / win.channels, first = r % win.channels, n = std::min(win.channels - first, end - r);
    const int64_t dh = tap / win.kernel_width * win.dilation_h, dw = tap % win.kernel_width * win.dilation_w;
    const int64_t squares = n / kLanes;
    float* rows_of_panel = panel + (r - begin) * columns;
    if (squares) {
      const X* rows[kPanel] = {};
      EachInside(win, segments, n_segments, dh, dw, [&](int64_t p, int64_t count, const X* from, int64_t step) {
        for (int64_t i = 0; i < count; ++i) rows[p + i] = from + i * step + first;
      });
      PackSquares(rows, squares, columns, rows_of_panel);
    }
    for (int64_t c = squares * kLanes; c < n; ++c) {
      float* row = rows_of_panel + c * columns;
      std::fill_n(row, columns, 0.0f);
      EachInside(win, segments, n_segments, dh, dw, [&](int64_t p, int64_t count, const X* from, int64_t step) {
        from += first + c;
        if (step == 1) {
          for (int64_t i = 0; i < count; ++i) row[p + i] = Widen(from[i]);
        } else {
          for (int64_t i = 0; i < count; ++i) row[p + i] = Widen(from[i * step]);
        }
      });
    }
    r += n;
  }
}

// ---- the product ----

// One tile's runs times its packed panel of kVecs vectors of kWidth floats a row. Sums stay in registers for a run, and come from and go
// to `sums`, which the second-level cache holds. A group's outputs share the loads from the panel.
template <class Value, class Index, int kOutputs, int kWidth, int kVecs>
void Runs(const Weight& w, int64_t tile, int64_t first, int64_t last, const float* panel, float* sums, int64_t stride) {
  using V = typename Floats<kWidth>::Type;
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
        const float value = Widen(values[int64_t{i} * kOutputs + o]);
        for (int v = 0; v < kVecs; ++v) to[o][v] += value * *reinterpret_cast<const V*>(row + v * kWidth);
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
  constexpr int kColumns = kUnits * kUnit;
  constexpr int kWidth = kColumns % kLanes == 0 ? kLanes : kUnit, kVecs = kColumns / kWidth;
  constexpr int kPart = kOutputs == 1 || VECTOR_BYTES == 64 ? kVecs : std::min(kVecs, 2);
  constexpr int kFull = kVecs / kPart * kPart, kRest = kVecs - kFull;
  for (int v = 0; v < kFull; v += kPart) {
    Runs<Value, Index, kOutputs, kWidth, kPart>(w, tile, first, last, panel + v * kWidth, sums + v * kWidth, kColumns);
  }
  if constexpr (kRest > 0) {
    Runs<Value, Index, kOutputs, kWidth, kRest>(w, tile, first, last, panel + kFull * kWidth, sums + kFull * kWidth, kColumns);
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
  return w.group == 1 ? LoopOfWidth<Value, Index, 1>(columns) : LoopOfWidth<Value, Index, kGroup>(columns);
}

template <class Value>
TileLoop LoopOfValue(const Weight& w, int64_t columns) {
  return w.wide ? LoopOfIndex<Value, uint16_t>(w, columns) : LoopOfIndex<Value, uint8_t>(w, columns);
}

TileLoop LoopFor(const Weight& w, int64_t columns) {
  return w.type == Type::kF32    ? LoopOfValue<float>(w, columns)
         : w.type == Type::kBF16 ? LoopOfValue<BF16>(w, columns)
                                 : LoopOfValue<int8_t>(w, columns);
}

// ---- sums out: (output, position) -> (position, output), and what is done to them on the way ----

template <class Y>
void Finish(float sum, const Weight& w, const Operands& ops, int64_t position, int64_t o) {
  if (w.scale) sum *= w.scale[o];
  if (ops.bias) sum += ops.bias[o];
  const int64_t at = position * w.n_out + o;
  if (ops.residual) sum += Widen(static_cast<const Y*>(ops.residual)[at]);
  Narrow(ops.relu && !(sum > 0) && sum == sum ? 0.0f : sum, static_cast<Y*>(ops.y) + at);
}

template <class Y>
void FinishVec(Vec sum, const Weight& w, const Operands& ops, int64_t position, int64_t o) {
  if (w.scale) sum *= Load(w.scale + o);
  if (ops.bias) sum += Load(ops.bias + o);
  const int64_t at = position * w.n_out + o;
  if (ops.residual) sum += Load(static_cast<const Y*>(ops.residual) + at);
  if (ops.relu) sum = (Vec)((Bits)sum & ~(Bits)(sum <= 0));  // a NaN stays one
  Store(static_cast<Y*>(ops.y) + at, sum);
}

template <class Y>
void WriteOut(const Weight& w, const Operands& ops, const Task& task, int64_t first, int64_t last, const float* sums) {
  const int64_t stride = Columns(task.count);
  int64_t o = first;
  for (; o + kLanes <= last; o += kLanes) {
    for (int64_t p = 0; p < task.count; p += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = Load(sums + (o - first + i) * stride + p);
      Transpose(square);
      const int64_t n = std::min<int64_t>(kLanes, task.count - p);
      for (int64_t i = 0; i < n; ++i) FinishVec<Y>(square[i], w, ops, task.position + p + i, o);
    }
  }
  for (; o < last; ++o) {
    for (int64_t p = 0; p < task.count; ++p) {
      Finish<Y>(sums[(o - first) * stride + p], w, ops, task.position + p, o);
    }
  }
}

// ---- the whole of it ----

// Groups that are worked on at once. One tile needs no sums between tiles, so they stay in the first level.
int64_t GroupsAtOnce(const Weight& w, int64_t groups) {
  return std::min(groups, (w.n_tiles == 1 ? int64_t{64} : kSums) / w.group);
}

int64_t PanelRows(const Weight& w, int64_t groups) {
  return GroupsAtOnce(w, groups) < groups ? w.n_in : std::min(w.tile, w.n_in);
}

int64_t ScratchFloats(const Weight& w, int64_t count, int64_t groups) {
  const int64_t beyond = kLanes;  // what is read as whole vectors, but not used
  return (PanelRows(w, groups) + GroupsAtOnce(w, groups) * w.group) * Columns(count) + beyond;
}

template <class X, class Y>
bool PanelProduct(const Weight& w, const Window& win, const Operands& ops, const Task& task, float* scratch) {
  if (!SoundTiles(w, task.first, task.last)) return false;
  const int64_t columns = Columns(task.count), groups = task.last - task.first;
  const int64_t at_once = GroupsAtOnce(w, groups);
  const bool keep = at_once < groups;  // the packed tiles, for the next groups
  float* sums = scratch + PanelRows(w, groups) * columns;
  Segment<X> segments[kPanel];
  const int64_t n_segments = FindSegments(win, static_cast<const X*>(ops.x), task, segments);
  const TileLoop loop = LoopFor(w, columns);
  for (int64_t first = task.first; first < task.last; first += at_once) {
    const int64_t last = std::min(first + at_once, task.last);
    if (w.n_tiles == 0) std::fill_n(sums, (last - first) * w.group * columns, 0.0f);
    for (int64_t tile = 0; tile < w.n_tiles; ++tile) {
      float* panel = scratch + (keep ? tile * w.tile * columns : 0);
      if (first == task.first || !keep) PackTile(w, win, segments, n_segments, tile, columns, panel);
      loop(w, tile, first, last, panel, sums);
    }
    WriteOut<Y>(w, ops, task, first * w.group, last * w.group, sums);
  }
  return true;
}

bool Panel(const Weight& w, const Window& win, const Operands& ops, const Task& task, float* scratch) {
  const bool x_wide = ops.x_type == Type::kF32, y_wide = ops.y_type == Type::kF32;
  return (x_wide ? (y_wide ? &PanelProduct<float, float> : &PanelProduct<float, BF16>)
                 : (y_wide ? &PanelProduct<BF16, float> : &PanelProduct<BF16, BF16>))(w, win, ops, task, scratch);
}

// ---- one position ----

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

const Kernels KERNELS = {&Panel, &ScratchFloats, &Vector, ISA_NAME, kUnit, kPanel};

}  // namespace jaxprune
