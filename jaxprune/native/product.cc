// The product W @ x, and the convolution, as an XLA custom call: checks what it is handed, cuts the work up, and runs
// it on XLA's own threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <string>

#include "kernels.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxprune {

#if defined(JAXPRUNE_X86)
namespace {

bool HasVnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace
#endif

const Kernels& BestKernels() {
  static const Kernels* best = [] {
    const char* wish = std::getenv("JAXPRUNE_ISA");
    const Kernels* sets[] = {
#if defined(JAXPRUNE_X86)
        HasVnni() ? &kAvx512Vnni : nullptr,
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") ? &kAvx512 : nullptr,
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? &kAvx2
                                                                                                           : nullptr,
#endif
        &kPortable};
    for (const Kernels* set : sets) {
      if (set && wish && std::strcmp(wish, set->name) == 0) return set;
    }
    for (const Kernels* set : sets) {
      if (set) return set;
    }
    return &kPortable;
  }();
  return *best;
}

namespace {

constexpr int64_t kAlign = 64;
// Below this many multiply-adds of whole vectors a task is done before another thread is awake.
constexpr int64_t kWorthAThread = 1 << 13;

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeepScratch = false;  // a product's own, so that no byte beyond it goes unseen
#else
constexpr bool kKeepScratch = true;
#endif

struct DeleteAligned {
  void operator()(float* floats) const { ::operator delete[](floats, std::align_val_t{kAlign}); }
};

// This thread's scratch, on a cache line's boundary, or null where there is no memory; kept, since fresh pages cost
// more than many a product.
float* Scratch(int64_t floats) {
  thread_local std::unique_ptr<float, DeleteAligned> kept;
  thread_local int64_t size = 0;
  if (floats > size || !kKeepScratch) {
    kept.reset();
    kept.reset(static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t{kAlign}, std::nothrow)));
    size = kept ? floats : 0;
  }
  return kept.get();
}

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The part of [0, n) that is i's of `parts`.
std::pair<int64_t, int64_t> Part(int64_t n, int64_t parts, int64_t i) {
  const int64_t each = n / parts, rest = n % parts;
  return {each * i + std::min(i, rest), each * (i + 1) + std::min(i + 1, rest)};
}

int64_t Threads(const ffi::ThreadPool& pool) { return std::max<int64_t>(pool.num_threads(), 1); }

// Into how many parts the outputs of a product with so many weights are cut, at most `most`.
int64_t PartsOfOutputs(int64_t weights, int64_t n_out, int64_t most) {
  return weights < 2 * kWorthAThread ? 1 : std::clamp<int64_t>(n_out / 64, 1, most);
}

constexpr char kOutside[] = "`index` or `bounds` lead outside of the weight";
constexpr char kNoRoom[] = "no memory for `x` and `y`";
constexpr char kNoMemory[] = "no memory for the inputs that `x` and `window` make";

// What is wrong, or null; the same of `PanelProduct`.
const char* VectorProduct(ffi::ThreadPool& pool, const Kernels& kernels, const Weight& w, const Operands& ops) {
  const int64_t parts = PartsOfOutputs(w.inputs * w.group, w.n_out, 4 * Threads(pool));
  std::atomic<const char*> wrong{nullptr};
  ForEach(pool, parts, [&](int64_t i) {
    const auto [first, last] = Part(w.groups(), parts, i);
    if (!kernels.vector(w, ops, {0, 1, first, last})) wrong = kOutside;
  });
  return wrong;
}

const char* BitProduct(ffi::ThreadPool& pool, const Kernels& kernels, const BitWeight& w, const Operands& ops,
                       int64_t rows) {
  const int64_t parts = PartsOfOutputs(w.stored, w.n_out, 4 * Threads(pool));
  float* scratch = Scratch(std::min(rows, kRowsAtOnce) * w.words() * kWord);
  if (!scratch) return kNoMemory;
  std::atomic<const char*> wrong{nullptr};
  for (int64_t row = 0; row < rows && !wrong; row += kRowsAtOnce) {
    BitInputs in{scratch, row, std::min(rows - row, kRowsAtOnce), {}, true};
    kernels.arrange(w, ops, &in);
    ForEach(pool, parts, [&](int64_t i) {
      const auto [first, last] = Part(w.n_out, parts, i);
      if (!kernels.bits(w, ops, in, first, last)) wrong = kOutside;
    });
  }
  return wrong;
}

