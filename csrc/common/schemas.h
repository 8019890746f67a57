// The operators' schemas, declared once for every cell and every device.
#pragma once
#include <string>

namespace fastrnn {

// x [N, I], h0 [D, B, P], c0 [D, B, H], w_ih D x [G*H, I], w_hh D x [G*H, P], b_ih and b_hh D x [G*H] or
// none, w_hr D x [P, H] or none, u D x [U, H] or none (vectors of parameters), batch_sizes int64 [T] (packed)
// or none, lengths int64 [B] (dense) or none, reset bool [N] or none; save: 0 nothing, 1 what backward wants,
// 2 every c_t alone
// -> y [N, D*P], h_n [D, B, P], c_n [D, B, H], saved [D, N, S*H], saved_c [D, N, H]
constexpr const char* kForward =
    "(Tensor x, Tensor h0, Tensor? c0, Tensor[] w_ih, Tensor[] w_hh, Tensor[] b_ih, Tensor[] b_hh, "
    "Tensor[] w_hr, Tensor[] u, Tensor? batch_sizes, Tensor? lengths, Tensor? reset, bool batch_first, "
    "int save) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved, Tensor saved_c)";

// -> dgates [D, N, E*H], dh0 [D, B, P], dc0 [D, B, H], dh [D, N, P] (complete dL/dh_t; with w_hr or keep),
//    dc [D, N, H] (complete dL/dc_t; with a c and keep), du [D, U, H] (with u)
constexpr const char* kBackward =
    "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dsaved_c, Tensor saved, "
    "Tensor saved_c, Tensor y, Tensor h0, Tensor? c0, Tensor[] w_hh, Tensor[] w_hr, Tensor[] u, Tensor? "
    "batch_sizes, "
    "Tensor? lengths, Tensor? reset, bool batch_first, bool keep) "
    "-> (Tensor dgates, Tensor dh0, Tensor dc0, Tensor dh, Tensor dc, Tensor du)";

// The same for a cell that reuses_saved: dgates is written over saved, and is [0] among the results. Rows of
// saved beyond the lengths must be zero, as the forward scan leaves them.
inline std::string backward_in_place() {
  std::string schema = kBackward;
  return schema.replace(schema.find("Tensor saved,"), 6, "Tensor(a!)");
}

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
    "(Tensor[] w_ih, Tensor[] w_hh, Tensor[] b_ih, Tensor[] b_hh, Tensor[] w_hr, Tensor[] u, bool bfloat16) "
    "-> Tensor";

constexpr const char* kPacked =
    "(Tensor x, Tensor h0, Tensor? c0, Tensor packed, Tensor? batch_sizes, Tensor? lengths, Tensor? reset, "
    "bool batch_first, int save) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved, Tensor saved_c)";

}  // namespace fastrnn
