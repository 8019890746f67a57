// The product of a block's rows of W with the columns of a step, and the barrier between the blocks.
#pragma once
#include "cuda/geometry.h"
#include "cuda/multiply.cuh"
#include "cuda/steps.cuh"

namespace fastrnn {

/// A warp's share of W: its row tiles, in every depth_warps-th chunk of K. The one-block form divides rows
/// and depth among the warps; with many blocks every warp has all rows of its block and divides depth alone.
template <class M, Shape kShape, bool kOneBlock>
class WarpTiles {
 public:
  __device__ WarpTiles(const Geometry& g, char* spilled, char* stage)
      : g_(g),
        warp_(dev::warp_index()),
        lane_(int(threadIdx.x) % 32),
        first_(kOneBlock ? warp_ / g.row_warps : warp_),
        first_row_(kOneBlock ? warp_ % g.row_warps * kShape.row_tiles * kTileRows : 0),
        spilled_(reinterpret_cast<uint4*>(spilled) + warp_ * g.spilled * kShape.row_tiles * 64 + lane_),
        // mutant: one-stage-for-all-warps
        stage_(stage + warp_ * kShape.staged * kTileColumns * kChunkBytes) {}

  /// word(row, chunk, i): 32 bits of W, numbers 4 * i bytes into the chunk.
  template <class Word>
  __device__ void load(Word word) {
#pragma unroll
    for (int c = 0; c < kShape.resident; ++c)
#pragma unroll
      for (int m = 0; m < kShape.row_tiles; ++m) load_tile(resident_[c][m], m, c, word);
    if (idle()) return;
    for (int c = kShape.resident; c < g_.per_warp; ++c)
      for (int m = 0; m < kShape.row_tiles; ++m) {
        Tile tile;
        load_tile(tile, m, c, word);
        uint4* const to = spilled_tile(c, m);
        to[0] = {tile[0], tile[1], tile[2], tile[3]};
        to[32] = {tile[4], tile[5], tile[6], tile[7]};
      }
  }

  /// partial [depth warp][batch][partial_stride] = W columns, the columns being g.batch rows of the exchange.
  /// Columns come from global memory: the next group of chunks is loaded while this one is multiplied.
  template <class Load>
  __device__ void multiply(const char* columns, float* partial, Load load) const {
    if (idle()) return;
    const char* at = columns + lane_ / 4 * g_.stride() + first_ * kChunkBytes + lane_ % 4 * 16;
    Group now, next;
    fetch(now, at, 0, load);
    for (int left = g_.rows; left > 0; left -= kTileColumns) {
      const char* const after = dev::opaque(at + kTileColumns * g_.stride());
      const auto fetch_next = [&](int first) {
        if (first < g_.per_warp)
          fetch(next, at, first, load);
        else if (left > kTileColumns)
          fetch(next, after, 0, load);  // mutant: next-columns-are-those-of-now
      };
      Sums sums[kChains] = {};
#pragma unroll
      for (int first = 0; first < kShape.resident; first += kShape.group) {
        if (first > 0 && first >= g_.per_warp) break;
        fetch_next(first + kShape.group);
#pragma unroll
        for (int c = 0; c < kShape.group; ++c)
          if (first + c < g_.per_warp) add(sums, resident_[first + c], now[c], left);
        move(now, next);
      }
      for (int first = kShape.resident; first < g_.per_warp; first += kShape.group) {
        fetch_next(first + kShape.group);
#pragma unroll
        for (int c = 0; c < kShape.group; ++c)
          if (first + c < g_.per_warp) add_spilled(sums, first + c, now[c], left);
        move(now, next);
      }
      put(sums, partial + (g_.rows - left) * g_.partial_stride(kShape));
      at = after;
    }
  }

 private:
  // Additions into one accumulator are serial, so a single tile uses two.
  static constexpr int kChains = kShape.row_tiles == 1 ? 2 : 1;
  using Sums = float[kShape.row_tiles][M::kAccumulators];
  using Group = uint4[kShape.group];  // a lane's share of chunks of 8 columns
  static_assert(kShape.resident % kShape.group == 0);

  /// Beyond the last whole set of row_warps.
  __device__ bool idle() const { return kOneBlock && first_ >= g_.depth_warps; }
  __device__ int depth_warps() const { return kOneBlock ? g_.depth_warps : kShape.warps; }
  __device__ uint4* spilled_tile(int c, int m) const {
    // mutant: spilled-tiles-in-one-place
    return spilled_ + ((c - kShape.resident) * kShape.row_tiles + m) * 64;
  }

  /// Of the warp's chunk number c.
  template <class Word>
  __device__ void load_tile(Tile& tile, int m, int c, Word word) const {
    const int chunk = first_ + c * depth_warps();
#pragma unroll
    for (int i = 0; i < kTileWords; ++i)
      tile[i] = chunk < g_.chunks && !idle()
                    ? word(first_row_ + m * kTileRows + M::row(lane_, i), chunk, M::word(lane_, i))
                    : 0;
  }

  /// The chunks from number c on.
  template <class Load>
  __device__ void fetch(Group& group, const char* at, int c, Load load) const {
#pragma unroll
    for (int k = 0; k < kShape.group; ++k)
      if (c + k < g_.per_warp)
        group[k] = load(reinterpret_cast<const uint4*>(at + (c + k) * depth_warps() * kChunkBytes));
  }
  __device__ static void move(Group& to, const Group& from) {
#pragma unroll
    for (int k = 0; k < kShape.group; ++k) to[k] = from[k];
  }

