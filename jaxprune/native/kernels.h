// A weight in tiles, a window over the activations, and the loops over both; one set of loops for each instruction set.
#pragma once

#include <cstdint>

namespace jaxprune {

enum class Type { kF32, kBF16, kS8, kF16, kCodes };

constexpr int64_t kGroup = 4;  // outputs of a group, where it is not a single one
constexpr int64_t kWord = 64;  // inputs whose bits lie in a word
constexpr int64_t kRun = 4;  // inputs whose codes lie in 32 bits
constexpr int64_t kRowsAtOnce = 8;  // of activations, for which a weight of bits is read once

// What any weight W (out, in) has.
struct Stored {
  const void* values;  // f32, bf16, f16, or s8 to be multiplied by `scale`
  const float* scale;  // of every output, or null
  Type type;
  int64_t n_in, n_out;
};

// W with a bit for each weight, set where it is stored, and the stored ones by output and then by input; those of output
// o are values[bounds[o]] up to the next bound.
struct BitWeight : Stored {
  const uint8_t* bits;  // (out, words) words of 64 bits, little endian; those beyond the last input are not set
  const int32_t* bounds;
  int64_t stored;

  int64_t words() const { return (n_in + kWord - 1) / kWord; }
};

// Some rows of activations, as the loops over bits read them.
struct BitInputs {
  void* data;  // a word of inputs takes 4 * kWord bytes, a row those of all its words
  int64_t row, rows;  // at most kRowsAtOnce
  double unit[kRowsAtOnce];  // of integers
  bool finite;  // false: the data say nothing, since no zero may meet what they would say
};

// Activations are scale * (code - zero), with codes from 0 to 255.
struct Grid {
  float scale;
  int32_t zero;
};

// What products of codes need besides: the grid of x, and w = scale * code with codes of weights from -128 to 127.
struct Codes {
  Grid x;
  const float* scale;     // of every output
  const int32_t* totals;  // of the codes of every output
};

// W (out, in), cut into tiles of `tile` inputs, its outputs in groups of `group` that share their inputs. The non-zeros
// lie tile by tile, within a tile group by group, within a group by input, and there side by side for the group's
// outputs; the inputs of tile t and group g are index[bounds[t * (groups + 1) + g]] up to the next bound.
//
// Of type kCodes an input is a run of kRun neighbours: its value is their codes side by side, and so is an activation,
// which everything but the product itself moves as if it were a float.
struct Weight : Stored {  // values of any type but f16
  const void* index;      // input, counted from the tile's first; u8, or u16 if `wide`
  const int32_t* bounds;
  bool wide;
  int64_t tile, n_tiles, group;
  int64_t inputs;  // length of `index`; there are `group` values for each
  const Codes* codes = nullptr;  // of type kCodes, which has no `scale` then

  int64_t groups() const { return n_out / group; }
};

// Where the inputs of an output position are: input (kh, kw, c) of position (image, oh, ow) is the activation at
// (image, oh * stride - pad + kh * dilation, ..., c), or 0 outside. A matrix product is a window of 1 x 1 over one
// image with the batch for a row.
struct Window {
  int64_t images = 0, height = 1, width = 1, channels = 0;
  int64_t out_height = 1, out_width = 1;
  int64_t kernel_height = 1, kernel_width = 1;
  int64_t stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0, dilation_h = 1, dilation_w = 1;
  int64_t pool_h = 1, pool_w = 1;  // neighbours of which the result is the largest; out_height and out_width are pools

  int64_t positions() const { return images * out_height * out_width; }
  int64_t pool() const { return pool_h * pool_w; }

  // What the i-th neighbours of all pools see.
  Window Neighbour(int64_t i) const {
    Window window = *this;
    window.pad_top -= i / pool_w * stride_h;
    window.pad_left -= i % pool_w * stride_w;
    window.stride_h *= pool_h;
    window.stride_w *= pool_w;
    window.pool_h = window.pool_w = 1;
    return window;
  }
};

// y = relu(pool(scale * (W @ x)) + bias + residual), all but W @ x optional; x, y and residual have channels last.
struct Operands {
  const void* x;
  void* y;  // of panels null where only `codes` are wanted
  const float* bias;
  const void* residual;  // of the type of y
  Type x_type, y_type;   // f32 or bf16
  bool relu;
  uint8_t* codes = nullptr;  // of y besides, each position's in whole runs, or null; panels alone have them
  Grid grid = {1, 0};        // of these
};

// A share of the work: positions [position, position + count), count <= the kernels' `panel_columns`, and groups of
// outputs [first, last).
struct Task {
  int64_t position, count, first, last;
};

// Rows of activations, or of the derivatives of a result: f32 or bf16, (rows, channels).
struct Rows {
  const void* data;
  Type type;
  int64_t channels;
};

// Rows of inputs and of outputs as (channel, row), panel after panel of `columns` rows each but the last, whose rows
// make whole vectors.
struct Panels {
  const float *x, *y;
  int64_t rows, columns;
  bool add;  // to what is there already
};

struct Kernels {
  // Computes a task; false if the weight's indices or bounds would lead outside, and nothing is read or written there.
  bool (*panel)(const Weight&, const Window&, const Operands&, const Task&, float* scratch);
  // Floats of scratch that `panel` needs for tasks of up to `count` positions and `groups` groups of outputs.
  int64_t (*scratch)(const Weight&, const Window&, int64_t count, int64_t groups);
  // The same for a single position of a matrix product; only `first` and `last` of the task count.
  bool (*vector)(const Weight&, const Operands&, const Task&);
  // The same for rows of a matrix product with a weight of bits, whose data have been allocated; what of them fits
  // `BitInputs`, by the first, and outputs [first, last), by the second.
  void (*arrange)(const BitWeight&, const Operands&, BitInputs*);
  bool (*bits)(const BitWeight&, const Operands&, const BitInputs&, int64_t first, int64_t last);
  // The part of x W, without scales, that outputs [first, last) have in it, for up to kRowsAtOnce rows of x (rows, out):
  // sums (rows, inputs of whole words). `finite` says whether x is.
  bool (*transposed)(const BitWeight&, const float* x, float* sums, int64_t rows, bool finite, int64_t first,
                     int64_t last);
  // Codes of pixels [first, last) of x, each of so many channels in whole runs; what is beyond the last is the code of 0.
  void (*encode)(const void* x, Type type, int64_t channels, const Grid&, int64_t first, int64_t last, uint8_t* codes);
  // Channels [first, last) of rows [row, row + count), count <= `panel_columns`, to their place in a panel.
  void (*lay)(const Rows&, int64_t row, int64_t count, int64_t first, int64_t last, float* panel);
  // Sums over all rows of products of an input and an output, for each non-zero of a tile's outputs [first, last); of the
  // weight there are indices and bounds, and no values. False as of `panel`.
  bool (*sampled)(const Weight&, int64_t tile, int64_t first, int64_t last, const Panels&, float* to);
  const char* name;
  int64_t unit, panel_columns;  // columns of a panel: a multiple of the first, at most the second
};

extern const Kernels kPortable;
#if defined(JAXPRUNE_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Vnni;
#endif

// The widest set this processor has, or the one that JAXPRUNE_ISA names ("portable", "avx2", "avx512",
// "avx512_vnni") if it has it.
const Kernels& BestKernels();

}  // namespace jaxprune
