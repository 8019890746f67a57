// The scans of a call on a device: which path it takes, and its launches in their order. The device is a
// class, for there are two: CUDA (device.h), and the CPU that runs the kernels in the tests. It has
//   limits                                   DeviceLimits
//   tf32                                     whether float32 is rounded to it
//   launch(kernel, Grid, parameters) -> bool   false: it cannot hold all blocks of a cooperative grid at once
//   multiply(out, a, b), multiply_add(out, addend, a, b)   torch's matrix products
//   copy(numbers, count) -> Tensor           int64 numbers of the host on the device
//   clear(memory, bytes)
#pragma once
#include <atomic>
#include <string>
#include <type_traits>
#include <vector>

#include "common/operators.h"
#include "cuda/persistent_backward.cuh"
#include "cuda/persistent_forward.cuh"
#include "cuda/step.cuh"

namespace fastrnn {

struct Grid {
  int64_t blocks;
  int threads, shared_bytes;
  bool cooperative;
};

/// A sequence whose arrays are on the device, by one copy.
template <class Device>
class DeviceSequence {
 public:
  DeviceSequence(Device& device, const Sequence& host) : sequence_(host) {
    struct Part {
      const int64_t*& here;
      int64_t count;
    };
    const Part parts[] = {
        {sequence_.offsets, host.T + 1}, {sequence_.counts, host.T}, {sequence_.order, host.B}};
    std::vector<int64_t> numbers;
    for (const Part& part : parts)
      if (part.here) numbers.insert(numbers.end(), part.here, part.here + part.count);
    sequence_.last = nullptr;
    if (numbers.empty()) return;
    memory_.push_back(device.copy(numbers.data(), int64_t(numbers.size())));
    const int64_t* next = static_cast<const int64_t*>(memory_[0].const_data_ptr());
    for (const Part& part : parts)
      if (part.here) {
        part.here = next;
        next += part.count;
      }
  }
  const Sequence& get() const { return sequence_; }

 private:
  Sequence sequence_;
  Tensors memory_;  // none where there are no arrays
};

inline Tensor first_rows(const Tensor& matrix, int64_t n) {
  Tensor whole = matrix;
  return n == matrix.size(0) ? whole : torch::stable::narrow(whole, 0, 0, n);
}

/// f(M{}) with M the multiplier (multiply.cuh) of storage type S.
template <class S, class F>
void with_multiply(bool tf32, F f) {
  if constexpr (std::is_same_v<S, float>)
    tf32 ? f(TensorCore<float>{}) : f(Ffma{});
  else
    f(TensorCore<S>{});
}

/// f(S{}) with S as the kernels store the numbers of a tensor.
template <class F>
void with_storage(const Tensor& like, F f) {
  using torch::headeronly::ScalarType;
  switch (like.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(dev::f16{});
    case ScalarType::BFloat16:
      return f(dev::bf16{});
    default:
      STD_TORCH_CHECK(false, "fastrnn's CUDA kernels take float32, float64, float16 and bfloat16");
  }
}

/// Room for the exchange and, after it, the counters of arrivals: all zero.
struct ExchangeMemory {
  Tensor memory;
  char* exchange;
  uint32_t* arrived;

  template <class Device>
  ExchangeMemory(const Device& device, const Geometry& g, int directions, const Tensor& like) {
    const int64_t groups = int64_t(directions) * g.replicas;
    const int64_t bytes = groups * 2 * g.exchange_bytes() + round_up(int(groups) * 4, 16);
    memory = empty({bytes / int64_t(like.element_size())}, like);
    exchange = static_cast<char*>(memory.mutable_data_ptr());
    device.clear(exchange, bytes);  // mutant: driver-exchange-not-cleared
    arrived = reinterpret_cast<uint32_t*>(exchange + groups * 2 * g.exchange_bytes());
  }
};

/// Said once, where a scan that was to be one launch is one launch a step.
inline void warn_of_single_steps(int64_t blocks) {
  static std::atomic_flag said;
  if (said.test_and_set()) return;
  const std::string message =
      "fastrnn: the device cannot hold the " + std::to_string(blocks) +
      " blocks of a scan at once, which wait for one another; a limit of MPS or a green context may leave "
      "only a part of it. Each step is a launch of its own, which is slower";
  aoti_torch_warn(__func__, __FILE__, __LINE__, message.c_str());
}

template <class Device, class Cell>
class Driver {
 public:
  explicit Driver(Device& device) : device_(device) {}