  __device__ void add(Sums (&sums)[kChains], const Tile (&w)[kShape.row_tiles], const uint4& columns,
                      int left) const {
    M::add(sums[0], sums[kChains - 1], w, columns, stage_, lane_, left);
  }
  __device__ void add_spilled(Sums (&sums)[kChains], int c, const uint4& columns, int left) const {
    Tile w[kShape.row_tiles];
#pragma unroll
    for (int m = 0; m < kShape.row_tiles; ++m) {
      const uint4 low = spilled_tile(c, m)[0], high = spilled_tile(c, m)[32];
      w[m][0] = low.x, w[m][1] = low.y, w[m][2] = low.z, w[m][3] = low.w;
      w[m][4] = high.x, w[m][5] = high.y, w[m][6] = high.z, w[m][7] = high.w;
    }
    add(sums, w, columns, left);
  }

  __device__ void put(Sums (&sums)[kChains], float* partial) const {
    const int stride = g_.partial_stride(kShape);
    float* const to = partial + first_ * g_.batch * stride + first_row_;
#pragma unroll
    for (int m = 0; m < kShape.row_tiles; ++m) {
      if constexpr (kChains == 2)
#pragma unroll
        for (int i = 0; i < M::kAccumulators; ++i) sums[0][m][i] += sums[1][m][i];
      M::finish(sums[0][m]);
      if (!M::has_sums(lane_)) continue;
#pragma unroll
      for (int i = 0; i < M::kAccumulators; ++i)
        // mutant: sums-transposed
        to[M::sum_column(lane_, i) * stride + m * kTileRows + M::sum_row(lane_, i)] = sums[0][m][i];
    }
  }

  const Geometry& g_;
  const int warp_, lane_;
  const int first_, first_row_;  // the first of its chunks, and of its rows
  uint4* const spilled_;
  char* const stage_;
  Tile resident_[kShape.resident][kShape.row_tiles];
};

/// The sums over the depth warps, for the kRows rows of W of one unit and one column.
template <Shape kShape, bool kOneBlock, int kRows>
__device__ __forceinline__ void total(float (&sums)[kRows], const Geometry& g, const float* partial, int unit,
                                      int column) {
  const int stride = g.partial_stride(kShape), depth_warps = kOneBlock ? g.depth_warps : kShape.warps;
  const float* const from = partial + column * stride + unit * kRows;
#pragma unroll
  for (int i = 0; i < kRows; ++i) sums[i] = 0;
#pragma unroll(kOneBlock ? 1 : kShape.warps)
  for (int k = 0; k < depth_warps; ++k) {  // mutant: total-misses-a-depth-warp
    const float* const found = from + k * g.batch * stride;
    if constexpr (kRows == 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(found);
      sums[0] += dev::as_float(four.x), sums[1] += dev::as_float(four.y);
      sums[2] += dev::as_float(four.z), sums[3] += dev::as_float(four.w);
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums[i] += found[i];
    }
  }
}

/// The blocks of a direction and replica exchange the columns of the next product: two buffers in turn, in
/// global memory, or in shared memory where one block has all units. Every block writes its columns, counts
/// itself as arrived, and waits until all have arrived. Two buffers are enough: a block that arrives for the
/// second buffer has finished reading the first one, which may then be written again.
template <bool kOneBlock>
class Exchange {
 public:
  __device__ Exchange(const Geometry& g, const Place& place, char* global, char* shared, uint32_t* arrived)
      : g_(g),
        buffers_(kOneBlock ? shared
                           // mutant: exchange-of-all-replicas-in-one-place
                           : global + size_t(place.direction * g.replicas + place.replica) * 2 *
                                          g.exchange_bytes()),
        arrived_(arrived + place.direction * g.replicas + place.replica) {}

  /// Columns of a step: rows of g.stride() bytes.
  // mutant: exchange-one-buffer
  __device__ char* columns(int step) const { return buffers_ + (step & 1) * g_.exchange_bytes(); }

  /// The columns of this step are written, by every thread of the block.
  __device__ void arrive() const {
    __syncthreads();  // mutant: arrive-without-barrier
    if (!kOneBlock && threadIdx.x == 0) dev::add_release(arrived_, 1);  // mutant: arrive-by-plain-add
  }
  /// Waits until every block has written its columns of this step. One thread polls for its block: polling
  /// loads of more threads delay the arrivals of the others (benchmarks/NOTES.md).
  __device__ void wait(int step) const {
    if (kOneBlock) return;
    // mutant: wait-one-step-early, wait-for-one-block-too-few
    if (threadIdx.x == 0) dev::wait_until(arrived_, uint32_t(step + 1) * uint32_t(g_.blocks), step);
    __syncthreads();  // mutant: wait-by-one-thread
  }
  __device__ static uint4 load(const uint4* p) {
    if constexpr (kOneBlock)
      return *p;
    else
      return dev::load_l2(p);
  }

 private:
  const Geometry& g_;
  char* const buffers_;
  uint32_t* const arrived_;
};

}  // namespace fastrnn
