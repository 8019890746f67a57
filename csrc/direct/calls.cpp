// Ordinary calls on the CPU past torch's dispatcher: a whole stack of layers over a dense sequence, forward
// and back. A call through torch.ops takes some 25 us of boxing and bookkeeping, where one step of a small
// layer takes 2 us. Each function gives None for a call that it does not serve; fastrnn/_direct.py then takes
// the operators, which also raise all errors.
#include "direct/calls.h"

#include <algorithm>
#include <exception>
#include <new>

#include "cpu/packs.h"
#include "cpu/torch_threads.h"
#include "direct/tensors.h"

namespace fastrnn::direct {
namespace {

constexpr int kMaxBiases = 2;

/// The weights of one layer and direction, as torch.nn has them.
struct DirectionViews {
  View w_ih, w_hh, bias[kMaxBiases];
};

/// A stack of layers and its arguments. One step of a cell is a stack of one layer over x [B, I].
struct Stack {
  const CellInfo* cell = nullptr;
  const CellKernels* kernels = nullptr;
  int64_t L, D, T, B, I, H, N;
  bool step, batch_first;
  int biases;
  View x, states[kMaxStates];  // each [L*D, B, H], of a step [B, H]; of no states data is null
  std::vector<DirectionViews> weights;  // [L*D]

