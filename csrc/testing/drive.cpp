// One training step of one layer on the CPU kernels without torch: for other machines (tests/test_aarch64.py)
// and for counting instructions (benchmarks/instructions.py).
//
//   drive CELL f32|f64 T B I H P THREADS [quiet]
//
// P is 0 without projection. Prints y, each last state, dgates, dL/d(each initial state), and those that the
// cell has of dx, dw_ih, dw_hh, db_ih, db_hh, du, a number a line, unless quiet. Array k is filled with
// value(k, i).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

namespace fastrnn {
namespace {

// Evenly spread over [-1, 1), the same on every machine.
double value(uint32_t array, int64_t i) {
  return static_cast<double>((static_cast<uint32_t>(i) + array * 1000003u) * 2654435761u) / 2147483648.0 - 1;
}

template <class S>
std::vector<S> filled(uint32_t array, int64_t count, double scale) {
  std::vector<S> result(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i)
    result[static_cast<size_t>(i)] = static_cast<S>(value(array, i) * scale);
  return result;
}

void run_threads(int64_t count, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> others;
  for (int64_t worker = 1; worker < count; ++worker) others.emplace_back(body, context, worker);
  body(context, 0);
  for (std::thread& other : others) other.join();
}

struct Shape {
  int64_t T, B, I, H, P;
  bool projected;
  int threads;
};

template <class Cell, class S>
struct Step {
  static constexpr int64_t G = Cell::kInfo.gates, E = Cell::kInfo.gradients(), U = Cell::kInfo.vectors,
                           kStates = Cell::kInfo.states;
  static constexpr bool kTakesX = !Cell::kInfo.takes_gates, kDense = Cell::kInfo.dense;

  explicit Step(const Shape& shape) : s(shape) {}

  const Shape s;
  const int64_t N = s.T * s.B;
  const Sequence sequence{s.T, s.B, s.B, 1, nullptr, nullptr, nullptr, nullptr, nullptr};
  const Parallel parallel{s.threads, run_threads};
  const int64_t I = Cell::kInfo.takes_gates ? G * s.H : s.I, K = Cell::kInfo.saved_width(s.H);
  const std::vector<S> x = filled<S>(1, N* I, 1), h0 = filled<S>(2, s.B* s.P, 1),
                       other0 = filled<S>(3, s.B* s.H, 1), w_ih = filled<S>(4, G* s.H* I, 0.3),
                       w_hh = filled<S>(5, G* s.H* s.P, 0.3), b_ih = filled<S>(6, G* s.H, 1),
                       b_hh = filled<S>(7, G* s.H, 1), w_hr = filled<S>(8, s.P* s.H, 0.3),
                       dy = filled<S>(9, N* s.P, 1), u = filled<S>(10, U* s.H, 0.3);
  std::vector<S> y = filled<S>(0, N* s.P, 0), h_n = filled<S>(0, s.B* s.P, 0), saved = filled<S>(0, N* K, 0),
                 dgates = filled<S>(0, N * E * s.H, 0), dh0 = filled<S>(0, s.B* s.P, 0),
                 dh = filled<S>(0, N* s.P, 0), dx = filled<S>(0, N* I, 0), dw_ih = filled<S>(0, G* s.H* I, 0),
                 dw_hh = filled<S>(0, G* s.H* s.P, 0), db_ih = filled<S>(0, G* s.H, 0), db_hh = db_ih,
                 du = filled<S>(0, U* s.H, 0);
  // Of the states beside h, which all begin with the same numbers.
  std::vector<std::vector<S>> last{kStates - 1, other0}, history{kStates - 1, filled<S>(0, N* s.H, 0)},
      dothers{kStates - 1, filled<S>(0, s.B* s.H, 0)};

  Weights<S> weights() const {
    return {.w_ih = {kTakesX ? w_ih.data() : nullptr, I},
            .w_hh = {kDense ? w_hh.data() : nullptr, s.P},
            .b_ih = kTakesX ? b_ih.data() : nullptr,
            .b_hh = kTakesX && kDense ? b_hh.data() : nullptr,
            .w_hr = s.projected ? Rows<const S>{w_hr.data(), s.H} : Rows<const S>{},
            .u = {u.data(), s.H}};
  }