// y = x W for x (rows, out): every thread adds up its outputs' part, and the parts are added.
const char* TransposedProduct(ffi::ThreadPool& pool, const Kernels& kernels, const BitWeight& w, const float* x,
                              float* y, int64_t rows) {
  const int64_t parts = PartsOfOutputs(w.stored, w.n_out, Threads(pool));
  const int64_t stride = w.words() * kWord, most = std::min(rows, kRowsAtOnce);
  float* scratch = Scratch(most * (parts * stride + w.n_out));
  if (!scratch) return kNoMemory;
  std::atomic<const char*> wrong{nullptr};
  for (int64_t row = 0; row < rows && !wrong; row += kRowsAtOnce) {
    const int64_t count = std::min(rows - row, kRowsAtOnce);
    float* scaled = scratch + most * parts * stride;
    bool finite = true;
    for (int64_t i = 0; i < count * w.n_out; ++i) {
      scaled[i] = x[row * w.n_out + i] * (w.scale ? w.scale[i % w.n_out] : 1.0f);
      finite &= std::isfinite(scaled[i]);
    }
    ForEach(pool, parts, [&](int64_t i) {
      const auto [first, last] = Part(w.n_out, parts, i);
      if (!kernels.transposed(w, scaled, scratch + i * most * stride, count, finite, first, last)) wrong = kOutside;
    });
    for (int64_t r = 0; r < count && !wrong; ++r) {
      float* to = y + (row + r) * w.n_in;
      for (int64_t i = 0; i < w.n_in; ++i) {
        float sum = scratch[r * stride + i];
        for (int64_t part = 1; part < parts; ++part) sum += scratch[(part * most + r) * stride + i];
        to[i] = sum;
      }
    }
  }
  return wrong;
}

const char* PanelProduct(ffi::ThreadPool& pool, const Kernels& kernels, const Weight& w, const Window& window,
                         const Operands& ops) {
  const int64_t positions = window.positions(), units = CeilDiv(positions, kernels.unit);
  const double each = static_cast<double>(w.inputs * w.group + w.n_in) * window.pool();
  const double work = each * CeilDiv(positions, kernels.panel_columns / 4);
  const int64_t threads = work < 2 * kWorthAThread ? 1 : Threads(pool);
  const int64_t panels = CeilDiv(positions, kernels.panel_columns);
  // Panels are packed once for each split, so outputs are split only where panels alone leave threads idle.
  const int64_t splits = panels % threads == 0 || panels >= 8 * threads ? 1 : std::min(threads, w.groups());
  std::atomic<const char*> wrong{nullptr};
  ForEach(pool, panels * splits, [&](int64_t i) {
    // Whole units, the same number in every panel if it can be.
    const auto [from, to] = Part(units, panels, i / splits);
    const auto [first, last] = Part(w.groups(), splits, i % splits);
    const int64_t begin = from * kernels.unit, count = std::min(to * kernels.unit, positions) - begin;
    float* scratch = Scratch(kernels.scratch(w, window, count, last - first));
    if (!scratch) {
      wrong = kNoMemory;
    } else if (!kernels.panel(w, window, ops, {begin, count, first, last}, scratch)) {
      wrong = kOutside;
    }
  });
  return wrong;
}

// The codes of x, of so many pixels of so many channels.
void Encode(ffi::ThreadPool& pool, const Kernels& kernels, const void* x, Type type, int64_t pixels, int64_t channels,
            const Grid& grid, uint8_t* to) {
  const int64_t most = std::min(pixels, 4 * Threads(pool));
  const int64_t parts = std::clamp<int64_t>(pixels * channels / (4 * kWorthAThread), 1, std::max<int64_t>(most, 1));
  ForEach(pool, parts, [&](int64_t i) {
    const auto [first, last] = Part(pixels, parts, i);
    kernels.encode(x, type, channels, grid, first, last, to);
  });
}

constexpr int64_t kRowsLaid = 512;  // of x and y, for which indices are read once
constexpr int64_t kChannelsLaid = 256;

