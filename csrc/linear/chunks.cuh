// The linear scan on a device, parallel over time: steps are cut into chunks, and each unit of a chunk has a
// thread. A first launch finds what each chunk does to the state that it is given, m -> factor * m + sum; a
// second one applies the chunks before its own to h0, and runs its own steps from there. Where rows and units
// alone fill the device there is one chunk, and no first launch.
//
// The device is a class, as in cuda/driver.cuh.
#pragma once
#include <cmath>

#include "cuda/driver.cuh"
#include "linear/linear.h"

namespace fastrnn {

/// What the steps of a chunk do to a unit's state.
template <class S>
struct Chunk {
  Acc<S> factor, sum;
  bool reset;  // somewhere in the chunk: the factor is zero, and a NaN before it is forgotten too

  // mutant: chunk-carries-nan-past-a-reset
  __device__ __forceinline__ Acc<S> operator()(Acc<S> m) const { return reset ? sum : factor * m + sum; }
};

template <class S>
struct ChunkedProblem {
  LinearProblem<S> scan;  // its sequence has `last` on the device too
  int64_t chunks, steps;  // of a chunk
  Chunk<S>* before;  // [chunks - 1, B, H]
};

/// The work of one thread: unit j of row b (by number) in one chunk.
template <class S>
struct ChunkThread {
  const ChunkedProblem<S>& p;
  int64_t index, chunk, b, j;

  __device__ __forceinline__ explicit ChunkThread(const ChunkedProblem<S>& problem)
      : p(problem), index(int64_t(blockIdx.x) * blockDim.x + threadIdx.x) {
    const int64_t units = p.scan.sequence.B * p.scan.H;
    chunk = index / units;
    b = index % units / p.scan.H;
    j = index % p.scan.H;
  }

  __device__ __forceinline__ int64_t length() const { return p.scan.sequence.last_step(b) + 1; }

  /// f(row, a_t, b_t, whether a_t counts as zero) for the steps of the chunk that the row has. Several steps
  /// are loaded before the first one is computed, because each f waits for the one before.
  template <class F>
  __device__ __forceinline__ void each_step(F f) const {
    constexpr int kAhead = 8;
    const LinearProblem<S>& s = p.scan;
    const int64_t length = this->length(), begin = chunk * p.steps;
    const int64_t end = begin + p.steps < length ? begin + p.steps : length;
    for (int64_t k = begin; k < end; k += kAhead) {
      Acc<S> a[kAhead], x[kAhead];
      int64_t rows[kAhead];
      bool reset[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t at = k + i < end ? k + i : end - 1;  // no branch between the loads
        // mutant: chunk-reversed-from-T
        const int64_t t = s.reverse ? length - 1 - at : at;
        rows[i] = s.sequence.row(t, b);
        reset[i] = s.sequence.reset && s.sequence.reset[rows[i]];
        a[i] = load(s.a[rows[i]][j]);
        x[i] = load(s.b[rows[i]][j]);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (k + i < end) f(rows[i], a[i], x[i], reset[i]);  // mutant: chunk-steps-beyond-its-end
      }
    }
  }

  /// One step from the state m, which is changed -> h_t.
  __device__ __forceinline__ Acc<S> step(Acc<S> a, Acc<S> x, bool reset, Acc<S>& m) const {
    if (!p.scan.shifted) return m = reset ? x : a * m + x;
    const Acc<S> h = m + x;
    m = reset ? 0 : a * h;  // mutant: chunk-shifted-without-reset
    return h;
  }
};

template <class S>
__global__ void __launch_bounds__(256) find_chunks(const ChunkedProblem<S> problem) {
  const ChunkThread<S> thread(problem);
  if (thread.chunk >= problem.chunks - 1) return;
  Chunk<S> found{1, 0, false};
  thread.each_step([&](int64_t, Acc<S> a, Acc<S> x, bool reset) {
    thread.step(a, x, reset, found.sum);
    found.factor *= a;  // mutant: chunk-without-factor
    found.reset |= reset;
  });
  problem.before[thread.index] = found;
}

template <class S>
__global__ void __launch_bounds__(256) apply_chunks(const ChunkedProblem<S> problem) {
  const ChunkThread<S> thread(problem);
  if (thread.chunk >= problem.chunks) return;
  const LinearProblem<S>& s = problem.scan;
  const int64_t j = thread.j, batch = s.sequence.batch(thread.b), units = s.sequence.B * s.H;
  Acc<S> m = load(s.h0[batch][j]);
  // mutant: chunk-misses-the-one-before
  for (int64_t c = 0; c < thread.chunk; ++c) m = problem.before[c * units + thread.index % units](m);
  thread.each_step([&](int64_t row, Acc<S> a, Acc<S> x, bool reset) {
    s.h[row][j] = store<S>(thread.step(a, x, reset, m));
  });
  // mutant: last-state-of-the-first-chunk
  if (thread.chunk == problem.chunks - 1) s.last[batch][j] = store<S>(m);
  if (!s.sequence.counts) return;
  const int64_t begin = thread.chunk * problem.steps, length = thread.length();
  // mutant: chunk-padding-over-the-row
  for (int64_t t = begin > length ? begin : length; t < begin + problem.steps && t < s.sequence.T; ++t)
    s.h[s.sequence.row(t, thread.b)][j] = store<S>(0);
}

template <class Device>
struct ChunkedScan {
  static void run(const LinearCall& call) {
    Device device(call.h);
    const Sequence& host = call.layout.get();
    const DeviceSequence<Device> copied(device, host);
    Sequence sequence = copied.get();
    MaybeTensor last;
    if (host.last) {
      last = device.copy(host.last, host.B);
      sequence.last = static_cast<const int64_t*>(last->const_data_ptr());
    }
    with_storage(call.h, [&]<class S>(S) { run_chunks<S>(device, call, sequence); });
  }

 private:
  template <class S>
  static void run_chunks(const Device& device, const LinearCall& call, const Sequence& sequence) {
    constexpr int64_t kThreads = 256, kThreadsOfMultiprocessor = 1024;
    constexpr int64_t kFewestSteps = 16;  // of a chunk
    const int64_t units = call.B * call.H, T = std::max<int64_t>(sequence.T, 1);
    const int64_t wanted = ceil_div(device.limits.multiprocessors * kThreadsOfMultiprocessor, units);
    // A thread of the last chunk applies all others: no more of them than it has steps.
    const auto balanced = static_cast<int64_t>(std::sqrt(static_cast<double>(T)));
    const int64_t most = std::clamp<int64_t>(T / kFewestSteps, 1, balanced);
    const int64_t steps = ceil_div(T, std::clamp<int64_t>(wanted, 1, most)), chunks = ceil_div(T, steps);
    ChunkedProblem<S> problem{call.problem<S>(sequence), chunks, steps, nullptr};
    MaybeTensor before;
    const auto grid = [&](int64_t count) {
      return Grid{ceil_div(count * units, kThreads), int(kThreads), 0, false};
    };
    if (chunks > 1) {
      before = torch::stable::new_empty(call.h, {(chunks - 1) * units * int64_t(sizeof(Chunk<S>))},
                                        torch::headeronly::ScalarType::Byte);
      problem.before = static_cast<Chunk<S>*>(before->mutable_data_ptr());
      device.launch(find_chunks<S>, grid(chunks - 1), problem);
    }
    device.launch(apply_chunks<S>, grid(chunks), problem);
  }

  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

}  // namespace fastrnn
