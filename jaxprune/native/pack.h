// Activations in: (position, channel) -> rows of a panel (input, position).
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "vectors.h"

namespace jaxprune {
namespace {

constexpr int kMaxVecs = VECTOR_BYTES == 64 ? 4 : 8;
constexpr int kPanel = kMaxVecs * kLanes;
// Columns of a panel come in units. Wide vectors are also used by half, since then a panel takes less of the cache.
constexpr int kUnit = VECTOR_BYTES == 64 ? kLanes / 2 : kLanes;

int64_t Columns(int64_t count) { return (count + kUnit - 1) / kUnit * kUnit; }

// Neighbours in a row of the result: positions [first, first + count) of a panel, and the corner of the first's window.
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

// Calls visit(first position, count, activation of the first, step to the next) for what one tap of the window, `dh`
// and `dw` from its corner, sees of the image.
template <class X, class Visit>
void EachInside(const Window& win, const Segment<X>* segments, int64_t n, int64_t dh, int64_t dw, const Visit& visit) {
  const int64_t step = win.stride_w;
  for (const Segment<X>* s = segments; s < segments + n; ++s) {
    const int64_t h = s->h + dh, w = s->w + dw;
    const int64_t begin = w < 0 ? (step - 1 - w) / step : 0;
    const int64_t end = w < win.width ? std::min(s->count, (win.width - 1 - w) / step + 1) : 0;
    if (h < 0 || h >= win.height || begin >= end) continue;
    const X* from = s->image + (h * win.width + w + begin * step) * win.channels;
    visit(s->first + begin, end - begin, from, step * win.channels);
  }
}

// Rows of the panel for `squares` whole vectors of channels; rows[p] is where position p's channels begin, or null where
// they are all `outside`.
template <class X>
void PackSquares(const X* const* rows, int64_t squares, int64_t columns, float outside, float* panel) {
  for (int64_t c = 0; c < squares * kLanes; c += kLanes) {
    for (int64_t p = 0; p < columns; p += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = rows[p + i] ? Load(rows[p + i] + c) : Filled(outside);
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
              int64_t columns, float outside, float* panel) {
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
      PackSquares(rows, squares, columns, outside, rows_of_panel);
    }
    for (int64_t c = squares * kLanes; c < n; ++c) {
      float* row = rows_of_panel + c * columns;
      std::fill_n(row, columns, outside);
      EachInside(win, segments, n_segments, dh, dw, [&](int64_t p, int64_t count, const X* from, int64_t step) {
        from += first + c;
        if (step == 1) {
          for (int64_t i = 0; i < count; ++i) row[p + i] = Widen(from[i]);
        } else if (step == 2) {
          for (int64_t i = 0; i < count; ++i) row[p + i] = Widen(from[2 * i]);
        } else {
          for (int64_t i = 0; i < count; ++i) row[p + i] = Widen(from[i * step]);
        }
      });
    }
    r += n;
  }
}

}  // namespace
}  // namespace jaxprune