// For each non-zero of w the sum over the batch of its input of x times its output of y.
const char* SampledProduct(ffi::ThreadPool& pool, const Kernels& kernels, const Weight& w, const Rows& x, const Rows& y,
                           int64_t rows, float* to) {
  const int64_t columns = kernels.panel_columns, most = std::min(CeilDiv(rows, columns) * columns, kRowsLaid);
  float* scratch = Scratch(most * (w.n_in + w.n_out));
  if (!scratch) return kNoRoom;
  const int64_t blocks_of_x = CeilDiv(w.n_in, kChannelsLaid), blocks = blocks_of_x + CeilDiv(w.n_out, kChannelsLaid);
  const int64_t parts = PartsOfOutputs(w.inputs * rows / columns, w.n_out, CeilDiv(4 * Threads(pool), w.n_tiles));
  std::atomic<const char*> wrong{nullptr};
  for (int64_t row = 0; row < rows && !wrong; row += kRowsLaid) {
    const Panels panels{scratch, scratch + most * w.n_in, std::min(rows - row, kRowsLaid), columns, row > 0};
    ForEach(pool, CeilDiv(panels.rows, columns) * blocks, [&](int64_t i) {
      const int64_t block = i % blocks, from = i / blocks * columns;
      const bool of_x = block < blocks_of_x;
      const Rows& of = of_x ? x : y;
      const int64_t first = (of_x ? block : block - blocks_of_x) * kChannelsLaid;
      const int64_t last = std::min(first + kChannelsLaid, of.channels);
      float* panel = scratch + (of_x ? 0 : most * w.n_in) + from * of.channels;
      kernels.lay(of, row + from, std::min(columns, panels.rows - from), first, last, panel);
    });
    ForEach(pool, w.n_tiles * parts, [&](int64_t i) {
      const auto [first, last] = Part(w.n_out, parts, i % parts);
      if (!kernels.sampled(w, i / parts, first, last, panels, to)) wrong = kOutside;
    });
  }
  return wrong;
}

template <class Value>
bool Permute(const Value* values, const int32_t* order, int64_t first, int64_t last, int64_t n, Value* to) {
  for (int64_t i = first; i < last; ++i) {
    if (order[i] < 0 || order[i] >= n) return false;
    to[i] = values[order[i]];
  }
  return true;
}

// ---- what arrives ----

ffi::Error Refuse(const std::string& why) { return ffi::Error::InvalidArgument("jaxprune_product: " + why); }

bool TypeOf(const ffi::AnyBuffer& buffer, Type* type) {
  switch (buffer.element_type()) {
    case ffi::DataType::F32: *type = Type::kF32; return true;
    case ffi::DataType::BF16: *type = Type::kBF16; return true;
    case ffi::DataType::S8: *type = Type::kS8; return true;
    case ffi::DataType::F16: *type = Type::kF16; return true;
    default: return false;
  }
}

bool IsOfActivations(const ffi::AnyBuffer& buffer, Type* type) {
  return TypeOf(buffer, type) && (*type == Type::kF32 || *type == Type::kBF16);
}

// Sizes below are such that their products, and those with strides, stay far from 2^63.
constexpr int64_t kMostElements = int64_t{1} << 40, kMostStep = 1 << 20, kMostPool = 8;

// Whether no size is negative, and the product of those that are not 0 is at most kMostElements.
bool IsSized(ffi::Span<const int64_t> dimensions) {
  int64_t product = 1;
  for (int64_t n : dimensions) {
    if (n < 0 || (n > 0 && __builtin_mul_overflow(product, n, &product)) || product > kMostElements) return false;
  }
  return true;
}

std::string ReadSizes(std::initializer_list<std::pair<const char*, const ffi::AnyBuffer*>> buffers) {
  for (const auto& [name, buffer] : buffers) {
    if (!IsSized(buffer->dimensions())) return std::string(name) + " must be of at most 2^40 elements";
  }
  return "";
}

int64_t Count(const ffi::AnyBuffer& buffer) { return static_cast<int64_t>(buffer.element_count()); }

