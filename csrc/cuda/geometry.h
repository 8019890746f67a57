// How a scan is laid over the multiprocessors: plain functions of the sizes, for the launch, for the kernels,
// for explain and for the tests.
//
// A block has `units` hidden units with all their rows of W, which it keeps in registers and shared memory,
// and a slice of the batch; `blocks` of them make up a direction and meet once a step; `replicas` share the
// batch and never meet. Inside a block its warps share the depth K of the product (depth_warps), of which
// they take chunks of 64 bytes in turn, and, where one block has all units, the rows too (row_warps).
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/inline.h"

namespace fastrnn {

FASTRNN_INLINE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
FASTRNN_INLINE constexpr int round_up(int a, int multiple) { return ceil_div(a, multiple) * multiple; }
FASTRNN_INLINE constexpr int smaller(int a, int b) { return a < b ? a : b; }
FASTRNN_INLINE constexpr int larger(int a, int b) { return a > b ? a : b; }

/// What a persistent kernel multiplies: 16-bit numbers or float32 rounded to tf32 on the tensor cores, or
/// float32 as it is.
enum class Arithmetic { kBf16, kF16, kTf32, kF32 };

FASTRNN_INLINE constexpr int element_bytes(Arithmetic a) {
  return a == Arithmetic::kBf16 || a == Arithmetic::kF16 ? 2 : 4;
}

/// The kernels that there are.
enum class Form { kNone, kOneBlock, kManyBlocks };

/// Constants of a compiled kernel.
struct Shape {
  int warps;  // of a block
  int row_tiles;  // tiles of 16 rows that a warp multiplies side by side
  int resident;  // chunks of each tile in registers, 8 words a lane; the others lie in shared memory
  int group;  // chunks whose columns are fetched together
  int pairs;  // (unit, row of the batch) pairs that a thread finishes in a step, at most
  bool staged;  // whether a warp reads the columns through shared memory
  FASTRNN_INLINE constexpr int threads() const { return 32 * warps; }
};

// A thread in a block of 8 warps has 255 registers; weights take 96 of them, 128 in the one-block form. More
// would spill, and spilling a prefetched number waits for its load at once, so the prefetch is lost. Fewer
// weights in registers are faster (tests/test_cuda_build.py bounds the spills).
FASTRNN_INLINE constexpr Shape shape_of(Form form, bool forward, Arithmetic a, int gates) {
  const bool exact = a == Arithmetic::kF32;  // needs more accumulators
  if (form == Form::kOneBlock) return {8, 4, exact ? 2 : 4, 2, 4, exact};
  if (!forward) return {8, 1, exact ? 8 : 12, 4, 4, exact};  // 16 units, deep as all gates
  switch (gates) {
    case 4:  // 16 units
      return {8, 4, exact ? 1 : 3, exact ? 1 : 3, 4, exact};
    case 3:  // 16 units
      return {8, 3, exact ? 2 : 4, exact ? 2 : 4, 4, exact};
    default:  // 32 units
      return {8, 2, exact ? 4 : 6, exact ? 2 : 3, 4, exact};
  }
}

/// Hidden units of one of many blocks, whose rows of W fill the tiles of a warp.
FASTRNN_INLINE constexpr int units_of(const Shape& shape, int rows_per_unit) {
  return shape.row_tiles * 16 / rows_per_unit;
}

struct Geometry {
  int units, blocks, replicas;
  int rows, batch;  // rows of a replica, and those rounded up to whole tiles of 8
  int row_warps, depth_warps;
  int chunks;  // of K
  int per_warp;  // chunks that a warp works on: the last ones may lie beyond K, and are zero
  int spilled;  // of those, in shared memory