  int64_t state_size() const { return B * H; }  // of one layer and direction
  int64_t input_size(int64_t layer) const { return layer == 0 ? I : D * H; }
  Sequence sequence() const {
    Sequence s{};
    s.T = T, s.B = B, s.t_stride = batch_first ? 1 : B, s.b_stride = batch_first ? T : 1;
    return s;
  }
};

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError{};
  return value;
}

const CellInfo* find_cell(PyObject* name, const CellKernels*& kernels) {
  const CellInfo* found = nullptr;
  AllCells::each([&]<class Cell>() {
    if (found || PyUnicode_CompareWithASCIIString(name, Cell::kInfo.name) != 0) return;
    found = &Cell::kInfo, kernels = &instruction_set().cells[AllCells::index<Cell>()];
  });
  return found;
}

/// args: cell, x, states, weights, layers, directions, batch_first
bool read_stack(PyObject* const* args, Reader& reader, Stack& stack) {
  stack.cell = find_cell(args[0], stack.kernels);
  if (!stack.cell) return false;
  const CellInfo& cell = *stack.cell;
  if (!cell.dense || cell.takes_gates || cell.vectors > 0) return false;
  stack.L = integer(args[4]), stack.D = integer(args[5]);
  stack.batch_first = args[6] == Py_True;
  std::vector<PyObject*> states, weights;
  if (!elements(args[2], states) || !elements(args[3], weights)) return false;
  if (stack.L < 1 || stack.D < 1 || stack.D > kMaxDirections) return false;
  const int64_t LD = stack.L * stack.D, each = static_cast<int64_t>(weights.size()) / LD;
  if (each < 2 || each > 2 + kMaxBiases || static_cast<int64_t>(weights.size()) != each * LD) return false;
  if (!states.empty() && static_cast<int>(states.size()) != cell.states) return false;
  if (!reader.read(args[1], stack.x)) return false;
  const View& x = stack.x;
  stack.step = x.dims == 2;
  if (x.dims != 3 && !(stack.step && LD == 1)) return false;
  stack.T = stack.step ? 1 : x.shape[stack.batch_first];
  stack.B = x.shape[stack.step ? 0 : !stack.batch_first];
  stack.I = x.shape[x.dims - 1], stack.N = stack.T * stack.B;
  stack.biases = static_cast<int>(each - 2);
  stack.weights.resize(static_cast<size_t>(LD));
  for (int64_t k = 0; k < LD; ++k) {
    DirectionViews& of = stack.weights[size_t(k)];
    PyObject* const* const given = &weights[size_t(k * each)];
    if (!reader.read(given[0], of.w_ih) || !reader.read(given[1], of.w_hh)) return false;
    if (k == 0) stack.H = of.w_hh.dims == 2 ? of.w_hh.shape[1] : 0;
    const int64_t H = stack.H, GH = cell.gates * H;
    if (!of.w_ih.is({GH, stack.input_size(k / stack.D)}) || !of.w_hh.is({GH, H})) return false;
    for (int b = 0; b < stack.biases; ++b)
      if (!reader.read(given[2 + b], of.bias[b]) || !of.bias[b].is({GH})) return false;
  }
  for (size_t k = 0; k < states.size(); ++k) {
    View& state = stack.states[k];
    if (!reader.read(states[k], state)) return false;
    if (stack.step ? !state.is({stack.B, stack.H}) : !state.is({LD, stack.B, stack.H})) return false;
  }
  return true;
}

/// Other threads of Python run meanwhile.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

/// Working memory of a call, uninitialised unless it is zeroed, and aligned as torch's tensors are: a vector
/// that lies in two cache lines takes twice as long to load.
template <class S>
class Scratch {
 public:
  S* take(int64_t count) {
    const size_t bytes = size_t(count) * sizeof(S);
    return parts_.emplace_back(static_cast<S*>(::operator new(bytes, kAlignment))).get();
  }
  S* zeros(int64_t count) {
    S* const part = take(count);
    std::fill_n(part, count, S(0));
    return part;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(S* part) const { ::operator delete(part, kAlignment); }
  };
  std::vector<std::unique_ptr<S, Free>> parts_;
};

template <class S>
Weights<S> weights_of(const Stack& stack, int64_t layer, int64_t d) {
  const DirectionViews& of = stack.weights[size_t(layer * stack.D + d)];
  const auto numbers = [](const View& view) { return static_cast<const S*>(view.data); };
  return {{numbers(of.w_ih), stack.input_size(layer)},
          {numbers(of.w_hh), stack.H},
          numbers(of.bias[0]),
          numbers(of.bias[1]),
          {},
          {}};
}

/// The state of a layer and direction before the first step.
template <class S>
const S* initial_state(const Stack& stack, int state, int64_t layer, int64_t d, const S* zeros) {
  const void* const data = stack.states[state].data;
  return data ? static_cast<const S*>(data) + (layer * stack.D + d) * stack.state_size() : zeros;
}

template <class S, class Problem>
Problem describe(const Stack& stack) {
  Problem problem{};
  problem.sequence = stack.sequence(), problem.H = problem.P = stack.H;
  problem.directions = static_cast<int>(stack.D), problem.parallel = torch_threads();
  return problem;
}

PyObject* tuple_of(std::vector<Object>& objects) {
  PyObject* const tuple = PyTuple_New(static_cast<Py_ssize_t>(objects.size()));
  if (!tuple) throw PythonError{};
  for (size_t i = 0; i < objects.size(); ++i) PyTuple_SetItem(tuple, Py_ssize_t(i), objects[i].release());
  return tuple;
}

void check_memory(bool enough) {
  if (enough) return;
  PyErr_SetString(PyExc_RuntimeError, "fastrnn: not enough memory for the working arrays");
  throw PythonError{};
}

/// What pack() has made of the weights of each layer, or None in its place; nothing if all are None.
bool read_packs(PyObject* given, int64_t layers, std::vector<Bytes>& packs) {
  std::vector<PyObject*> objects;
  if (!elements(given, objects) || (!objects.empty() && int64_t(objects.size()) != layers)) return false;
  packs.resize(objects.size());
  for (size_t i = 0; i < objects.size(); ++i)
    if (objects[i] != Py_None && !read_bytes(objects[i], packs[i])) return false;
  return true;
}

// ---- Forward -------------------------------------------------------------------------------------------

/// -> keep; y and the last states; with `keep` also, layer by layer, what backward() needs: y [N, D*H] (the
/// last layer's is the result), the history of every state beside h [D, N, H], and the saved gates
/// [D, N, S*H]
template <class S>
PyObject* forward(const Stack& stack, bool keep, const std::vector<Bytes>& packs) {
  const CellInfo& cell = *stack.cell;
  const auto [L, D, T, B, H, N] = std::tuple(stack.L, stack.D, stack.T, stack.B, stack.H, stack.N);
  const int64_t size = stack.state_size();
  std::vector<Object> results, kept;
  results.emplace_back(PyBool_FromLong(keep));
  Scratch<S> scratch;
  const auto make = [&](std::vector<Object>& list, std::initializer_list<int64_t> sizes) {
    NewTensor made = new_tensor(sizes, 8 * sizeof(S));
    list.push_back(std::move(made.object));
    return static_cast<S*>(made.data);
  };
  S* const y = stack.step          ? make(results, {B, H})
               : stack.batch_first ? make(results, {B, T, D * H})
                                   : make(results, {T, B, D * H});
  S* last[kMaxStates];
  for (int k = 0; k < cell.states; ++k) {
    if (stack.step)
      last[k] = k == kH ? scratch.take(size) : make(results, {B, H});
    else
      last[k] = make(results, {L * D, B, H});
    if (k == kH) continue;
    if (const void* const before = stack.states[k].data)
      std::copy_n(static_cast<const S*>(before), L * D * size, last[k]);
    else
      std::fill_n(last[k], L * D * size, S(0));
  }
  const S* const zeros = stack.states[kH].data ? nullptr : scratch.zeros(size);
  std::vector<ForwardProblem<S>> problems;
  const S* x = static_cast<const S*>(stack.x.data);
  for (int64_t layer = 0; layer < L; ++layer) {
    auto problem = describe<S, ForwardProblem<S>>(stack);
    problem.I = stack.input_size(layer), problem.x = {x, problem.I};
    if (const Bytes pack = packs.empty() ? Bytes{} : packs[size_t(layer)]; pack.data) {
      PackProblem<S> sizes;
      if (!read_pack(cell, stack.kernels->of<S>(), pack.data, pack.count, sizes) || sizes.directions != D ||
          sizes.I != problem.I || sizes.H != H || sizes.projected)
        return Py_NewRef(Py_None);
      problem.packed = pack.data + kHeaderBytes, problem.storage = sizes.storage;
    }
    S* const out = layer == L - 1 ? y : keep ? make(kept, {N, D * H}) : scratch.take(N * D * H);
    S *history[kMaxStates]{}, *saved = nullptr;
    for (int k = 1; keep && k < cell.states; ++k) history[k] = make(kept, {D, N, H});
    if (keep && cell.saved > 0) saved = make(kept, {D, N, cell.saved * H});
    for (int64_t d = 0; d < D; ++d) {
      ForwardDirection<S>& direction = problem.direction[d];
      if (!problem.packed) direction.weights = weights_of<S>(stack, layer, d);
      direction.h0 = {initial_state(stack, kH, layer, d, zeros), H};
      direction.history[kH] = {out + d * H, D * H};
      for (int k = 0; k < cell.states; ++k) direction.last[k] = {last[k] + (layer * D + d) * size, H};
      for (int k = 1; keep && k < cell.states; ++k) direction.history[k] = {history[k] + d * N * H, H};
      if (saved) direction.saved = {saved + d * N * cell.saved * H, cell.saved * H};
    }
    problems.push_back(problem);
    x = out;
  }
  bool enough = true;
  {
    const WithoutGil released;
    for (const auto& problem : problems) enough = enough && stack.kernels->of<S>().forward(problem);
  }
  check_memory(enough);
  std::move(kept.begin(), kept.end(), std::back_inserter(results));
  return tuple_of(results);
}

// ---- Backward ------------------------------------------------------------------------------------------

/// The arguments of backward() after those of the stack.
struct BackwardArguments {
  View y, gradients[1 + kMaxStates];  // dL/dy, dL/d(last states), of which a step has no h; null: zero
  std::vector<View> kept;  // as forward() returns it
  bool over;  // the gate gradients may be written over what was saved
  std::vector<bool> wanted;  // of x, the states, if they were given, and the weights
};

/// args from 7 on: y, kept, gradients, over, wanted
bool read_backward(PyObject* const* args, Reader& reader, const Stack& stack, BackwardArguments& call) {
  const CellInfo& cell = *stack.cell;
  std::vector<PyObject*> kept, gradients, wanted;
  if (!elements(args[8], kept) || !elements(args[9], gradients) || !elements(args[11], wanted)) return false;
  if (!reader.read(args[7], call.y)) return false;
  // The numbers in each: what is kept comes from forward(), y and its gradient have the shape of the output.
  const int64_t N = stack.N, DH = stack.D * stack.H, LDBH = stack.L * stack.D * stack.state_size();
  std::vector<int64_t> sizes;
  for (int64_t layer = 0; layer < stack.L; ++layer) {
    if (layer < stack.L - 1) sizes.push_back(N * DH);
    sizes.insert(sizes.end(), size_t(cell.states - 1), N * DH);
    if (cell.saved > 0) sizes.push_back(N * DH * cell.saved);
  }
  call.kept.resize(kept.size());
  if (kept.size() != sizes.size() || call.y.count() != N * DH) return false;
  for (size_t i = 0; i < kept.size(); ++i)
    if (!reader.read(kept[i], call.kept[i]) || call.kept[i].count() != sizes[i]) return false;
  if (gradients.size() != size_t(cell.states + !stack.step)) return false;
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (gradients[i] == Py_None) continue;
    View& gradient = call.gradients[i + (stack.step && i > 0)];  // a step's h is y
    if (!reader.read(gradients[i], gradient) || gradient.count() != (i == 0 ? N * DH : LDBH)) return false;
  }
  call.over = args[10] == Py_True && cell.reuses_saved;
  for (PyObject* const want : wanted) call.wanted.push_back(want == Py_True);
  const size_t states = stack.states[kH].data ? size_t(cell.states) : 0;
  return call.wanted.size() == 1 + states + stack.weights.size() * size_t(2 + stack.biases);
}