// The window's numbers, as `jaxprune.native` lays them out: kernel, stride, padding before, dilation, pool; of x
// and y the shapes say the rest. Empty for a matrix product.
std::string ReadWindow(ffi::Span<const int64_t> numbers, const ffi::AnyBuffer& x, const ffi::AnyBuffer& y,
                       Window* out) {
  const auto xs = x.dimensions(), ys = y.dimensions();
  if (numbers.size() == 0) {
    if (xs.size() != 2) return "`x` must be (batch, in)";
    if (ys.size() != 2) return "the result must be (batch, out)";
    out->images = 1;
    out->width = out->out_width = xs[0];
    out->channels = xs[1];
    return xs[0] == ys[0] ? "" : "`x` and the result must have the same batch";
  }
  if (numbers.size() != 10) return "`window` must have 10 numbers, or none";
  if (xs.size() != 4) return "`x` must be (batch, height, width, channels)";
  if (ys.size() != 4) return "the result must be (batch, height, width, out)";
  if (xs[0] != ys[0]) return "`x` and the result must have the same batch";
  for (int i = 0; i < 10; ++i) {
    const bool padding = i == 4 || i == 5, pool = i > 7;
    if (numbers[i] < (padding ? 0 : 1) || numbers[i] > (pool ? kMostPool : kMostStep)) return "`window` has a number out of range";
  }
  *out = {xs[0],      xs[1],      xs[2],      xs[3],      ys[1],      ys[2],     numbers[0],
          numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers[7], numbers[8], numbers[9]};
  constexpr int64_t kPixel[] = {1, 1, 1, 1, 0, 0, 1, 1, 1, 1};
  const bool each_pixel = std::equal(numbers.begin(), numbers.end(), kPixel);
  if (each_pixel && xs[1] == ys[1] && xs[2] == ys[2]) {  // long rows are packed faster
    out->width = out->out_width = out->positions();
    out->images = out->height = out->out_height = 1;
  }
  return "";
}

// `tile` of a weight whose `index` is a bit for each weight.
constexpr int64_t kBitmap = 0;

std::string ReadValues(const ffi::AnyBuffer& values, const ffi::AnyBuffer& bounds, const ffi::AnyBuffer& scale,
                       Stored* w) {
  if (bounds.element_type() != ffi::DataType::S32) return "`bounds` must be int32";
  if (Count(values) > INT32_MAX - 64) return "`values` must be fewer than 2^31 - 64";  // loops step beyond the last
  if (scale.element_type() != ffi::DataType::F32) return "`scale` must be float32";
  if (Count(scale) != 0 && Count(scale) != w->n_out) return "`scale` must have one number for each output, or none";
  w->values = values.untyped_data();
  w->scale = Count(scale) ? static_cast<const float*>(scale.untyped_data()) : nullptr;
  return "";
}

std::string ReadRuns(const ffi::AnyBuffer& index, const ffi::AnyBuffer& bounds, int64_t tile, int64_t group,
                     Weight* w) {
  const bool narrow = index.element_type() == ffi::DataType::U8;
  if (!narrow && index.element_type() != ffi::DataType::U16) return "`index` must be uint8 or uint16";
  const int64_t reach = narrow ? 256 : 65536;
  if (tile < 1 || tile > reach) return "`tile` must be in [1, 65536], and [1, 256] for an index of uint8";
  if (group != 1 && group != kGroup) return "`group` must be 1 or 4";
  if (w->n_out % group != 0) return "`group` must divide the outputs";
  w->n_tiles = CeilDiv(w->n_in, tile);
  w->group = group;
  int64_t n_bounds;
  const bool overflows = __builtin_mul_overflow(w->n_tiles, w->groups() + 1, &n_bounds);
  if (overflows || Count(bounds) != n_bounds) return "`bounds` must have ceil(in / tile) * (out / group + 1) numbers";
  w->index = index.untyped_data();
  w->bounds = static_cast<const int32_t*>(bounds.untyped_data());
  w->wide = !narrow;
  w->tile = tile;
  w->inputs = Count(index);
  return "";
}

std::string ReadWeight(const ffi::AnyBuffer& values, const ffi::AnyBuffer& index, const ffi::AnyBuffer& bounds,
                       const ffi::AnyBuffer& scale, int64_t tile, int64_t group, Weight* w) {
  if (!TypeOf(values, &w->type) || w->type == Type::kF16) return "`values` must be float32, bfloat16 or int8";
  if (std::string why = ReadValues(values, bounds, scale, w); !why.empty()) return why;
  if (std::string why = ReadRuns(index, bounds, tile, group, w); !why.empty()) return why;
  return Count(values) == Count(index) * group ? "" : "`values` must have `group` numbers for each of `index`";
}

std::string ReadGrid(const ffi::AnyBuffer& grid, const std::string& name, Grid* out) {
  if (grid.element_type() != ffi::DataType::F32 || Count(grid) != 2) return name + " must be two numbers of float32";
  const float* numbers = static_cast<const float*>(grid.untyped_data());
  const float scale = numbers[0], zero = numbers[1];
  if (!(scale > 0 && std::isfinite(scale) && zero >= -128 && zero <= 127 && zero == std::floor(zero))) {
    return name + " must be a scale above 0 and an integer of 8 bits";
  }
  *out = {scale, static_cast<int32_t>(zero) + 128};
  return "";
}

