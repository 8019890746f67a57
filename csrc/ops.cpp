// The operators of every cell, the module that Python imports, and what it can ask about the build. Kernels
// register themselves from cpu/ and cuda/.
//
//   torch.ops.fastrnn.<cell>           one layer: the scan over time of each direction
//   torch.ops.fastrnn.<cell>_backward  back-propagation through it: gate gradients, never weight gradients
//   torch.ops.fastrnn.<cell>_backward_in_place  the same, written over what the scan saved
//   torch.ops.fastrnn.<cell>_products  gradients of weights and input from the gate gradients
//   torch.ops.fastrnn.<cell>_pack      the weights in the form that the kernels stream, to be kept
//   torch.ops.fastrnn.<cell>_packed    the scan over time with these
//
// x, y and all that is saved are rows [N, *]: dense time-major, dense batch-first or packed (batch_sizes).
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "cells/registry.h"
#include "common/schemas.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"
#include "cuda/describe.h"

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

namespace fastrnn {
namespace {

// {G, E, U, states, S, reuses_saved} of a cell, as CellInfo has them.
std::vector<int64_t> cell_info(std::string name) {
  std::vector<int64_t> numbers;
  AllCells::each([&]<class Cell>() {
    constexpr CellInfo info = Cell::kInfo;
    if (name == info.name)
      numbers = {info.gates, info.gradients(), info.vectors, info.states, info.saved, info.reuses_saved};
  });
  STD_TORCH_CHECK(!numbers.empty(), "fastrnn has no cell ", name);
  return numbers;
}

std::string cpu_isa() { return instruction_set().name; }

// {teams of rows, parts of units} of a direction, for a product of B rows with [units, K] in each of T steps.
std::vector<int64_t> cpu_plan(int64_t T, int64_t B, int64_t units, int64_t K, int64_t gates,
                              int64_t directions, int64_t element_bytes) {
  const int64_t block = instruction_set().block_bytes / element_bytes;
  const Plan plan = choose_plan({.T = T,
                                 .B = B,
                                 .blocks = (units + block - 1) / block,
                                 .block_weights = K * gates * block,
                                 .element_bytes = element_bytes,
                                 .directions = static_cast<int>(directions),
                                 .threads = static_cast<int>(torch::stable::get_num_threads())});
  return {plan.teams, plan.parts};
}

// How a CUDA device with so many multiprocessors and bytes of shared memory a block runs a scan, by
// describe_cuda or geometry_numbers. numbers: bf16, f16, tf32, f32 or f64.
template <auto kAnswer>
auto cuda_answer(bool forward, std::string numbers, int64_t gates, int64_t T, int64_t B, int64_t H,
                 int64_t directions, bool projected, int64_t multiprocessors, int64_t shared_bytes) {
  const ScanSizes sizes{static_cast<int>(H), static_cast<int>(B), static_cast<int>(directions)};
  return kAnswer({forward, numbers, static_cast<int>(gates), T, sizes, projected},
                 {static_cast<int>(multiprocessors), static_cast<int>(shared_bytes)});
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY(fastrnn, m) {
  m.def("cell_info(str cell) -> int[]");
  m.def("cpu_isa() -> str");
  m.def("cpu_plan(int T, int B, int units, int K, int gates, int directions, int element_bytes) -> int[]");
  const std::string cuda_scan =
      "(bool forward, str numbers, int gates, int T, int B, int H, int directions, bool projected, "
      "int multiprocessors, int shared_bytes) -> ";
  m.def(("cuda_plan" + cuda_scan + "str").c_str());
  m.def(("cuda_geometry" + cuda_scan + "int[]").c_str());
  fastrnn::AllCells::each([&]<class Cell>() {
    const std::string name = Cell::kInfo.name;
    m.def((name + fastrnn::kForward).c_str());
    m.def((name + "_backward" + fastrnn::kBackward).c_str());
    if constexpr (Cell::kInfo.reuses_saved)
      m.def((name + "_backward_in_place" + fastrnn::backward_in_place()).c_str());
    m.def((name + "_products" + fastrnn::kProducts).c_str());
    m.def((name + "_pack" + fastrnn::kPack).c_str());
    m.def((name + "_packed" + fastrnn::kPacked).c_str());
  });
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) {
  m.impl("cell_info", TORCH_BOX(&fastrnn::cell_info));
  m.impl("cpu_isa", TORCH_BOX(&fastrnn::cpu_isa));
  m.impl("cpu_plan", TORCH_BOX(&fastrnn::cpu_plan));
  m.impl("cuda_plan", TORCH_BOX(&fastrnn::cuda_answer<fastrnn::describe_cuda>));
  m.impl("cuda_geometry", TORCH_BOX(&fastrnn::cuda_answer<fastrnn::geometry_numbers>));
}
