// Which path a scan takes on a CUDA device, in words, for explain: it needs no CUDA.
#pragma once
#include <string>

#include "cuda/geometry.h"

namespace fastrnn {

/// numbers: "bf16", "f16", "tf32", "f32" or "f64"
inline std::string describe_cuda(bool forward, const std::string& numbers, int gates, int64_t T,
                                 const ScanSizes& sizes, bool projected, const DeviceLimits& device) {
  const std::string steps = "a matrix product and a kernel each step: ";
  const char* const reason = no_persistent_reason(numbers == "f64", projected, T);
  if (*reason) return steps + reason;
  const Arithmetic arithmetic = numbers == "bf16"   ? Arithmetic::kBf16
                                : numbers == "f16"  ? Arithmetic::kF16
                                : numbers == "tf32" ? Arithmetic::kTf32
                                                    : Arithmetic::kF32;
  const Choice choice = choose(forward, arithmetic, gates, sizes, device);
  if (choice.form == Form::kNone) return steps + "no room for W_hh on the multiprocessors";
  const Geometry& g = choice.geometry;
  const auto number = [](int n) { return std::to_string(n); };
  const Shape shape = shape_of(choice.form, arithmetic, gates);
  const std::string blocks =
      g.blocks == 1 ? "one block has all units"
                    : number(g.blocks) + " blocks of " + number(g.units) + " units, which meet once a step";
  return "persistent, " + numbers + ": " + blocks + "; " + number(g.replicas) + " times, with " +
         number(g.batch) + " rows each; " + number(shared_memory(shape, g).bytes >> 10) +
         " KiB of shared memory a block";
}

}  // namespace fastrnn
