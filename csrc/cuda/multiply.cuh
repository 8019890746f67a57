// How a warp multiplies: tiles of 16 rows by 8 columns, with a chunk of K at a time that is 64 bytes deep (32
// numbers of 16 bits, or 16 of 32 bits). A lane holds 8 words of a tile of W in registers for the whole
// sequence. It reads the columns, which change at every step, in vectors of 16 bytes: the products over K may
// be added in any order, and the order here is the one that makes those 16 bytes contiguous.
#pragma once
#include "cuda/geometry.h"
#include "cuda/math.cuh"

namespace fastrnn {

constexpr int kTileRows = 16, kTileColumns = 8, kChunkBytes = 64, kTileWords = 8;

/// A tile of W in the hands of a warp: 8 words a lane.
using Tile = uint32_t[kTileWords];

/// Words and numbers of what is multiplied.
template <class Derived, class E>
struct Numbers {
  using Elem = E;
  static constexpr int kInWord = 4 / int(sizeof(E)), kInChunk = kChunkBytes / int(sizeof(E));

  /// The index in K of the first number of a word of a chunk.
  __device__ static int number(int chunk, int word) { return chunk * kInChunk + word * kInWord; }

  /// number(0) and, of 16 bits, number(1) as one word.
  template <class F>
  __device__ static uint32_t pack(F number) {
    if constexpr (kInWord == 1)
      return dev::bits(Derived::element(number(0)));
    else
      // mutant: first-number-of-a-word-twice
      return Derived::element(number(0)).bits | uint32_t(Derived::element(number(1)).bits) << 16;
  }
};

/// Tensor cores: bf16 and f16 with float32 sums; float32 as tf32. S: storage; Elem: as it is multiplied.
template <class S>
struct TensorCore : Numbers<TensorCore<S>, S> {
  using Storage = S;
  static constexpr Arithmetic kArithmetic = std::is_same_v<S, float>      ? Arithmetic::kTf32
                                            : std::is_same_v<S, dev::f16> ? Arithmetic::kF16
                                                                          : Arithmetic::kBf16;
  static constexpr int kAccumulators = 4;
  static constexpr bool kIsFloat = std::is_same_v<S, float>;

  __device__ static S element(float v) {
    if constexpr (kIsFloat)
      return dev::to_tf32(v);
    else
      return dev::from_float<S>(v);
  }

  // Row and 32-bit word of the chunk that are the lane's word i of a tile.
  __device__ static int row(int lane, int i) { return lane / 4 + 8 * (i & 1); }
  // mutant: lane-words-in-another-order
  __device__ static int word(int lane, int i) { return lane % 4 * 4 + i / 4 * 2 + (i / 2 & 1); }

  // Row and column of the tile that are the lane's accumulator i; every lane has all of its own.
  __device__ static int sum_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
  __device__ static int sum_column(int lane, int i) { return lane % 4 * 2 + i % 2; }
  __device__ static bool has_sums(int) { return true; }
  __device__ static void finish(float (&)[kAccumulators]) {}

  /// Adds the products of row tiles, one below the other, with the lane's share of 8 columns of a chunk: 16
  /// bytes of column lane / 4. Half of the chunk's depth goes to either of the sums, which may be the same.
  template <int kTiles>
  __device__ static void add(float (&low)[kTiles][kAccumulators], float (&high)[kTiles][kAccumulators],
                             const Tile (&w)[kTiles], const uint4& columns, char*, int, int) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
      multiply(low[m], {w[m][0], w[m][1], w[m][2], w[m][3]}, {columns.x, columns.y});
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
      multiply(high[m], {w[m][4], w[m][5], w[m][6], w[m][7]}, {columns.z, columns.w});
  }

 private:
  __device__ static void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (kIsFloat)
      dev::mma_tf32(sum, a, b);
    else if constexpr (std::is_same_v<S, dev::bf16>)
      dev::mma_bf16(sum, a, b);
    else
      dev::mma_f16(sum, a, b);
  }
};

/// Plain float32: a lane has one row and half of the chunk's depth, so that both halves of a warp read the
/// same 32 bytes side by side, of columns that the warp lays into shared memory; the sums of the halves meet
/// at the end. Columns beyond `count` are left out.
struct Ffma : Numbers<Ffma, float> {
  using Storage = float;
  static constexpr Arithmetic kArithmetic = Arithmetic::kF32;
  static constexpr int kAccumulators = kTileColumns;

  __device__ static float element(float v) { return v; }
  __device__ static int row(int lane, int) { return lane % 16; }
  __device__ static int word(int lane, int i) { return i / 4 * 8 + lane / 16 * 4 + i % 4; }
  __device__ static int sum_row(int lane, int) { return lane % 16; }
  __device__ static int sum_column(int, int i) { return i; }
  __device__ static bool has_sums(int lane) { return lane < 16; }
  __device__ static void finish(float (&sum)[kAccumulators]) {
    for (float& s : sum) s += __shfl_xor_sync(~0u, s, 16);  // mutant: halves-of-a-sum-do-not-meet
  }

  template <int kTiles>
  __device__ static void add(float (&sums)[kTiles][kAccumulators], float (&)[kTiles][kAccumulators],
                             const Tile (&w)[kTiles], const uint4& columns, char* stage, int lane,
                             int count) {
    uint4* const staged = reinterpret_cast<uint4*>(stage);
    __syncwarp();  // the chunk before has been read
    staged[lane] = columns;
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kTileColumns; ++c) {
      if (c >= count) break;
      const uint4 low = staged[c * 4 + lane / 16], high = staged[c * 4 + lane / 16 + 2];
      const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int i = 0; i < kTileWords; ++i) sums[m][c] += dev::as_float(w[m][i]) * dev::as_float(words[i]);
    }
  }
};

}  // namespace fastrnn