  void forward(const ForwardCall& call) {
    if (call.N == 0) return copy_states(call);
    // mutant: rows-of-no-step-not-cleared
    if (call.layout.get().counts) clear({call.y}), clear(call.history), clear(call.saved);
    const DeviceSequence<Device> sequence(device_, call.layout.get());
    with_storage(call.y, [&]<class S>(S) {
      const auto problem = call.template problem<S>(sequence.get());
      Tensors gates_x;
      for (int64_t d = 0; d < call.sizes.D; ++d) gates_x.push_back(input_gates(call, d));
      if constexpr (kPersistent)
        if (!problem.direction[0].options.on && forward_persistent(call, problem, gates_x)) return;
      for (int64_t d = 0; d < call.sizes.D; ++d)
        if (problem.direction[d].options.on)
          forward_steps<true>(call, problem, gates_x[size_t(d)], d);
        else
          forward_steps<false>(call, problem, gates_x[size_t(d)], d);
    });
  }

  void backward(const BackwardCall& call) {
    if (call.N == 0) return;
    if (call.layout.get().counts) {
      if (!call.over) clear({call.dgates});
      clear(call.complete);
    }
    const DeviceSequence<Device> sequence(device_, call.layout.get());
    with_storage(call.y, [&]<class S>(S) {
      const auto problem = call.template problem<S>(sequence.get());
      if constexpr (kPersistent)
        if (!problem.direction[0].options.on && backward_persistent(call, problem)) return;
      for (int64_t d = 0; d < call.sizes.D; ++d)
        problem.direction[d].options.on ? backward_steps<true>(call, problem, d)
                                        : backward_steps<false>(call, problem, d);
    });
  }

 private:
  static constexpr CellInfo kInfo = Cell::kInfo;
  static constexpr int64_t G = kInfo.gates;
  static constexpr bool kPersistent = kInfo.dense && !kInfo.staged();

  static void clear(Tensors tensors) {
    for (Tensor& tensor : tensors) torch::stable::zero_(tensor);
  }
  static void copy_states(const ForwardCall& call) {  // of a batch of none
    Tensor h_n = call.last[kH];
    torch::stable::copy_(h_n, call.states[kH]);
  }
  static Grid one_thread_each(int64_t count) {
    return {(count + kStepThreads - 1) / kStepThreads, kStepThreads, 0, false};
  }

  /// [N, G*H] = x W_ih^T + b_ih, or what x holds of it
  Tensor input_gates(const ForwardCall& call, int64_t d) {
    if constexpr (kInfo.takes_gates) {
      Tensor x = call.x;
      return torch::stable::narrow(x, 1, d * G * call.sizes.H, G * call.sizes.H);
    }
    Tensor gates = empty({call.N, G * call.sizes.H}, call.y);
    const Tensor w = torch::stable::transpose(call.weights.at(kWeightIh, d), 0, 1);
    if (!call.weights.has(kBiasIh))
      device_.multiply(gates, call.x, w);
    else
      device_.multiply_add(gates, call.weights.at(kBiasIh, d), call.x, w);
    return gates;
  }

  template <class S, class Problem>
  Choice persistent(const Problem& problem, bool forward, Arithmetic arithmetic, bool projected) const {
    if (*no_persistent_reason(std::is_same_v<S, double>, projected, problem.sequence.T, problem.sequence.B))
      return {};
    const ScanSizes sizes{int(problem.H), int(problem.sequence.B), problem.directions};
    return choose(forward, arithmetic, G, sizes, device_.limits);
  }