  FASTRNN_INLINE constexpr bool exists() const { return blocks > 0; }
  FASTRNN_INLINE constexpr int grid(int directions) const { return blocks * replicas * directions; }
  /// Row stride, in bytes, of the right operand [batch, K] in shared memory: free of bank conflicts.
  // mutant: rows-of-the-exchange-overlap
  FASTRNN_INLINE constexpr int stride() const { return round_up(depth_warps * per_warp * 64, 128) + 64; }
  FASTRNN_INLINE constexpr int exchange_bytes() const { return batch * stride(); }
  /// Column stride, in numbers, of the partial sums: free of bank conflicts too.
  FASTRNN_INLINE constexpr int partial_stride(const Shape& shape) const {
    return row_warps * shape.row_tiles * 16 + 4;
  }
};

/// Byte offsets of a block's shared memory.
struct SharedMemory {
  int weights;  // [warp][spilled][row tile][2][lane] of 16 bytes
  int partial;  // float [depth_warps][batch][g.partial_stride()]
  int stage;  // [warp] of 512 bytes: a chunk of 8 columns; only where staged
  int exchange;  // [2][batch] rows of stride(); only with one block, else in global memory
  int bytes;
};

FASTRNN_INLINE constexpr SharedMemory shared_memory(Form form, const Shape& shape, const Geometry& g) {
  SharedMemory m{};
  m.partial = g.row_warps * g.depth_warps * g.spilled * shape.row_tiles * 1024;
  // mutant: sums-run-into-what-follows
  m.stage = m.partial + g.depth_warps * g.batch * g.partial_stride(shape) * 4;
  m.exchange = m.stage + (shape.staged ? shape.warps * 512 : 0);
  // mutant: too-little-shared-memory
  m.bytes = m.exchange + (form == Form::kOneBlock ? 2 * g.exchange_bytes() : 0);
  return m;
}

/// One scan as the geometry sees it.
struct ScanSizes {
  int H, B, directions;
};

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // of one block
  bool one_block = true;  // whether the one-block form may be chosen; tests turn it off
};

/// Multiply-adds of a step that one block does in the time of a barrier between blocks.
constexpr int kMostFmas = 200'000;

/// The layout of a scan in one form; an empty Geometry where the form has no room.
FASTRNN_INLINE constexpr Geometry fit(Form form, bool forward, Arithmetic arithmetic, int gates,
                                      const ScanSizes& s, const DeviceLimits& device) {
  const Shape shape = shape_of(form, forward, arithmetic, gates);
  const int rows_per_unit = forward ? gates : 1, depth_per_unit = forward ? 1 : gates;
  Geometry g{};
  g.units = form == Form::kOneBlock ? s.H : units_of(shape, rows_per_unit);
  g.row_warps = ceil_div(rows_per_unit * g.units, shape.row_tiles * 16);
  g.chunks = depth_per_unit * ceil_div(s.H * element_bytes(arithmetic), 64);
  const int blocks = ceil_div(s.H, g.units), most_replicas = device.multiprocessors / (blocks * s.directions);
  if (g.row_warps > shape.warps || most_replicas == 0) return {};
  g.depth_warps = shape.warps / g.row_warps;
  g.per_warp = ceil_div(g.chunks, g.depth_warps);
  g.spilled = larger(0, g.per_warp - shape.resident);
  // A single block finishes sooner with fewer rows, so it gets as many replicas as fit. Blocks that
  // synchronise gain nothing below 8 rows, a whole tile.
  g.rows = ceil_div(s.B, most_replicas);
  if (form == Form::kManyBlocks) g.rows = round_up(g.rows, 8);
  g.batch = round_up(g.rows, 8);
  g.replicas = ceil_div(s.B, g.rows);
  g.blocks = blocks;
  const bool fits = g.units <= shape.threads() && g.rows <= shape.pairs * (shape.threads() / g.units) &&
                    shared_memory(form, shape, g).bytes <= device.shared_bytes;
  return fits ? g : Geometry{};
}

/// Why a call runs one launch a step, whatever its sizes; "" where it need not.
FASTRNN_INLINE constexpr const char* no_persistent_reason(bool float64, bool projected, int64_t T,
                                                          int64_t B) {
  if (float64) return "float64 has no persistent kernels";
  if (projected) return "a projection has no persistent kernels";
  if (T < 2) return "one step does not repay keeping W_hh";
  if (T * B > INT32_MAX) return "the persistent kernels count rows up to 2^31";
  return "";
}

struct Choice {
  Form form;
  Geometry geometry;
};

/// The one-block form where all units fit into a block and, without tensor cores, its product takes less time
/// than a barrier between blocks.
FASTRNN_INLINE constexpr Choice choose(bool forward, Arithmetic a, int gates, const ScanSizes& s,
                                       const DeviceLimits& device) {
  const Geometry one = fit(Form::kOneBlock, forward, a, gates, s, device);
  const bool slow = a == Arithmetic::kF32 && gates * s.H * s.H * one.rows > kMostFmas;
  if (device.one_block && one.exists() && !slow) return {Form::kOneBlock, one};
  const Geometry many = fit(Form::kManyBlocks, forward, a, gates, s, device);
  return many.exists() ? Choice{Form::kManyBlocks, many} : Choice{};
}

}  // namespace fastrnn
