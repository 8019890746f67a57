// Which path a scan takes on a CUDA device, in words, for explain, and in numbers, for the model of its
// speed: both need no CUDA.
#pragma once
#include <string>
#include <vector>

#include "cuda/geometry.h"

namespace fastrnn {

/// A scan as a user names it. numbers: "bf16", "f16", "tf32", "f32" or "f64"
struct NamedScan {
  bool forward;
  std::string numbers;
  int gates;
  int64_t T;
  ScanSizes sizes;
  bool projected;

  Arithmetic arithmetic() const {
    return numbers == "bf16"   ? Arithmetic::kBf16
           : numbers == "f16"  ? Arithmetic::kF16
           : numbers == "tf32" ? Arithmetic::kTf32
                               : Arithmetic::kF32;
  }
  const char* no_persistent_reason() const {
    return fastrnn::no_persistent_reason(numbers == "f64", projected, T, sizes.B);
  }
  Choice choose(const DeviceLimits& device) const {
    return fastrnn::choose(forward, arithmetic(), gates, sizes, device);
  }
};

inline std::string describe_cuda(const NamedScan& scan, const DeviceLimits& device) {
  const std::string steps = "a matrix product and a kernel each step: ";
  if (const char* const reason = scan.no_persistent_reason(); *reason) return steps + reason;
  const Choice choice = scan.choose(device);
  if (choice.form == Form::kNone) return steps + "no room for W_hh on the multiprocessors";
  const Geometry& g = choice.geometry;
  const auto number = [](int n) { return std::to_string(n); };
  const Shape shape = shape_of(choice.form, scan.forward, scan.arithmetic(), scan.gates);
  const std::string blocks =
      choice.form == Form::kOneBlock
          ? "one block has all units"
          : number(g.blocks) + " blocks of " + number(g.units) + " units, which meet once a step";
  return "persistent, " + scan.numbers + ": " + blocks + "; " + number(g.replicas) + " times, with " +
         number(g.rows) + " rows each; " + number(shared_memory(choice.form, shape, g).bytes >> 10) +
         " KiB of shared memory a block";
}

/// {warps, row_tiles, resident, units, blocks, replicas, rows, batch, row_warps, depth_warps, chunks,
/// per_warp, spilled, stride, bytes of shared memory} of Shape and Geometry; nothing where each step is a
/// launch of its own.
inline std::vector<int64_t> geometry_numbers(const NamedScan& scan, const DeviceLimits& device) {
  if (*scan.no_persistent_reason()) return {};
  const Choice choice = scan.choose(device);
  if (choice.form == Form::kNone) return {};
  const Geometry& g = choice.geometry;
  const Shape shape = shape_of(choice.form, scan.forward, scan.arithmetic(), scan.gates);
  return {
      shape.warps, shape.row_tiles, shape.resident, g.units,     g.blocks,
      g.replicas,  g.rows,          g.batch,        g.row_warps, g.depth_warps,
      g.chunks,    g.per_warp,      g.spilled,      g.stride(),  shared_memory(choice.form, shape, g).bytes};
}

}  // namespace fastrnn