  static Grid grid_of(const Choice& choice, bool forward, Arithmetic arithmetic, int directions) {
    const Shape shape = shape_of(choice.form, forward, arithmetic, G);
    const Geometry& g = choice.geometry;
    return {g.grid(directions), shape.threads(), shared_memory(choice.form, shape, g).bytes, g.blocks > 1};
  }

  template <class S>
  bool forward_persistent(const ForwardCall& call, const ForwardProblem<S>& problem, const Tensors& gates_x) {
    bool done = false;
    if constexpr (!std::is_same_v<S, double>)
      with_multiply<S>(device_.tf32, [&]<class M>(M) {
        const Choice choice = persistent<S>(problem, true, M::kArithmetic, call.weights.projected);
        if (choice.form == Form::kNone) return;
        const ExchangeMemory memory(device_, choice.geometry, problem.directions, call.y);
        PersistentForward<S> p{problem, {}, choice.geometry, memory.exchange, memory.arrived};
        for (size_t d = 0; d < gates_x.size(); ++d) p.gates_x[d] = rows<S>(gates_x[d]);
        const Grid grid = grid_of(choice, true, M::kArithmetic, problem.directions);
        // mutant: forward-grid-too-large-taken-for-done
        done = device_.launch(choice.form == Form::kOneBlock ? persistent_forward<Cell, M, Form::kOneBlock>
                                                             : persistent_forward<Cell, M, Form::kManyBlocks>,
                              grid, p);
        if (!done) warn_of_single_steps(grid.blocks);
      });
    return done;
  }

  template <class S>
  bool backward_persistent(const BackwardCall& call, const BackwardProblem<S>& problem) {
    bool done = false;
    if constexpr (!std::is_same_v<S, double>)
      with_multiply<S>(device_.tf32, [&]<class M>(M) {
        const Choice choice = persistent<S>(problem, false, M::kArithmetic, call.weights.projected);
        if (choice.form == Form::kNone) return;
        const ExchangeMemory memory(device_, choice.geometry, problem.directions, call.y);
        const Grid grid = grid_of(choice, false, M::kArithmetic, problem.directions);
        const int64_t shares = choice.geometry.replicas * (grid.threads / choice.geometry.units);
        const Tensor du = shares_of_vectors<S>(call, problem.directions * shares);
        const PersistentBackward<S> p{problem, choice.geometry, memory.exchange, memory.arrived,
                                      pointer<float>(du)};
        // mutant: backward-grid-too-large-taken-for-done
        done =
            device_.launch(choice.form == Form::kOneBlock ? persistent_backward<Cell, M, Form::kOneBlock>
                                                          : persistent_backward<Cell, M, Form::kManyBlocks>,
                           grid, p);
        if (!done) return warn_of_single_steps(grid.blocks);
        for (int d = 0; d < problem.directions; ++d)
          add_up_vectors(problem.direction[d], pointer<float>(du) + d * shares * vectors(call), shares, call);
      });
    return done;
  }

