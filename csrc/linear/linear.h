// The linear scan h_t = a_t * h_{t-1} + b_t: its operator's schema, the struct that its kernels are told, and
// the checks between the two.
#pragma once
#include <torch/csrc/stable/library.h>

#include "common/arguments.h"

namespace fastrnn {

// a, b: rows [N, H] (dense time-major, dense batch-first or packed, as in common/operators.h); h0 [B, H].
// A row of the batch carries a state m [H], at first its h0, over its steps, from the last to the first with
// reverse:
//   h_t = a_t * m + b_t;  m = h_t              the scan
//   h_t = m + b_t;        m = a_t * h_t        shifted: its transpose, in the other direction
// Where reset [N] is true, a_t counts as zero. The adjoint of each form is the other one, run the other way:
// dL/db_t and dL/dh0 are the h_t and the last of a scan over dL/dh_t from dL/dlast.
// -> h [N, H], zero beyond the lengths; last [B, H], m after the last step.
constexpr const char* kLinearScan =
    "linear_scan(Tensor a, Tensor b, Tensor h0, Tensor? batch_sizes, Tensor? lengths, Tensor? reset, "
    "bool batch_first, bool reverse, bool shifted) -> (Tensor h, Tensor last)";

template <class S>
struct LinearProblem {
  Sequence sequence;
  int64_t H;
  Rows<const S> a, b;  // [N, H]
  Rows<const S> h0;  // [B, H]
  Rows<S> h;  // [N, H] out
  Rows<S> last;  // [B, H] out
  bool reverse, shifted;
};

struct LinearCall {
  LinearCall(const Tensor& a_, const Tensor& b_, const Tensor& h0_, const MaybeTensor& batch_sizes,
             const MaybeTensor& lengths, const MaybeTensor& reset, bool batch_first, bool reverse_,
             bool shifted_)
      : N(rows_of(b_, h0_)),
        B(h0_.size(0)),
        H(h0_.size(1)),
        a(with_rows(a_)),
        b(with_rows(b_)),
        h0(with_rows(h0_)),
        layout(N, B, batch_sizes, lengths, reset, batch_first),
        reverse(reverse_),
        shifted(shifted_) {
    const Arguments arguments(h0);
    arguments.check(a, "a", "[N, H]", {N, H});
    arguments.check(b, "b", "[N, H]", {N, H});
    if (reset) arguments.check_device(*reset, "reset");
    h = empty({N, H}, h0), last = empty({B, H}, h0);
  }

  template <class S>
  LinearProblem<S> problem(const Sequence& sequence) const {
    return {sequence,
            H,
            rows<S>(a),
            rows<S>(b),
            rows<S>(h0),
            {static_cast<S*>(h.mutable_data_ptr()), H},
            {static_cast<S*>(last.mutable_data_ptr()), H},
            reverse,
            shifted};
  }

  int64_t N, B, H;
  Tensor a, b, h0, h, last;
  SequenceLayout layout;
  bool reverse, shifted;

 private:
  static int64_t rows_of(const Tensor& b, const Tensor& h0) {
    STD_TORCH_CHECK(h0.dim() == 2, "h0 must be [B, H], got ", to_string(sizes_of(h0)));
    STD_TORCH_CHECK(b.dim() == 2, "b must be [N, H], got ", to_string(sizes_of(b)));
    return b.size(0);
  }
};

/// Backend::run(const LinearCall&) for calls that have units.
template <class Backend>
std::tuple<Tensor, Tensor> linear_scan(const Tensor& a, const Tensor& b, const Tensor& h0,
                                       const MaybeTensor& batch_sizes, const MaybeTensor& lengths,
                                       const MaybeTensor& reset, bool batch_first, bool reverse,
                                       bool shifted) {
  const LinearCall call(a, b, h0, batch_sizes, lengths, reset, batch_first, reverse, shifted);
  if (call.B > 0 && call.H > 0) Backend::run(call);
  return {call.h, call.last};
}

}  // namespace fastrnn