/// -> the wanted gradients of x, of the states, if they were given, and of the weights; None for the others
template <class S>
PyObject* backward(const Stack& stack, const BackwardArguments& call) {
  const CellInfo& cell = *stack.cell;
  const auto [L, D, B, H, N] = std::tuple(stack.L, stack.D, stack.B, stack.H, stack.N);
  const int64_t size = stack.state_size(), GH = cell.gates * H, EH = cell.gradients() * H;
  const int64_t each = 2 + stack.biases;
  const bool states_given = stack.states[kH].data;
  std::vector<Object> results(call.wanted.size());
  Scratch<S> scratch;
  // A result, or working memory for what nobody wants.
  const auto make = [&](size_t place, std::initializer_list<int64_t> sizes) {
    if (place < results.size() && call.wanted[place]) {
      NewTensor made = new_tensor(sizes, 8 * sizeof(S));
      results[place] = std::move(made.object);
      return static_cast<S*>(made.data);
    }
    int64_t count = 1;
    for (const int64_t one : sizes) count *= one;
    return scratch.take(count);
  };
  const size_t nowhere = results.size();
  S* dstate[kMaxStates];
  for (int k = 0; k < cell.states; ++k) {
    const size_t place = states_given ? size_t(1 + k) : nowhere;
    dstate[k] = stack.step ? make(place, {B, H}) : make(place, {L * D, B, H});
    const View& given = call.gradients[1 + k];
    if (given.data)
      std::copy_n(static_cast<const S*>(given.data), L * D * size, dstate[k]);
    else
      std::fill_n(dstate[k], L * D * size, S(0));
  }
  const S* const zeros = states_given ? nullptr : scratch.zeros(size);
  // What a layer has kept, in the order of forward().
  struct Kept {
    const S *x, *y, *history[kMaxStates];
    S* saved;
  };
  std::vector<Kept> layers;
  size_t next = 0;
  const auto take = [&] { return static_cast<S*>(call.kept[next++].data); };
  for (int64_t layer = 0; layer < L; ++layer) {
    Kept of{};
    of.x = layer == 0 ? static_cast<const S*>(stack.x.data) : layers.back().y;
    of.y = layer == L - 1 ? static_cast<const S*>(call.y.data) : take();
    for (int k = 1; k < cell.states; ++k) of.history[k] = take();
    of.saved = cell.saved > 0 ? take() : nullptr;
    layers.push_back(of);
  }
  struct Problems {
    BackwardProblem<S> scan;
    ProductsProblem<S> products;
  };
  std::vector<Problems> problems;
  const S* dy = static_cast<const S*>(call.gradients[0].data);
  for (int64_t layer = L - 1; layer >= 0; --layer) {
    const Kept& of = layers[size_t(layer)];
    auto scan = describe<S, BackwardProblem<S>>(stack);
    auto products = describe<S, ProductsProblem<S>>(stack);
    const int64_t I = stack.input_size(layer), first = layer * D * each;  // of the layer's weights
    const size_t begin = nowhere - stack.weights.size() * size_t(each) + size_t(first);
    S* const dgates = call.over ? of.saved : scratch.take(D * N * EH);
    S* dx = nullptr;
    if (layer > 0)
      dx = scratch.take(N * I);
    else if (call.wanted[0])
      dx = stack.step ? make(0, {B, I}) : make(0, {stack.x.shape[0], stack.x.shape[1], I});
    products.x = {of.x, I}, products.I = I, products.dx = {dx, I};
    products.weights =
        std::any_of(call.wanted.begin() + std::ptrdiff_t(begin),
                    call.wanted.begin() + std::ptrdiff_t(begin) + D * each, [](bool w) { return w; });
    for (int64_t d = 0; d < D; ++d) {
      BackwardDirection<S>& back = scan.direction[d];
      ProductsDirection<S>& product = products.direction[d];
      back.weights = product.weights = weights_of<S>(stack, layer, d);
      back.history[kH] = {of.y + d * H, D * H}, product.y = back.history[kH];
      if (dy) back.doutput[kH] = {dy + d * H, D * H};
      for (int k = 0; k < cell.states; ++k) {
        back.initial[k] = {initial_state(stack, k, layer, d, zeros), H};
        back.dstate[k] = {dstate[k] + (layer * D + d) * size, H};
        if (k != kH) back.history[k] = {of.history[k] + d * N * H, H};
      }
      product.h0 = back.initial[kH];
      if (of.saved) back.saved = {of.saved + d * N * cell.saved * H, cell.saved * H};
      back.dgates = {dgates + d * N * EH, EH}, product.dgates = {dgates + d * N * EH, EH};
      if (!products.weights) continue;
      const size_t place = begin + size_t(d * each);
      product.dw_ih = {make(place, {GH, I}), I}, product.dw_hh = {make(place + 1, {GH, H}), H};
      product.db_ih = make(stack.biases > 0 ? place + 2 : nowhere, {GH});
      product.db_hh = make(stack.biases > 1 ? place + 3 : nowhere, {GH});
    }
    problems.push_back({scan, products});
    dy = dx;
  }
  bool enough = true;
  {
    const WithoutGil released;
    const Kernels<S>& kernels = stack.kernels->of<S>();
    for (const auto& [scan, products] : problems) {
      enough = enough && kernels.backward(scan);
      if (products.dx || products.weights) enough = enough && kernels.products(products);
    }
  }
  check_memory(enough);
  for (Object& result : results)
    if (!result) result.reset(Py_NewRef(Py_None));
  return tuple_of(results);
}