  template <bool kOptions, class S>
  void forward_steps(const ForwardCall& call, const ForwardProblem<S>& problem, const Tensor& gates_x,
                     int64_t d) {
    const Sequence& host = call.layout.get();
    const auto [D, B, I, H, P] = call.sizes;
    const Tensor& like = call.y;
    const Tensor h = accumulators<S>({B, P}, like), others = accumulators<S>({kInfo.states - 1, B, H}, like);
    const Tensor h_in = empty({B, P}, like), gates_h = empty({kInfo.dense ? B : 0, G * H}, like);
    const Tensor after = accumulators<S>({kInfo.staged() ? kInfo.states : 0, B, H}, like);
    const bool projects = call.weights.projected;
    const Tensor hidden = empty({projects ? B : 0, H}, like), projected = empty({projects ? B : 0, P}, like);
    ForwardStep<S> p{.sequence = problem.sequence,
                     .direction = problem.direction[d],
                     .states = {pointer<Acc<S>>(h), pointer<Acc<S>>(others), pointer<S>(h_in),
                                pointer<Acc<S>>(after), kInfo.states},
                     .reverse = d == 1,
                     .H = H,
                     .P = P,
                     .t = -1,
                     .t_next = d == 0 ? 0 : host.T - 1,
                     .gates_x = rows<S>(gates_x),
                     .gates_h = pointer<S>(gates_h),
                     .hidden = projects ? pointer<S>(hidden) : nullptr,
                     .projected = projects ? pointer<S>(projected) : nullptr};
    const Grid states = one_thread_each(B * larger(int(P), int(H)));
    device_.launch(begin_forward<S>, states, p);
    if constexpr (!kInfo.dense) device_.launch(forward_alone<Cell, kOptions, S>, one_thread_each(B * H), p);
    for (int64_t step = 0; kInfo.dense && step < host.T; ++step) {
      p.t = p.t_next;
      p.t_next += d == 0 ? 1 : -1;
      const int64_t n = host.rows(p.t);
      if (n > 0) {
        Tensor out = first_rows(gates_h, n);
        device_.multiply(out, first_rows(h_in, n),
                         torch::stable::transpose(call.weights.at(kWeightHh, d), 0, 1));
      }
      if constexpr (kInfo.staged())
        device_.launch(forward_row<Cell, kOptions, S>, Grid{B, kStepThreads, kRowSharedBytes<S>, false}, p);
      else
        // mutant: single-steps-rows-yet-to-begin-not-reset
        device_.launch(forward_step<Cell, kOptions, S>, one_thread_each(B * H), p);
      if constexpr (kInfo.projects)
        if (projects) {
          if (n > 0) {
            Tensor out = first_rows(projected, n);
            device_.multiply(out, first_rows(hidden, n),
                             torch::stable::transpose(call.weights.at(kWeightHr, d), 0, 1));
          }
          device_.launch(forward_projected<S>, one_thread_each(B * P), p);
        }
    }
    device_.launch(end_forward<S>, states, p);
  }

  template <bool kOptions, class S>
  void backward_steps(const BackwardCall& call, const BackwardProblem<S>& problem, int64_t d) {
    const Sequence& host = call.layout.get();
    const auto [D, B, I, H, P] = call.sizes;
    const Tensor& like = call.y;
    const bool projects = call.weights.projected;
    const Tensor dh = empty({B, P}, like), dgates_h = empty({kInfo.dense ? B : 0, G * H}, like);
    const Tensor dgates = accumulators<S>({kInfo.staged() ? B : 0, kInfo.gradients() * H}, like);
    const Tensor dothers = accumulators<S>({kInfo.states - 1, B, H}, like);
    const Tensor direct = empty({kInfo.before(kH) ? B : 0, H}, like);
    const Tensor carry = accumulators<S>({kOptions ? B : 0, P}, like);
    const Tensor dh_complete = empty({projects ? B : 0, P}, like),
                 dh_hidden = empty({projects ? B : 0, H}, like);
    const Tensor du = shares_of_vectors<S>(call, B);
    BackwardStep<S> p{.sequence = problem.sequence,
                      .direction = problem.direction[d],
                      .reverse = d == 1,
                      .H = H,
                      .P = P,
                      .t = 0,
                      .dh = pointer<S>(dh),
                      .dothers = pointer<Acc<S>>(dothers),
                      .states = kInfo.states,
                      .direct = kInfo.before(kH) ? pointer<S>(direct) : nullptr,
                      .carry = pointer<Acc<S>>(carry),
                      .dgates_h = pointer<S>(dgates_h),
                      .dh_complete = projects ? pointer<S>(dh_complete) : nullptr,
                      .du = pointer<Acc<S>>(du),
                      .dgates = pointer<Acc<S>>(dgates),
                      .dh_hidden = projects ? pointer<S>(dh_hidden) : nullptr};
    const Grid states = one_thread_each(B * larger(int(P), int(H)));
    device_.launch(begin_backward<S>, states, p);
    if constexpr (!kInfo.dense) device_.launch(backward_alone<Cell, kOptions, S>, one_thread_each(B * H), p);
    for (int64_t step = 0; kInfo.dense && step < host.T; ++step) {
      p.t = d == 0 ? host.T - 1 - step : step;  // mutant: one-direction-for-both
      const int64_t n = host.rows(p.t);
      if (n == 0) continue;
      if constexpr (kInfo.projects)
        if (projects) {
          device_.launch(backward_projected<S>, one_thread_each(n * P), p);
          Tensor out = first_rows(dh_hidden, n);
          device_.multiply(out, first_rows(dh_complete, n), call.weights.at(kWeightHr, d));
        }
      if constexpr (kInfo.staged())
        device_.launch(backward_row<Cell, kOptions, S>, Grid{n, kStepThreads, kRowSharedBytes<S>, false}, p);
      else
        device_.launch(backward_step<Cell, kOptions, S>, one_thread_each(n * H), p);
      Tensor out = first_rows(dh, n);
      if constexpr (kInfo.before(kH) && !kOptions)
        device_.multiply_add(out, first_rows(direct, n), first_rows(dgates_h, n),
                             call.weights.at(kWeightHh, d));
      else
        device_.multiply(out, first_rows(dgates_h, n), call.weights.at(kWeightHh, d));
      if constexpr (kOptions) device_.launch(backward_carried<S>, one_thread_each(n * P), p);
    }
    device_.launch(end_backward<S>, states, p);
    add_up_vectors(problem.direction[d], p.du, B, call);
  }