// Products of codes, positive and negative ones of the largest size, of which 32 bits surely hold the sum.
constexpr int64_t kMostTerms = INT32_MAX / (127 * 255);

// A weight of codes, whose inputs and whose window's channels become runs of kRun.
std::string ReadCodes(const ffi::AnyBuffer& values, const ffi::AnyBuffer& index, const ffi::AnyBuffer& bounds,
                      const ffi::AnyBuffer& scale, const ffi::AnyBuffer& totals, const ffi::AnyBuffer& grid,
                      int64_t tile, Window* window, Weight* w, Codes* codes) {
  const int64_t taps = window->kernel_height * window->kernel_width;
  int64_t terms;
  if (__builtin_mul_overflow(taps, window->channels, &terms) || terms > kMostTerms) {
    return "`x` and `window` must make at most 66311 inputs, whose sums 32 bits hold";
  }
  window->channels = CeilDiv(window->channels, kRun);
  w->n_in = taps * window->channels;
  if (values.element_type() != ffi::DataType::S8) return "`values` must be int8";
  if (std::string why = ReadValues(values, bounds, scale, w); !why.empty()) return why;
  if (std::string why = ReadRuns(index, bounds, tile, 1, w); !why.empty()) return why;
  if (Count(values) != Count(index) * kRun) return "`values` must have 4 numbers for each of `index`";
  if (Count(scale) != w->n_out) return "`scale` must have one number for each output";
  if (totals.element_type() != ffi::DataType::S32) return "`totals` must be int32";
  if (Count(totals) != w->n_out) return "`totals` must have one number for each output";
  if (std::string why = ReadGrid(grid, "`grid`", &codes->x); !why.empty()) return why;
  codes->scale = w->scale;
  codes->totals = static_cast<const int32_t*>(totals.untyped_data());
  w->type = Type::kCodes;
  w->scale = nullptr;
  w->codes = codes;
  return "";
}

std::string ReadBitWeight(const ffi::AnyBuffer& values, const ffi::AnyBuffer& index, const ffi::AnyBuffer& bounds,
                          const ffi::AnyBuffer& scale, int64_t group, BitWeight* w) {
  if (!TypeOf(values, &w->type)) return "`values` must be float32, bfloat16, float16 or int8";
  if (index.element_type() != ffi::DataType::U8) return "`index` must be uint8 for a `tile` of 0";
  if (std::string why = ReadValues(values, bounds, scale, w); !why.empty()) return why;
  if (group != 1) return "`group` must be 1 for a `tile` of 0";
  int64_t n_bytes;
  const bool overflows = __builtin_mul_overflow(w->words() * (kWord / 8), w->n_out, &n_bytes);
  if (overflows || Count(index) != n_bytes) return "`index` must have 8 ceil(in / 64) * out bytes for a `tile` of 0";
  if (Count(bounds) != w->n_out + 1) return "`bounds` must have out + 1 numbers for a `tile` of 0";
  w->bits = static_cast<const uint8_t*>(index.untyped_data());
  w->bounds = static_cast<const int32_t*>(bounds.untyped_data());
  w->stored = Count(values);
  return "";
}

std::string ReadOperands(const ffi::AnyBuffer& bias, const ffi::AnyBuffer& residual, const ffi::AnyBuffer& x,
                         const ffi::AnyBuffer& y, int64_t results, int64_t n_out, bool relu, Operands* ops) {
  if (!IsOfActivations(y, &ops->y_type)) return "the result must be float32 or bfloat16";
  if (bias.element_type() != ffi::DataType::F32) return "`bias` must be float32";
  if (Count(bias) != 0 && Count(bias) != n_out) return "`bias` must have one number for each output, or none";
  if (residual.element_type() != y.element_type()) return "`residual` must be of the result's dtype";
  if (Count(residual) != 0 && Count(residual) != results) return "`residual` must have the result's shape, or none";
  ops->x = x.untyped_data();
  ops->y = y.untyped_data();
  ops->bias = Count(bias) ? static_cast<const float*>(bias.untyped_data()) : nullptr;
  ops->residual = Count(residual) ? residual.untyped_data() : nullptr;
  ops->relu = relu;
  return "";
}

