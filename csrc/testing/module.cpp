// fastrnn_testing: internals of the extension as a Python module, for the tests alone; in no wheel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/team.h"
#include "testing/math.h"
#include "testing/team.h"

namespace py = pybind11;

namespace fastrnn::testing {
namespace {

struct Choice {
  const MathTable* table;
  bool available;
};

std::vector<Choice> choices() {
  return {
#if defined(__x86_64__)
      {&kMathAvx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")},
      {&kMathAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&kMathBaseline, true},
  };
}

const MathTable& table_of(const std::string& instruction_set) {
  for (const Choice& choice : choices())
    if (choice.available && instruction_set == choice.table->name) return *choice.table;
  throw py::value_error("unknown or unavailable instruction set " + instruction_set);
}

template <class S>
using Array = py::array_t<S, py::array::c_style>;

template <class S>
Array<S> apply(OverArray<S> f, const Array<S>& x) {
  Array<S> y(x.size());
  f(x.data(), y.mutable_data(), x.size());
  return y;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Choice& choice : choices())
    if (choice.available) names.emplace_back(choice.table->name);
  return names;
}

}  // namespace
}  // namespace fastrnn::testing

PYBIND11_MODULE(fastrnn_testing, m) {
  using namespace fastrnn::testing;
  m.def("instruction_sets", &instruction_sets, "Those of this processor, best first.");
  m.def(
      "sigmoid",
      [](const std::string& isa, const Array<float>& x) { return apply(table_of(isa).sigmoid_f32, x); },
      py::arg("isa"), py::arg("x").noconvert());
  m.def(
      "sigmoid",
      [](const std::string& isa, const Array<double>& x) { return apply(table_of(isa).sigmoid_f64, x); },
      py::arg("isa"), py::arg("x").noconvert());
  m.def(
      "tanh", [](const std::string& isa, const Array<float>& x) { return apply(table_of(isa).tanh_f32, x); },
      py::arg("isa"), py::arg("x").noconvert());
  m.def(
      "tanh", [](const std::string& isa, const Array<double>& x) { return apply(table_of(isa).tanh_f64, x); },
      py::arg("isa"), py::arg("x").noconvert());

  m.def(
      "exp", [](const std::string& isa, const Array<float>& x) { return apply(table_of(isa).exp_f32, x); },
      py::arg("isa"), py::arg("x").noconvert());
  m.def(
      "exp", [](const std::string& isa, const Array<double>& x) { return apply(table_of(isa).exp_f64, x); },
      py::arg("isa"), py::arg("x").noconvert());
  m.def(
      "log_sigmoid",
      [](const std::string& isa, const Array<float>& x) { return apply(table_of(isa).log_sigmoid_f32, x); },
      py::arg("isa"), py::arg("x").noconvert());
  m.def(
      "log_sigmoid",
      [](const std::string& isa, const Array<double>& x) { return apply(table_of(isa).log_sigmoid_f64, x); },
      py::arg("isa"), py::arg("x").noconvert());

  py::class_<Member>(m, "Member", "A thread of a team: the part it takes, and how late it comes.")
      .def(py::init<int, int>(), py::arg("part"), py::arg("late_us"));
  m.def("run_team", &run_team, py::call_guard<py::gil_scoped_release>(), py::arg("parts"), py::arg("phases"),
        py::arg("members"), py::arg("one_thread"), py::arg("stall_every"), py::arg("seed"),
        py::arg("tick_us"),
        "What went wrong, or an empty string. With one_thread the members work one after another.");
  py::class_<Held>(m, "Held")
      .def_readonly("wrong", &Held::wrong)
      .def_readonly("late", &Held::late)
      .def_readonly("done", &Held::done)
      .def_readonly("after", &Held::after);
  m.def("hold_members", &hold_members, py::call_guard<py::gil_scoped_release>(), py::arg("parts"),
        py::arg("phases"), py::arg("held"), py::arg("phase"), py::arg("worked_us"), py::arg("waited_us"));
  m.def("seconds_without_neighbour", &seconds_without_neighbour, py::call_guard<py::gil_scoped_release>(),
        py::arg("phases"), py::arg("shared"));
  py::class_<fastrnn::Contention>(m, "Contention", "By a clock that set_clock sets.")
      .def(py::init([] { return new fastrnn::Contention(manual_ns); }))
      .def("members", &fastrnn::Contention::members)
      .def("report", &fastrnn::Contention::report);
  m.def("set_clock", &set_manual_ns, py::arg("ns"));
}