  static int64_t vectors(const BackwardCall& call) { return kInfo.vectors * call.sizes.H; }

  /// `count` shares [U, H] of dL/du, zero.
  template <class S>
  Tensor shares_of_vectors(const BackwardCall& call, int64_t count) const {
    const Tensor shares = accumulators<S>({count * vectors(call)}, call.y);
    // mutant: driver-shares-not-cleared
    if (kInfo.vectors > 0) device_.clear(shares.mutable_data_ptr(), shares.numel() * sizeof(Acc<S>));
    return shares;
  }

  template <class S>
  void add_up_vectors(const BackwardDirection<S>& direction, const Acc<S>* shares, int64_t count,
                      const BackwardCall& call) const {
    if constexpr (kInfo.vectors > 0)
      device_.launch(add_up<S>, one_thread_each(vectors(call)),
                     AddUp<S>{shares, direction.du.data, count, vectors(call)});
  }

  template <class T>
  static T* pointer(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  /// Uninitialised, in the precision of the arithmetic.
  template <class S>
  static Tensor accumulators(const std::vector<int64_t>& sizes, const Tensor& like) {
    using torch::headeronly::ScalarType;
    return torch::stable::new_empty(like, sizes,
                                    std::is_same_v<S, double> ? ScalarType::Double : ScalarType::Float);
  }

  Device& device_;
};

/// The scans of the cells that are compiled for a device: each in a file of its own, which adds itself.
template <class Device>
struct Drivers {
  struct Scans {
    void (*forward)(Device&, const ForwardCall&);
    void (*backward)(Device&, const BackwardCall&);
  };
  static inline Scans of[AllCells::kCount];

  template <class Cell>
  static bool add() {
    of[AllCells::index<Cell>()] = {
        [](Device& device, const ForwardCall& call) { Driver<Device, Cell>(device).forward(call); },
        [](Device& device, const BackwardCall& call) { Driver<Device, Cell>(device).backward(call); }};
    return true;
  }

  static const Scans& of_cell(const CellInfo& cell) {
    const Scans* found = nullptr;
    with_cell<AllCells>(cell, [&]<class Cell>() { found = &of[AllCells::index<Cell>()]; });
    STD_TORCH_CHECK(found && found->forward, "the kernels of ", cell.name, " were not compiled");
    return *found;
  }

  // What the operators call (operators.h).
  static void forward(const ForwardCall& call) {
    Device device(call.y);
    of_cell(call.cell).forward(device, call);
  }
  static void backward(const BackwardCall& call) {
    Device device(call.y);
    of_cell(call.cell).backward(device, call);
  }
  static LayerWeights unpack(const CellInfo&, const Tensor&, const Tensor&) {
    STD_TORCH_CHECK(false, "packed weights are for the CPU");
  }
};

}  // namespace fastrnn