ffi::Error Product(ffi::ThreadPool pool, ffi::AnyBuffer values, ffi::AnyBuffer index, ffi::AnyBuffer bounds,
                   ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer residual, ffi::AnyBuffer x,
                   ffi::Result<ffi::AnyBuffer> y, int64_t tile, int64_t group, ffi::Span<const int64_t> numbers,
                   bool relu) {
  Window window;
  Weight w;
  Operands ops;
  if (std::string why = ReadSizes({{"`values`", &values},
                                   {"`index`", &index},
                                   {"`bounds`", &bounds},
                                   {"`scale`", &scale},
                                   {"`bias`", &bias},
                                   {"`residual`", &residual},
                                   {"`x`", &x},
                                   {"the result", &*y}});
      !why.empty()) {
    return Refuse(why);
  }
  if (std::string why = ReadWindow(numbers, x, *y, &window); !why.empty()) return Refuse(why);
  const int64_t taps = window.kernel_height * window.kernel_width;
  if (__builtin_mul_overflow(taps, window.channels, &w.n_in) || w.n_in > INT32_MAX) {
    return Refuse("`x` and `window` must make fewer than 2^31 inputs");
  }
  w.n_out = y->dimensions().back();
  BitWeight bits;
  bits.n_in = w.n_in, bits.n_out = w.n_out;
  if (tile == kBitmap && numbers.size()) return Refuse("`window` must be empty for a `tile` of 0");
  if (std::string why = tile == kBitmap ? ReadBitWeight(values, index, bounds, scale, group, &bits)
                                        : ReadWeight(values, index, bounds, scale, tile, group, &w);
      !why.empty()) {
    return Refuse(why);
  }
  if (!IsOfActivations(x, &ops.x_type)) return Refuse("`x` must be float32 or bfloat16");
  if (std::string why = ReadOperands(bias, residual, x, *y, Count(*y), w.n_out, relu, &ops); !why.empty()) {
    return Refuse(why);
  }
  const int64_t positions = window.positions();
  if (positions == 0 || w.n_out == 0) return ffi::Error::Success();
  const Kernels& kernels = BestKernels();
  const char* wrong = tile == kBitmap                          ? BitProduct(pool, kernels, bits, ops, positions)
                      : numbers.size() == 0 && positions == 1 ? VectorProduct(pool, kernels, w, ops)
                                                              : PanelProduct(pool, kernels, w, window, ops);
  return wrong ? Refuse(wrong) : ffi::Error::Success();
}

