// Where a thread finds its numbers at each step. Every address costs one instruction: a step takes about a
// microsecond and a warp issues its instructions in order, so address arithmetic would show.
#pragma once
#include <type_traits>

#include "common/problem.h"
#include "cuda/device.cuh"
#include "cuda/geometry.h"

namespace fastrnn {

/// Column j of a matrix of rows.
template <class S>
struct Column {
  using Byte = std::conditional_t<std::is_const_v<S>, const char, char>;
  Byte* data;
  int stride;  // in bytes
  bool exists;

  Column() = default;
  __device__ __forceinline__ Column(const Rows<S>& rows, int64_t j)
      : data(reinterpret_cast<Byte*>(rows.data + (rows.data ? j : 0))),
        stride(int(rows.stride * int64_t(sizeof(S)))),
        exists(rows.data != nullptr) {}
  __device__ __forceinline__ explicit operator bool() const { return exists; }
  __device__ __forceinline__ S& operator[](int64_t row) const {
    return *reinterpret_cast<S*>(data + row * stride);
  }
};

/// The units, rows and direction of a block.
struct Place {
  int direction, replica, first_unit, units, first_row, rows;

  __device__ Place(const Geometry& g, int units_of_a_block, int H, int B)
      : direction(int(blockIdx.x) / (g.blocks * g.replicas)),
        replica(int(blockIdx.x) / g.blocks % g.replicas),
        first_unit(int(blockIdx.x) % g.blocks * units_of_a_block),
        units(smaller(units_of_a_block, H - first_unit)),  // mutant: units-beyond-H
        first_row(replica * g.rows),  // mutant: replicas-as-far-apart-as-tiles
        rows(smaller(g.rows, B - first_row)) {}
};

/// The (unit, row) pairs that a thread finishes at every step: one unit, in rows first, first + between, ...
/// of the block.
struct Share {
  int unit, between, first;

  __device__ Share(int units_of_a_block, const Place& place, int threads)
      : unit(int(threadIdx.x) % units_of_a_block),
        between(threads / units_of_a_block),
        first(int(threadIdx.x) / units_of_a_block) {
    if (unit >= place.units || first >= between) first = place.rows;  // nothing
  }
  __device__ int row(int i) const { return first + i * between; }
};

/// The steps of a scan over a sequence of fewer than 2^31 rows, as a block sees them.
class Steps {
 public:
  __device__ Steps(const Sequence& sequence, const Place& place, bool from_the_end)
      : T(int(sequence.T)),
        sequence_(sequence),
        first_row_(place.first_row),
        rows_(place.rows),
        t_stride_(from_the_end ? -int(sequence.t_stride) : int(sequence.t_stride)),
        t_first_(from_the_end ? (T - 1) * int(sequence.t_stride) : 0),
        from_the_end_(from_the_end),
        ragged_(sequence.offsets || sequence.counts) {}

  const int T;

  /// The first of a step's rows in every matrix of rows, and how many of the block's take part in it: none
  /// beyond the last step.
  struct Rows {
    int start, active;
  };
  __device__ Rows at(int step) const {
    if (ragged_) return ragged(step);
    return {t_first_ + step * t_stride_, step < T ? rows_ : 0};
  }
  /// Of a row of the block: its place in the batch, and its row, counted from the first one of a step.
  __device__ int batch(int b) const { return int(sequence_.batch(first_row_ + b)); }
  __device__ int offset(int b) const { return batch(b) * int(sequence_.b_stride); }

  /// Whether the state is zeroed before a row.
  __device__ bool resets(int row) const { return sequence_.reset && sequence_.reset[row]; }
  /// The same of a row of the block at any step; false where it takes no part.
  __device__ bool resets_if_any(int step, int b, int offset) const {
    if (!sequence_.reset) return false;
    const Rows rows = at(step);
    return b < rows.active && sequence_.reset[rows.start + offset];  // mutant: reset-of-no-row
  }

 private:
  __device__ Rows ragged(int step) const {
    if (step >= T) return {0, 0};
    const int t = from_the_end_ ? T - 1 - step : step;
    // mutant: replicas-count-rows-from-0
    return {int(sequence_.start(t)), smaller(int(sequence_.rows(t)) - first_row_, rows_)};
  }

  const Sequence& sequence_;
  const int first_row_, rows_, t_stride_, t_first_;
  const bool from_the_end_, ragged_;
};

}  // namespace fastrnn
