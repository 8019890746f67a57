// The operators: their schemas, declared once for every cell, the module that Python imports, and what it can
// ask about the build. Kernels register themselves from cpu/ and cuda/.
//
//   torch.ops.fastrnn.<cell>           one layer: the scan over time of each direction
//   torch.ops.fastrnn.<cell>_backward  back-propagation through it: gate gradients, never weight gradients
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
#include "cpu/kernels.h"
#include "cpu/plan.h"

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

namespace fastrnn {
namespace {

// x [N, I], h0 [D, B, P], c0 [D, B, H], w_ih D x [G*H, I], w_hh D x [G*H, P], b_ih and b_hh D x [G*H] or
// none, w_hr D x [P, H] or none, batch_sizes int64 [T] (packed) or none, lengths int64 [B] (dense) or none,
// reset bool [N] or none
// -> y [N, D*P], h_n [D, B, P], c_n [D, B, H], saved [D, N, S*H], saved_c [D, N, H]
constexpr const char* kForward =
    "(Tensor x, Tensor h0, Tensor? c0, Tensor[] w_ih, Tensor[] w_hh, Tensor[] b_ih, Tensor[] b_hh, "
    "Tensor[] w_hr, Tensor? batch_sizes, Tensor? lengths, Tensor? reset, bool batch_first, bool save) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved, Tensor saved_c)";

// -> dgates [D, N, E*H], dh0 [D, B, P], dc0 [D, B, H], dh [D, N, P] (complete dL/dh_t; with w_hr or keep),
//    dc [D, N, H] (complete dL/dc_t; with a c and keep)
constexpr const char* kBackward =
    "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dsaved, Tensor? dsaved_c, Tensor saved, "
    "Tensor saved_c, Tensor y, Tensor h0, Tensor? c0, Tensor[] w_hh, Tensor[] w_hr, Tensor? batch_sizes, "
    "Tensor? lengths, Tensor? reset, bool batch_first, bool keep) "
    "-> (Tensor dgates, Tensor dh0, Tensor dc0, Tensor dh, Tensor dc)";

// What follows the backward scan, over all steps at once; the caller may compose it from torch operations
// instead.
// -> dx [N, I] (if inputs), dw_ih [D, G*H, I], dw_hh [D, G*H, P], db_ih and db_hh [D, G*H] (if weights)
constexpr const char* kProducts =
    "(Tensor dgates, Tensor x, Tensor y, Tensor h0, Tensor[] w_ih, Tensor? batch_sizes, Tensor? lengths, "
    "Tensor? reset, bool batch_first, bool inputs, bool weights) "
    "-> (Tensor dx, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh)";

// -> uint8 [bytes]: valid in this process alone. With bfloat16 the weights (not the biases) are rounded to
// it.
constexpr const char* kPack =
    "(Tensor[] w_ih, Tensor[] w_hh, Tensor[] b_ih, Tensor[] b_hh, Tensor[] w_hr, bool bfloat16) -> Tensor";

constexpr const char* kPacked =
    "(Tensor x, Tensor h0, Tensor? c0, Tensor packed, Tensor? batch_sizes, Tensor? lengths, Tensor? reset, "
    "bool batch_first, bool save) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved, Tensor saved_c)";

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

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY(fastrnn, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_plan(int T, int B, int units, int K, int gates, int directions, int element_bytes) -> int[]");
  fastrnn::AllCells::each([&]<class Cell>() {
    m.def((std::string(Cell::kName) + fastrnn::kForward).c_str());
    m.def((std::string(Cell::kName) + "_backward" + fastrnn::kBackward).c_str());
    m.def((std::string(Cell::kName) + "_products" + fastrnn::kProducts).c_str());
    m.def((std::string(Cell::kName) + "_pack" + fastrnn::kPack).c_str());
    m.def((std::string(Cell::kName) + "_packed" + fastrnn::kPacked).c_str());
  });
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fastrnn::cpu_isa));
  m.impl("cpu_plan", TORCH_BOX(&fastrnn::cpu_plan));
}