/// f(), with the errors of C++ as Python's.
template <class F>
PyObject* guarded(F f) {
  try {
    return f();
  } catch (const PythonError&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* wrong_count(const char* name) {
  PyErr_Format(PyExc_TypeError, "%s: wrong number of arguments", name);
  return nullptr;
}

/// forward(cell, x, states, weights, layers, directions, batch_first, differentiable, packs)
PyObject* py_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 9) return wrong_count("forward");
  return guarded([&]() -> PyObject* {
    Reader reader(args[7] == Py_True);
    Stack stack;
    if (!read_stack(args, reader, stack)) return Py_NewRef(Py_None);
    std::vector<Bytes> packs;
    if (!read_packs(args[8], stack.L, packs)) return Py_NewRef(Py_None);
    const bool keep = reader.requires_grad();
    return reader.bits() == 32 ? forward<float>(stack, keep, packs) : forward<double>(stack, keep, packs);
  });
}

/// backward(cell, x, states, weights, layers, directions, batch_first, y, kept, gradients, over, wanted)
PyObject* py_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 12) return wrong_count("backward");
  return guarded([&]() -> PyObject* {
    Reader reader(false);
    Stack stack;
    BackwardArguments call;
    if (!read_stack(args, reader, stack) || !read_backward(args, reader, stack, call))
      return Py_NewRef(Py_None);
    return reader.bits() == 32 ? backward<float>(stack, call) : backward<double>(stack, call);
  });
}

// A function of METH_FASTCALL has three arguments, and the table's type two.
template <PyObject* (*kFunction)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kFunction)), METH_FASTCALL,
          nullptr};
}

}  // namespace

PyMethodDef* methods() {
  static PyMethodDef all[] = {
      method<begin>("begin"), method<py_forward>("forward"), method<py_backward>("backward"), {}};
  return all;
}

}  // namespace fastrnn::direct