ffi::Error ProductOfCodes(ffi::ThreadPool pool, ffi::AnyBuffer values, ffi::AnyBuffer index, ffi::AnyBuffer bounds,
                          ffi::AnyBuffer scale, ffi::AnyBuffer totals, ffi::AnyBuffer grid, ffi::AnyBuffer grid_of_y,
                          ffi::AnyBuffer bias, ffi::AnyBuffer residual, ffi::AnyBuffer x,
                          ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> codes_of_y,
                          ffi::Result<ffi::AnyBuffer> codes_of_x, int64_t tile, ffi::Span<const int64_t> numbers,
                          bool relu) {
  Window window;
  Weight w;
  Codes of_codes;
  Operands ops;
  if (std::string why = ReadSizes({{"`values`", &values},
                                   {"`index`", &index},
                                   {"`bounds`", &bounds},
                                   {"`scale`", &scale},
                                   {"`totals`", &totals},
                                   {"`grid`", &grid},
                                   {"`grid_of_y`", &grid_of_y},
                                   {"`bias`", &bias},
                                   {"`residual`", &residual},
                                   {"`x`", &x},
                                   {"the result", &*y},
                                   {"the result of its codes", &*codes_of_y},
                                   {"the result of codes of x", &*codes_of_x}});
      !why.empty()) {
    return Refuse(why);
  }
  if (std::string why = ReadWindow(numbers, x, *y, &window); !why.empty()) return Refuse(why);
  w.n_out = Count(scale);
  const bool encodes = Count(grid_of_y) != 0, alone = encodes && y->dimensions().back() == 0;
  if (!alone && y->dimensions().back() != w.n_out) return Refuse("`scale` must have one number for each output");
  if (std::string why = ReadCodes(values, index, bounds, scale, totals, grid, tile, &window, &w, &of_codes);
      !why.empty()) {
    return Refuse(why);
  }
  int64_t results, codes;
  if (__builtin_mul_overflow(window.positions(), w.n_out, &results) ||
      __builtin_mul_overflow(window.positions(), CeilDiv(w.n_out, kRun) * kRun, &codes)) {
    return Refuse("the result must have fewer than 2^63 numbers");
  }
  if (std::string why = ReadOperands(bias, residual, x, *y, results, w.n_out, relu, &ops); !why.empty()) {
    return Refuse(why);
  }
  const int64_t channels = x.dimensions().back(), pixels = channels ? Count(x) / channels : 0;
  const bool encoded = x.element_type() == ffi::DataType::U8;
  if (!encoded && !IsOfActivations(x, &ops.x_type)) return Refuse("`x` must be float32, bfloat16 or codes in uint8");
  if (encoded && channels % kRun) return Refuse("`x` of codes must have its channels in whole runs of 4");
  if (codes_of_x->element_type() != ffi::DataType::U8 ||
      Count(*codes_of_x) != (encoded ? 0 : pixels * window.channels * kRun)) {
    return Refuse("the result of codes of `x` must be uint8, for each pixel its channels in whole runs of 4, and empty "
                  "where `x` is of codes");
  }
  if (encodes) {
    if (std::string why = ReadGrid(grid_of_y, "`grid_of_y`", &ops.grid); !why.empty()) return Refuse(why);
    ops.codes = static_cast<uint8_t*>(codes_of_y->untyped_data());
  }
  if (codes_of_y->element_type() != ffi::DataType::U8 || Count(*codes_of_y) != (encodes ? codes : 0)) {
    return Refuse("the result of its codes must be uint8, for each pixel its outputs in whole runs of 4, and empty "
                  "without a `grid_of_y`");
  }
  if (alone) ops.y = nullptr;
  if (window.positions() == 0 || w.n_out == 0) return ffi::Error::Success();
  const Kernels& kernels = BestKernels();
  if (!encoded) {
    uint8_t* to = static_cast<uint8_t*>(codes_of_x->untyped_data());
    Encode(pool, kernels, ops.x, ops.x_type, pixels, channels, of_codes.x, to);
    ops.x = to;
  }
  ops.x_type = Type::kF32;
  const char* wrong = PanelProduct(pool, kernels, w, window, ops);
  return wrong ? Refuse(wrong) : ffi::Error::Success();
}

ffi::Error Transposed(ffi::ThreadPool pool, ffi::AnyBuffer values, ffi::AnyBuffer index, ffi::AnyBuffer bounds,
                      ffi::AnyBuffer scale, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  if (std::string why = ReadSizes({{"`values`", &values},
                                   {"`index`", &index},
                                   {"`bounds`", &bounds},
                                   {"`scale`", &scale},
                                   {"`x`", &x},
                                   {"the result", &*y}});
      !why.empty()) {
    return Refuse(why);
  }
  const auto xs = x.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || x.element_type() != ffi::DataType::F32) return Refuse("`x` must be float32 (batch, out)");
  if (ys.size() != 2 || y->element_type() != ffi::DataType::F32) return Refuse("the result must be float32 (batch, in)");
  if (xs[0] != ys[0]) return Refuse("`x` and the result must have the same batch");
  if (ys[1] > INT32_MAX || xs[1] > INT32_MAX) return Refuse("`x` and the result must have fewer than 2^31 columns");
  BitWeight w;
  w.n_in = ys[1], w.n_out = xs[1];
  if (std::string why = ReadBitWeight(values, index, bounds, scale, 1, &w); !why.empty()) return Refuse(why);
  if (ys[0] == 0 || ys[1] == 0) return ffi::Error::Success();
  const char* wrong = TransposedProduct(pool, BestKernels(), w, static_cast<const float*>(x.untyped_data()),
                                        static_cast<float*>(y->untyped_data()), xs[0]);
  return wrong ? Refuse(wrong) : ffi::Error::Success();
}

// Whether runs lie one after the other, and every index in one of them.
bool IsWithoutGaps(const Weight& w) {
  int32_t end = 0;
  for (int64_t tile = 0; tile < w.n_tiles; ++tile) {
    const int32_t* bounds = w.bounds + tile * (w.groups() + 1);
    if (bounds[0] != end) return false;
    end = bounds[w.groups()];
  }
  return end == w.inputs;
}