  bool forward(const CellKernels& kernels) {
    ForwardProblem<S> problem{};
    problem.sequence = sequence, problem.H = s.H, problem.P = s.P, problem.directions = 1;
    problem.parallel = parallel, problem.x = {x.data(), I}, problem.I = I;
    problem.projected = s.projected;
    ForwardDirection<S>& d = problem.direction[0];
    d.weights = weights(), d.h0 = {h0.data(), s.P}, d.saved = {saved.data(), K};
    d.last[kH] = {h_n.data(), s.P}, d.history[kH] = {y.data(), s.P};
    for (size_t k = 1; k < kStates; ++k)
      d.last[k] = {last[k - 1].data(), s.H}, d.history[k] = {history[k - 1].data(), s.H};
    return kernels.of<S>().forward(problem);
  }

  bool backward(const CellKernels& kernels) {
    BackwardProblem<S> problem{};
    problem.sequence = sequence, problem.H = s.H, problem.P = s.P, problem.directions = 1;
    problem.parallel = parallel;
    BackwardDirection<S>& d = problem.direction[0];
    d.weights = weights(), d.doutput[kH] = {dy.data(), s.P}, d.saved = {saved.data(), K};
    d.history[kH] = {y.data(), s.P}, d.initial[kH] = {h0.data(), s.P}, d.dstate[kH] = {dh0.data(), s.P};
    for (size_t k = 1; k < kStates; ++k) {
      d.history[k] = {history[k - 1].data(), s.H}, d.initial[k] = {other0.data(), s.H};
      d.dstate[k] = {dothers[k - 1].data(), s.H};
    }
    d.dgates = {dgates.data(), E * s.H}, d.du = {du.data(), s.H};
    if (s.projected) d.complete[kH] = {dh.data(), s.P};
    return kernels.of<S>().backward(problem);
  }

  bool products(const CellKernels& kernels) {
    ProductsProblem<S> problem{};
    problem.sequence = sequence, problem.H = s.H, problem.P = s.P, problem.directions = 1;
    problem.parallel = parallel, problem.x = {x.data(), I}, problem.I = I, problem.weights = true;
    if (kTakesX) problem.dx = {dx.data(), I};
    ProductsDirection<S>& d = problem.direction[0];
    d.weights = weights(), d.dgates = {dgates.data(), E * s.H}, d.y = {y.data(), s.P};
    d.h0 = {h0.data(), s.P}, d.dw_ih = {dw_ih.data(), I}, d.dw_hh = {dw_hh.data(), s.P};
    d.db_ih = db_ih.data(), d.db_hh = db_hh.data();
    return kernels.of<S>().products(problem);
  }

  void print() const {
    const auto show = [](const std::vector<S>& array) {
      for (const S number : array) std::printf("%.17g\n", static_cast<double>(number));
    };
    show(y), show(h_n), std::for_each(last.begin(), last.end(), show);
    show(dgates), show(dh0), std::for_each(dothers.begin(), dothers.end(), show);
    if (kTakesX) show(dx), show(dw_ih);
    if (kDense) show(dw_hh);
    if (kTakesX) show(db_ih);
    if (kTakesX && kDense) show(db_hh);
    show(du);
  }
};

// What callgrind counts (--toggle-collect).
extern "C" __attribute__((noinline)) bool fastrnn_measured(bool (*call)(void*), void* context) {
  return call(context);
}

template <class Cell, class S>
int drive(const Shape& shape, bool quiet) {
  Step<Cell, S> step(shape);
  const bool done = fastrnn_measured(
      [](void* context) {
        auto* const step = static_cast<Step<Cell, S>*>(context);
        const CellKernels& kernels = instruction_set().cells[AllCells::index<Cell>()];
        return step->forward(kernels) && step->backward(kernels) && step->products(kernels);
      },
      &step);
  if (done && !quiet) step.print();
  return done ? 0 : 1;
}

}  // namespace
}  // namespace fastrnn

int main(int count, char** arguments) {
  if (count < 9) return 2;
  const auto number = [&](int i) { return std::strtoll(arguments[i], nullptr, 10); };
  const bool f64 = !std::strcmp(arguments[2], "f64"), quiet = count > 9;
  const fastrnn::Shape shape{number(3),
                             number(4),
                             number(5),
                             number(6),
                             number(7) ? number(7) : number(6),
                             number(7) != 0,
                             static_cast<int>(number(8))};
  int result = 2;
  fastrnn::AllCells::each([&]<class Cell>() {
    if (!std::strcmp(arguments[1], Cell::kInfo.name))
      result = f64 ? fastrnn::drive<Cell, double>(shape, quiet) : fastrnn::drive<Cell, float>(shape, quiet);
  });
  return result;
}
