// The module that Python imports: the operators' schemas, and what can be asked about the build. Kernels
// register themselves from cpu/ and cuda/.
#include <Python.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "common/operators.h"
#include "cpu/bfloat16.h"
#include "cpu/int8.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"
#include "cuda/describe.h"
#include "direct/calls.h"
#include "linear/linear.h"

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_C",
                                   nullptr,
                                   -1,
                                   fastrnn::direct::methods(),
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return PyModule_Create(&definition);
}

namespace fastrnn {
namespace {

// {G, E, U, states, S, reuses_saved, dense, takes_gates, R, reads_after} of a cell, as CellInfo has them.
std::vector<int64_t> cell_info(std::string name) {
  const CellInfo& info = cell_named(name);
  return {info.gates,        info.gradients(), info.vectors,     info.states,      info.saved,
          info.reuses_saved, info.dense,       info.takes_gates, info.row_numbers, int64_t(info.reads_after)};
}

std::string cpu_isa() { return instruction_set().name; }

// Which instructions multiply bfloat16 matrices on the CPU; empty: none.
std::string cpu_bfloat16() {
  const Bfloat16Products* const products = bfloat16_products();
  return products ? products->name : "";
}

// Which instructions multiply int8 weights.
std::string cpu_int8() { return int8_products().name; }

// {teams of rows, parts of units} of a direction, for a product of B rows with [units, K] in each of T steps,
// the sums in numbers of sum_bytes and the weights in numbers of weight_bytes.
std::vector<int64_t> cpu_plan(int64_t T, int64_t B, int64_t units, int64_t K, int64_t gates,
                              int64_t directions, int64_t sum_bytes, int64_t weight_bytes) {
  const int64_t block = instruction_set().block_bytes / sum_bytes;
  const Plan plan = choose_plan({.T = T,
                                 .B = B,
                                 .blocks = (units + block - 1) / block,
                                 .block_weights = K * gates * block,
                                 .element_bytes = weight_bytes,
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
  m.def("cpu_bfloat16() -> str");
  m.def("cpu_int8() -> str");
  m.def(
      "cpu_plan(int T, int B, int units, int K, int gates, int directions, int sum_bytes, int weight_bytes) "
      "-> int[]");
  const std::string cuda_scan =
      "(bool forward, str numbers, int gates, int T, int B, int H, int directions, bool projected, "
      "int multiprocessors, int shared_bytes) -> ";
  m.def(("cuda_plan" + cuda_scan + "str").c_str());
  m.def(("cuda_geometry" + cuda_scan + "int[]").c_str());
  fastrnn::define_scans(m);
  fastrnn::kWeightGradients.define(m);
  m.def(fastrnn::kPack);
  m.def(fastrnn::kLinearScan);
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) {
  m.impl("cell_info", TORCH_BOX(&fastrnn::cell_info));
  m.impl("cpu_isa", TORCH_BOX(&fastrnn::cpu_isa));
  m.impl("cpu_bfloat16", TORCH_BOX(&fastrnn::cpu_bfloat16));
  m.impl("cpu_int8", TORCH_BOX(&fastrnn::cpu_int8));
  m.impl("cpu_plan", TORCH_BOX(&fastrnn::cpu_plan));
  m.impl("cuda_plan", TORCH_BOX(&fastrnn::cuda_answer<fastrnn::describe_cuda>));
  m.impl("cuda_geometry", TORCH_BOX(&fastrnn::cuda_answer<fastrnn::geometry_numbers>));
}
