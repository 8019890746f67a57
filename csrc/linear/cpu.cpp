// The linear scan on the CPU: blocks of rows, and of units where rows are few, over torch's threads.
//
// Memory is what a step waits for, so registers of the portable width are enough, and there is one kernel for
// all instruction sets.
#define FASTRNN_ISA baseline
#include "cpu/vector.h"
#include "linear/linear.h"

namespace fastrnn {
namespace {

using baseline::kLanes;
using baseline::V;

/// One step of units [j, j + as many as Numbers holds]: a vector, or S itself.
template <class Numbers, bool kShifted, class S>
FASTRNN_INLINE void units(const S* a_at, const S* b_at, S* m_at, S* h_at, bool reset) {
  Numbers a, b, m, h;
  __builtin_memcpy(&a, a_at, sizeof a);
  __builtin_memcpy(&b, b_at, sizeof b);
  __builtin_memcpy(&m, m_at, sizeof m);
  if constexpr (kShifted) {
    h = m + b;
    m = reset ? Numbers{} : a * h;
  } else {
    m = h = reset ? b : a * m + b;
  }
  __builtin_memcpy(h_at, &h, sizeof h);
  __builtin_memcpy(m_at, &m, sizeof m);
}

/// Units [first, end) of rows [first_row, end_row), by number, at every step.
template <bool kShifted, class S>
void scan(const LinearProblem<S>& p, int64_t first_row, int64_t end_row, int64_t first, int64_t end) {
  const Sequence& s = p.sequence;
  const size_t bytes = static_cast<size_t>(end - first) * sizeof(S);
  for (int64_t b = first_row; b < end_row; ++b)
    __builtin_memcpy(p.last[s.batch(b)] + first, p.h0[s.batch(b)] + first, bytes);
  for (int64_t k = 0; k < s.T; ++k) {
    const int64_t t = p.reverse ? s.T - 1 - k : k;
    const int64_t alive = std::clamp(s.rows(t), first_row, end_row);
    for (int64_t b = first_row; b < alive; ++b) {
      const int64_t row = s.row(t, b);
      const bool reset = s.resets(t, b);
      const S* const a_row = p.a[row];
      const S* const b_row = p.b[row];
      S* const m = p.last[s.batch(b)];
      S* const h = p.h[row];
      int64_t j = first;
      for (; j + kLanes<S> <= end; j += kLanes<S>)
        units<V<S>, kShifted>(a_row + j, b_row + j, m + j, h + j, reset);
      for (; j < end; ++j) units<S, kShifted>(a_row + j, b_row + j, m + j, h + j, reset);
    }
    if (!s.counts) continue;
    for (int64_t b = alive; b < end_row; ++b) __builtin_memset(p.h[s.row(t, b)] + first, 0, bytes);
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Cpu {
  static void run(const LinearCall& call) {
    using torch::headeronly::ScalarType;
    if (call.h.scalar_type() == ScalarType::Float) return run<float>(call);
    STD_TORCH_CHECK(call.h.scalar_type() == ScalarType::Double,
                    "fastrnn's CPU kernels take float32 and float64");
    run<double>(call);
  }

 private:
  template <class S>
  static void run(const LinearCall& call) {
    constexpr int64_t kWorthAThread = 1 << 14;  // units of all steps, about 5 us
    constexpr int64_t kLine = 64 / sizeof(S);  // threads write to cache lines of their own
    const LinearProblem<S> p = call.problem<S>(call.layout.get());
    const Sequence& s = p.sequence;
    const int64_t H = p.H;
    const int64_t threads = std::clamp<int64_t>(call.N * H / kWorthAThread, 1,
                                                static_cast<int64_t>(torch::stable::get_num_threads()));
    // The steps of a batch-first row lie side by side and are read in one go; time-major, the rows of a step.
    const int64_t together = s.b_stride > 1 ? 1 : ceil_div(s.B, threads);
    const int64_t blocks = ceil_div(s.B, together);
    const int64_t units = ceil_div(ceil_div(H, ceil_div(threads, blocks)), kLine) * kLine;
    const int64_t parts = ceil_div(H, units);
    const auto body = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / parts * together, j = i % parts * units;
        const auto run = p.shifted ? scan<true, S> : scan<false, S>;
        run(p, b, std::min(b + together, s.B), j, std::min(j + units, H));
      }
    };
    if (threads == 1) return body(0, blocks * parts);
    torch::stable::parallel_for(0, blocks * parts, 1, body);
  }
};

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("linear_scan", TORCH_BOX(&fastrnn::linear_scan<fastrnn::Cpu>));
}
