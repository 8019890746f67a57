// How a scan is laid over the multiprocessors: plain functions of the sizes, for the launch, for the kernels,
// for explain and for the tests.
//
// A block has `units` hidden units with all their rows of W, which it keeps in registers and shared memory,
// and a slice of the batch; `blocks` of them make up a direction and meet once a step; `replicas` share the
// batch and never meet. Inside a block its warps share the rows (row_warps) and the depth K of the product
// (depth_warps), of which they take chunks of 64 bytes in turn.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define FASTRNN_PLAIN __host__ __device__ constexpr
#else
#define FASTRNN_PLAIN constexpr
#endif

namespace fastrnn {

FASTRNN_PLAIN int ceil_div(int a, int b) { return (a + b - 1) / b; }
FASTRNN_PLAIN int round_up(int a, int multiple) { return ceil_div(a, multiple) * multiple; }
FASTRNN_PLAIN int smaller(int a, int b) { return a < b ? a : b; }
FASTRNN_PLAIN int larger(int a, int b) { return a > b ? a : b; }

/// What a persistent kernel multiplies: 16-bit numbers or float32 rounded to tf32 on the tensor cores, or
/// float32 as it is.
enum class Arithmetic { kBf16, kF16, kTf32, kF32 };

FASTRNN_PLAIN int element_bytes(Arithmetic a) {
  return a == Arithmetic::kBf16 || a == Arithmetic::kF16 ? 2 : 4;
}

/// What is fixed when a kernel is compiled: warps of a block; tiles of 16 rows that a warp works on side by
/// side; how many chunks of those it keeps in registers (8 words each; the others are in shared memory); and
/// how many pairs of a unit and a row of the batch a thread finishes in a step, at most.
struct Shape {
  int warps, row_tiles, resident, pairs;
  FASTRNN_PLAIN int threads() const { return 32 * warps; }
};

// A thread of 8 warps can have 255 registers, one of 12 warps 168. Weights take so many of 8 that the rest is
// enough for what a step reads: float32 without tensor cores has more of that.
FASTRNN_PLAIN int resident_tiles(Arithmetic a) { return a == Arithmetic::kF32 ? 6 : 12; }
/// The kernels that there are.
enum class Form {
  kNone,
  kSingle,  // all units in one block
  kSplit,  // forward, 32 or 48 rows of W: as many units as leave few rows unused
  kWide,  // forward, 64 rows of W
  kDeep  // backward: 16 units, and the depth of all gates
};

FASTRNN_PLAIN Shape shape_of(Form form, Arithmetic a, int gates) {
  const int tiles = resident_tiles(a);
  switch (form) {
    case Form::kSingle:
      return {12, 4, tiles / 6, 4};
    case Form::kSplit:
      return gates == 3 ? Shape{8, 3, tiles / 3, 4} : Shape{8, 2, tiles / 2, 4};
    case Form::kWide:
      return {8, 4, tiles / 4, 4};
    case Form::kDeep:
      return {8, 1, tiles / 2, 4};
    case Form::kNone:
      break;
  }
  return {};
}

struct Geometry {
  int units, blocks, replicas, batch;  // batch: rows of a replica, a multiple of 8
  int row_warps, depth_warps;
  int chunks;  // of K
  int spilled;  // chunks of a warp that are in shared memory

