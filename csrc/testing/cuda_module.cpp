// fastrnn_cuda_on_host: the CUDA kernels on the CPU as a Python module, for the tests alone; in no wheel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "testing/primitives.h"

namespace py = pybind11;

namespace fastrnn::testing {
namespace {

template <class S>
using Array = py::array_t<S, py::array::c_style>;

Schedule make_schedule(const std::string& order, uint64_t seed) {
  static const std::map<std::string, Schedule::Order> kOrders = {{"fifo", Schedule::Order::kFifo},
                                                                 {"lifo", Schedule::Order::kLifo},
                                                                 {"random", Schedule::Order::kRandom},
                                                                 {"starve", Schedule::Order::kStarve}};
  const auto found = kOrders.find(order);
  if (found == kOrders.end())
    throw py::value_error("order must be fifo, lifo, random or starve, got " + order);
  return {found->second, seed};
}

using Size = std::array<unsigned, 3>;
dim3 dim(const Size& s) { return {s[0], s[1], s[2]}; }

}  // namespace
}  // namespace fastrnn::testing

PYBIND11_MODULE(fastrnn_cuda_on_host, m) {
  using namespace fastrnn::testing;
  m.attr("sanitizer") = sanitizer();
  py::class_<Schedule>(m, "Schedule", "Which of the threads that can run is next.")
      .def(py::init(&make_schedule), py::arg("order") = "fifo", py::arg("seed") = 0);

  m.def(
      "number_threads",
      [](const Size& grid, const Size& block, size_t shared_bytes, bool cooperative, Schedule schedule) {
        const Launch launch{dim(grid), dim(block), shared_bytes, cooperative, schedule};
        Array<unsigned> out({launch.grid.size(), launch.block.size(), 6u});
        number_threads(launch, out.mutable_data());
        return out;
      },
      py::arg("grid"), py::arg("block"), py::arg("shared_bytes") = 0, py::arg("cooperative") = false,
      py::arg("schedule") = Schedule{}, "[blocks, threads, 6]: threadIdx and blockIdx of each.");
  m.def(
      "exchange_lanes",
      [](const Array<float>& x, int lane_mask, Schedule schedule) {
        Array<float> y({x.shape(0), x.shape(1)});
        exchange_lanes(x.data(), y.mutable_data(), x.shape(0), x.shape(1), lane_mask, schedule);
        return y;
      },
      "x [blocks, threads]");
  m.def(
      "multiply_tile",
      [](const std::string& type, const Array<float>& a, const Array<float>& b, Array<float> d,
         Schedule schedule) {
        const py::ssize_t K = type == "tf32" ? 8 : 16;
        if (a.size() != K * 16 || b.size() != K * 8 || d.size() != 8 * 16)
          throw py::value_error("a, b, d must be [K, 16], [K, 8], [8, 16]");
        multiply_tile(type, a.data(), b.data(), d.mutable_data(), schedule);
        return d;
      },
      "type bf16, f16 or tf32; a [K, 16], b [K, 8], d [8, 16], which is written");
  m.def("round_numbers", [](const std::string& type, const Array<float>& x) {
    Array<float> y(x.size());
    round_numbers(type, x.data(), y.mutable_data(), static_cast<int>(x.size()));
    return y;
  });
  m.def(
      "relay",
      [](Array<uint32_t> values, int steps, bool cooperative, Schedule schedule) {
        relay(values.mutable_data(), values.shape(0), values.shape(1), steps, cooperative, schedule);
        return values;
      },
      py::arg("values"), py::arg("steps"), py::arg("cooperative") = true, py::arg("schedule") = Schedule{},
      "values [blocks, threads], which are written");
  m.def("unset_memory", &unset_memory);
  m.def("faults", &faults);
  m.def("commit", &commit, "A launch with the fault of this name.");
}