ffi::Error Sampled(ffi::ThreadPool pool, ffi::AnyBuffer index, ffi::AnyBuffer bounds, ffi::AnyBuffer x,
                   ffi::AnyBuffer y, ffi::Result<ffi::AnyBuffer> values, int64_t tile) {
  if (std::string why = ReadSizes(
          {{"`index`", &index}, {"`bounds`", &bounds}, {"`x`", &x}, {"`y`", &y}, {"the result", &*values}});
      !why.empty()) {
    return Refuse(why);
  }
  const auto xs = x.dimensions(), ys = y.dimensions();
  Rows of_x{x.untyped_data(), {}, 0}, of_y{y.untyped_data(), {}, 0};
  if (!IsOfActivations(x, &of_x.type)) return Refuse("`x` must be float32 or bfloat16");
  if (!IsOfActivations(y, &of_y.type)) return Refuse("`y` must be float32 or bfloat16");
  if (xs.size() != 2 || ys.size() != 2 || xs[0] != ys[0]) return Refuse("`x` and `y` must be (batch, in) and (batch, out)");
  if (xs[1] > INT32_MAX || ys[1] > INT32_MAX) return Refuse("`x` and `y` must have fewer than 2^31 columns");
  Weight w{};
  w.n_in = of_x.channels = xs[1], w.n_out = of_y.channels = ys[1];
  if (std::string why = ReadRuns(index, bounds, tile, 1, &w); !why.empty()) return Refuse(why);
  if (values->element_type() != ffi::DataType::F32 || Count(*values) != w.inputs) {
    return Refuse("the result must be float32, a number for each of `index`");
  }
  if (w.inputs > INT32_MAX - 64) return Refuse("`index` must have fewer than 2^31 - 64 numbers");
  if (!IsWithoutGaps(w)) return Refuse("`bounds` must be of runs one after the other, with all of `index`");
  if (w.inputs == 0) return ffi::Error::Success();
  float* to = static_cast<float*>(values->untyped_data());
  if (xs[0] == 0) return std::fill_n(to, w.inputs, 0.0f), ffi::Error::Success();
  const char* wrong = SampledProduct(pool, BestKernels(), w, of_x, of_y, xs[0], to);
  return wrong ? Refuse(wrong) : ffi::Error::Success();
}

ffi::Error Permuted(ffi::ThreadPool pool, ffi::AnyBuffer values, ffi::AnyBuffer order,
                    ffi::Result<ffi::AnyBuffer> to) {
  if (std::string why = ReadSizes({{"`values`", &values}, {"`order`", &order}, {"the result", &*to}}); !why.empty()) {
    return Refuse(why);
  }
  Type type;
  if (!IsOfActivations(values, &type)) return Refuse("`values` must be float32 or bfloat16");
  if (to->element_type() != values.element_type()) return Refuse("the result must be of the dtype of `values`");
  if (order.element_type() != ffi::DataType::S32) return Refuse("`order` must be int32");
  if (Count(*to) != Count(order)) return Refuse("the result must have a number for each of `order`");
  const int64_t n = Count(order), parts = std::clamp<int64_t>(n / (2 * kWorthAThread), 1, 4 * Threads(pool));
  std::atomic<bool> sound{true};
  ForEach(pool, parts, [&](int64_t i) {
    const auto [first, last] = Part(n, parts, i);
    const auto permute = [&](auto of) {
      using Value = decltype(of);
      return Permute(static_cast<const Value*>(values.untyped_data()),
                     static_cast<const int32_t*>(order.untyped_data()), first, last, Count(values),
                     static_cast<Value*>(to->untyped_data()));
    };
    if (!(type == Type::kF32 ? permute(float{}) : permute(uint16_t{}))) sound = false;
  });
  return sound ? ffi::Error::Success() : Refuse("`order` leads outside of `values`");
}

}  // namespace
}  // namespace jaxprune

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_sampled, jaxprune::Sampled,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("tile"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_permuted, jaxprune::Permuted,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_transposed, jaxprune::Transposed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_product, jaxprune::Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("tile")
                                  .Attr<int64_t>("group")
                                  .Attr<ffi::Span<const int64_t>>("window")
                                  .Attr<bool>("relu"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxprune_codes, jaxprune::ProductOfCodes,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("tile")
                                  .Attr<ffi::Span<const int64_t>>("window")
                                  .Attr<bool>("relu"));

// Counts up with the operands and attributes of the call, so that kernels left over from another version are noticed.
extern "C" int jaxprune_interface() { return 9; }

// Name of the instruction set that runs.
extern "C" const char* jaxprune_isa() { return jaxprune::BestKernels().name; }

#pragma GCC visibility pop