  FASTRNN_PLAIN bool exists() const { return blocks > 0; }
  FASTRNN_PLAIN int grid(int directions) const { return blocks * replicas * directions; }
  /// Bytes from one row of the batch to the next of what is multiplied: free of bank conflicts.
  FASTRNN_PLAIN int stride() const { return round_up(chunks * 64, 128) + 64; }
  FASTRNN_PLAIN int exchange_bytes() const { return batch * stride(); }
};

/// Byte offsets of a block's shared memory.
struct SharedMemory {
  int weights;  // [warp][spilled][row tile][2][lane] of 16 bytes
  int partial;  // float [depth_warps][rows][batch + 1]
  int bias;  // float [rows], forward
  int h, c;  // float [batch * units]: h and c, or their gradients
  int direct;  // float [batch * units]: gradient of h_prev beside the product, backward
  int exchange;  // [2][batch] rows of stride(); only with one block, else in global memory
  int bytes;
};

FASTRNN_PLAIN SharedMemory shared_memory(const Shape& shape, const Geometry& g) {
  const int rows = g.row_warps * shape.row_tiles * 16, pairs = g.batch * g.units;
  SharedMemory m{};
  m.partial = g.row_warps * g.depth_warps * g.spilled * shape.row_tiles * 1024;
  m.bias = m.partial + round_up(g.depth_warps * rows * (g.batch + 1) * 4, 16);
  m.h = m.bias + rows * 4;
  m.c = m.h + pairs * 4;
  m.direct = m.c + pairs * 4;
  m.exchange = m.direct + pairs * 4;
  m.bytes = m.exchange + (g.blocks == 1 ? 2 * g.exchange_bytes() : 0);
  return m;
}

/// One scan as the geometry sees it.
struct ScanSizes {
  int H, B, directions;
};

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // of one block
};

/// A block of all units, or of as many as its rows of W hold; none where there is no room. rows_per_unit:
/// gates in the forward product, 1 in the backward one; depth_per_unit the other way round.
FASTRNN_PLAIN Geometry fit(const Shape& shape, Arithmetic arithmetic, int rows_per_unit, int depth_per_unit,
                           bool one_block, const ScanSizes& s, const DeviceLimits& device) {
  Geometry g{};
  g.units = one_block ? s.H : shape.row_tiles * 16 / rows_per_unit;
  g.row_warps = ceil_div(rows_per_unit * g.units, shape.row_tiles * 16);
  g.chunks = depth_per_unit * ceil_div(s.H * element_bytes(arithmetic), 64);
  const int blocks = ceil_div(s.H, g.units), most_replicas = device.multiprocessors / (blocks * s.directions);
  if (g.row_warps > shape.warps || most_replicas == 0) return {};
  g.depth_warps = shape.warps / g.row_warps;
  g.spilled = larger(0, ceil_div(g.chunks, g.depth_warps) - shape.resident);
  g.batch = round_up(ceil_div(s.B, most_replicas), 8);
  g.replicas = ceil_div(s.B, g.batch);
  g.blocks = blocks;
  const bool fits = g.batch * g.units <= shape.pairs * shape.threads() &&
                    shared_memory(shape, g).bytes <= device.shared_bytes;
  return fits ? g : Geometry{};
}

/// Why a call takes the path of single steps, whatever its sizes, or "".
FASTRNN_PLAIN const char* no_persistent_reason(bool float64, bool projected, int64_t T) {
  if (float64) return "float64 has no persistent kernels";
  if (projected) return "a projection has no persistent kernels";
  if (T < 2) return "one step does not repay keeping W_hh";
  return "";
}

struct Choice {
  Form form;
  Geometry geometry;
};

/// One block where it has room for all units; else the form whose blocks read the least in a step.
FASTRNN_PLAIN Choice choose(bool forward, Arithmetic a, int gates, const ScanSizes& s,
                            const DeviceLimits& device) {
  const int rows = forward ? gates : 1, depth = forward ? 1 : gates;
  const auto fitted = [&](Form form) {
    return Choice{form, fit(shape_of(form, a, gates), a, rows, depth, form == Form::kSingle, s, device)};
  };
  if (const Choice single = fitted(Form::kSingle); single.geometry.exists()) return single;
  Choice best = fitted(forward ? Form::kSplit : Form::kDeep);
  if (forward && gates == 4) {
    const Choice wide = fitted(Form::kWide);
    const bool reads_less = wide.geometry.exchange_bytes() < best.geometry.exchange_bytes();
    if (wide.geometry.exists() && (reads_less || !best.geometry.exists())) best = wide;
  }
  return best.geometry.exists() ? best : Choice{};
}

}  // namespace fastrnn
