// The product of a block's rows of W with the columns of a step, and the meeting of the blocks.
#pragma once
#include "cuda/geometry.h"
#include "cuda/multiply.cuh"

namespace fastrnn {

/// A warp's share of W: the tiles of its rows, of every depth_warps-th chunk of K.
template <class M, Shape kShape>
class WarpTiles {
 public:
  __device__ WarpTiles(const Geometry& g, char* shared)
      : g_(g),
        warp_(int(threadIdx.x) / 32),
        lane_(int(threadIdx.x) % 32),
        first_(warp_ / g.row_warps),
        spilled_(reinterpret_cast<uint4*>(shared) + warp_ * g.spilled * kShape.row_tiles * 64) {}

  /// Warps beyond the last whole set of row_warps have nothing to do.
  __device__ bool works() const { return first_ < g_.depth_warps; }
  __device__ int first_row() const { return warp_ % g_.row_warps * kShape.row_tiles * kTileRows; }

  /// word(row, chunk, i): 32 bits of W, numbers 4 * i bytes into the chunk.
  template <class Word>
  __device__ void load(Word word) {
#pragma unroll
    for (int c = 0; c < kShape.resident; ++c)
#pragma unroll
      for (int m = 0; m < kShape.row_tiles; ++m)
        if (works()) load_tile(resident_[c][m], m, chunk(c), word);
    if (!works()) return;
    for (int c = 0; c < g_.spilled; ++c)
      for (int m = 0; m < kShape.row_tiles; ++m) {
        Tile tile;
        load_tile(tile, m, chunk(kShape.resident + c), word);
        uint4* const to = spilled_ + (c * kShape.row_tiles + m) * 64 + lane_;
        to[0] = {tile[0], tile[1], tile[2], tile[3]};
        to[32] = {tile[4], tile[5], tile[6], tile[7]};
      }
  }

  /// partial [depth warp][row][batch + 1] = W columns, the columns being g.batch rows of the exchange.
  template <class Load>
  __device__ void multiply(const char* columns, float* partial, Load load) const {
    if (!works()) return;
    const int tiles = g_.batch / kTileColumns;
    typename M::Columns now[kShape.resident], next[kShape.resident];
    fetch(now, columns, load);
    for (int n = 0; n < tiles; ++n) {
      const char* const at = columns + n * kTileColumns * g_.stride();
      if (n + 1 < tiles) fetch(next, at + kTileColumns * g_.stride(), load);
      float sums[kShape.row_tiles][M::kAccumulators] = {};
      add_resident(sums, now, at, load);
      add_spilled(sums, at, load);
      put(sums, partial + n * kTileColumns);
#pragma unroll
      for (int c = 0; c < kShape.resident; ++c) now[c] = next[c];
    }
  }

 private:
  using Sums = float[kShape.row_tiles][M::kAccumulators];

  __device__ int chunk(int index) const { return first_ + index * g_.depth_warps; }

  template <class Word>
  __device__ void load_tile(Tile& tile, int m, int chunk, Word word) const {
#pragma unroll
    for (int i = 0; i < kTileWords; ++i)
      tile[i] = chunk < g_.chunks
                    ? word(first_row() + m * kTileRows + M::row(lane_, i), chunk, M::word(lane_, i))
                    : 0;
  }

  template <class Load>
  __device__ void fetch(typename M::Columns (&columns)[kShape.resident], const char* at, Load load) const {
#pragma unroll
    for (int c = 0; c < kShape.resident; ++c)
      if (chunk(c) < g_.chunks) columns[c] = M::fetch(at + chunk(c) * kChunkBytes, g_.stride(), lane_, load);
  }

  template <class Load>
  __device__ void add_resident(Sums& sums, const typename M::Columns (&columns)[kShape.resident],
                               const char* at, Load load) const {
#pragma unroll
    for (int c = 0; c < kShape.resident; ++c)
      if (chunk(c) < g_.chunks)
        M::add(sums, resident_[c], columns[c], at + chunk(c) * kChunkBytes, g_.stride(), lane_, load);
  }

  template <class Load>
  __device__ void add_spilled(Sums& sums, const char* at, Load load) const {
    for (int c = 0; c < g_.spilled; ++c) {
      const int k = chunk(kShape.resident + c);
      if (k >= g_.chunks) return;
      const char* const from = at + k * kChunkBytes;
      const typename M::Columns columns = M::fetch(from, g_.stride(), lane_, load);
      Tile tiles[kShape.row_tiles];
#pragma unroll
      for (int m = 0; m < kShape.row_tiles; ++m) {
        const uint4* const words = spilled_ + (c * kShape.row_tiles + m) * 64 + lane_;
        const uint4 low = words[0], high = words[32];
        tiles[m][0] = low.x, tiles[m][1] = low.y, tiles[m][2] = low.z, tiles[m][3] = low.w;
        tiles[m][4] = high.x, tiles[m][5] = high.y, tiles[m][6] = high.z, tiles[m][7] = high.w;
      }
      M::add(sums, tiles, columns, from, g_.stride(), lane_, load);
    }
  }

  __device__ void put(Sums& sums, float* partial) const {
    const int rows = g_.row_warps * kShape.row_tiles * kTileRows;
    float* const to = partial + (first_ * rows + first_row()) * (g_.batch + 1);
#pragma unroll
    for (int m = 0; m < kShape.row_tiles; ++m) {
      M::finish(sums[m]);
      if (!M::has_sums(lane_)) continue;
#pragma unroll
      for (int i = 0; i < M::kAccumulators; ++i)
        to[(m * kTileRows + M::sum_row(lane_, i)) * (g_.batch + 1) + M::sum_column(lane_, i)] = sums[m][i];
    }
  }

  const Geometry& g_;
  const int warp_, lane_, first_;
  uint4* const spilled_;
  Tile resident_[kShape.resident][kShape.row_tiles];
};

/// Adds up what the depth warps have found for a row of W and a row of the batch.
template <Shape kShape>
__device__ __forceinline__ float total(const Geometry& g, const float* partial, int row, int b) {
  const int rows = g.row_warps * kShape.row_tiles * kTileRows;
  float sum = 0;
  for (int k = 0; k < g.depth_warps; ++k) sum += partial[(k * rows + row) * (g.batch + 1) + b];
  return sum;
}

/// Which part of the whole a block has.
struct Place {
  int direction, replica, first_unit, units, first_row, rows;

  __device__ Place(const Geometry& g, int H, int B)
      : direction(int(blockIdx.x) / (g.blocks * g.replicas)),
        replica(int(blockIdx.x) / g.blocks % g.replicas),
        first_unit(int(blockIdx.x) % g.blocks * g.units),
        units(smaller(g.units, H - first_unit)),
        first_row(replica * g.batch),
        rows(smaller(g.batch, B - first_row)) {}
};

/// The blocks of a direction and replica exchange the columns of the next product: two buffers in turn, in
/// global memory, or in shared memory where one block has all units. Every block writes its columns, says so,
/// and waits for the others. A buffer is written again only after every block has read it: it says so when it
/// has written the other one.
template <bool kOneBlock>
class Exchange {
 public:
  __device__ Exchange(const Geometry& g, const Place& place, char* global, char* shared, uint32_t* arrived)
      : g_(g),
        buffers_(kOneBlock ? shared
                           : global + size_t(place.direction * g.replicas + place.replica) * 2 *
                                          g.exchange_bytes()),
        arrived_(arrived + place.direction * g.replicas + place.replica) {}

  /// Columns of a step: rows of g.stride() bytes.
  __device__ char* columns(int64_t step) const { return buffers_ + (step & 1) * g_.exchange_bytes(); }

  /// The columns of this step are written, by every thread of the block.
  __device__ void arrive() const {
    __syncthreads();
    if (!kOneBlock && threadIdx.x == 0) dev::add_release(arrived_, 1);
  }
  /// Until the columns of this step are written by every block.
  __device__ void wait(int64_t step) const {
    if (kOneBlock) return;
    if (threadIdx.x % 32 == 0) dev::wait_until(arrived_, uint32_t(step + 1) * uint32_t(g_.blocks), step);
    __syncwarp();
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
