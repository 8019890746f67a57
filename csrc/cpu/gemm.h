// The matrix products of a step, C[n, units] = A[n, K] B[K, units], for matrices that are too small for a
// library to serve: few rows (the batch), one block of units at a time, the weights packed into panels
// that stream. The micro-kernel `tile` is the only code that knows how many registers there are.
#pragma once
#include <cstddef>
#include <type_traits>

#include "cpu/bfloat16.h"
#include "cpu/int8.h"
#include "cpu/vector.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

// A block is the units that one tile covers: two registers wide, the last one perhaps one.
template <class S>
constexpr int kBlock = 2 * kLanes<S>;

// Rows of a tile. Two accumulators a row, beside two registers of weights and one of A: 6 x 2 leaves one
// of 16 registers, 12 x 2 leaves five of 32.
constexpr int kTileRows = kRegisters == 32 ? 12 : 6;

// Greatest depth of one pass over a panel: kDepth * kBlock weights stay in the L2 cache for all tiles of
// rows.
constexpr int64_t kDepth = 1024;

template <class S>
struct Blocks {
  int64_t units;  // of the whole matrix

  FASTRNN_INLINE int64_t count() const { return (units + kBlock<S> - 1) / kBlock<S>; }
  FASTRNN_INLINE int in_block(int64_t block) const {
    return static_cast<int>(min<int64_t>(kBlock<S>, units - block * kBlock<S>));
  }
  FASTRNN_INLINE int vectors(int64_t block) const { return in_block(block) > kLanes<S> ? 2 : 1; }
};

// What a panel may hold instead of numbers of type S: bfloat16 in pairs, unit u of a block's first register
// in the low half and unit u of its second one in the high half, so that a shift and a mask unpack both.
struct Pair {
  uint32_t bits;
};

// What x and h are kept as beside weights W: rounded where these are Bfloat16.
template <class S, class W>
using Factor = std::conditional_t<std::is_same_v<W, Bfloat16>, Bfloat16, S>;

// What the products multiply with weights W. Beside Int8 it is bytes, made of x and h at every step.
template <class S, class W>
using Left = std::conditional_t<std::is_same_v<W, Int8>, uint8_t, Factor<S, W>>;

// Numbers of a panel for products over K, and of a row of Bfloat16 that it meets: zeros fill the last tile.
template <class W>
constexpr int64_t panel_depth(int64_t K) {
  if (std::is_same_v<W, Int8>) return int8_panel_depth(K);
  return std::is_same_v<W, Bfloat16> ? (K + kBfloat16Depth - 1) / kBfloat16Depth * kBfloat16Depth : K;
}

// Elements of a panel's row.
template <class S, class W>
constexpr int64_t panel_width(int vectors) {
  return std::is_same_v<W, Pair> ? kLanes<S> : vectors * kLanes<S>;
}
template <class S, class W>
constexpr int64_t kPanelWidth = panel_width<S, W>(2);

template <int NV, class S, class W>
FASTRNN_INLINE void load_weights(const W* p, V<S>* weights) {
  if constexpr (std::is_same_v<W, Pair>) {
    Integers<S> pairs;
    __builtin_memcpy(&pairs, p, sizeof pairs);
    const Integers<S> halves[2] = {pairs << 16, pairs & -65536};
    __builtin_memcpy(weights, halves, NV * sizeof *weights);
  } else {
    for (int v = 0; v < NV; ++v) weights[v] = load(p + v * kLanes<S>);
  }
}

// Whether a tile prefetches the next panel into the L2 cache while it multiplies. The hardware prefetchers
// lose a stream at every page border and while several rows are multiplied. One prefetch a step is cheap
// beside four rows of multiply-adds. With fewer rows it pays only where the weights come from memory (far)
// and a step reads less than two whole cache lines; whole pairs of lines the hardware follows by itself.
constexpr bool fetches_ahead(int rows, bool far) { return rows >= 4 || (far && kVectorBytes < 64); }

// C[MR, NV registers] (+)= A[MR, K] B[K, NV registers]. Element (i, k) of A is a[i * lda + k], or a[k * MR +
// i] when its columns are packed. Few rows split K over several sums, which hides the latency of an addition.
// ahead: the panel to prefetch, with the row stride of B; where nothing follows, any address in the cache.
template <int MR, int NV, bool kPackedColumns, bool kAhead, class S, class W>
void tile(const S* a, int64_t lda, const W* b, int64_t ldb, int64_t K, S* c, int64_t ldc, bool accumulate,
          const W* ahead) {
  constexpr int kSplit = MR * NV >= 8 ? 1 : MR * NV >= 4 ? 2 : 4;
  V<S> acc[kSplit][MR][NV];
  for (int s = 0; s < kSplit; ++s)
    for (int i = 0; i < MR; ++i)
      for (int v = 0; v < NV; ++v)
        acc[s][i][v] = s == 0 && accumulate ? load(c + i * ldc + v * kLanes<S>) : V<S>{};

  const auto step = [&](int s, int64_t k) FASTRNN_LAMBDA_INLINE {
    V<S> weights[NV];
    load_weights<NV, S>(b + k * ldb, weights);
    if constexpr (kAhead)
      for (int byte = 0; byte < NV * kVectorBytes; byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(ahead + k * ldb) + byte, 0, 2);
    // Keeps the weights in a register: gcc would load them again for each row of the tile.
    if constexpr (MR > 1)
      for (int v = 0; v < NV; ++v) FASTRNN_KEEP(weights[v]);
    for (int i = 0; i < MR; ++i) {
      const V<S> x = broadcast(kPackedColumns ? a[k * MR + i] : a[i * lda + k]);
      for (int v = 0; v < NV; ++v) acc[s][i][v] += x * weights[v];
    }
  };
  int64_t k = 0;
  for (; k + 4 <= K; k += 4)
    for (int s = 0; s < 4; ++s) step(s % kSplit, k + s);
  for (; k < K; ++k) step(0, k);

  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) {
      V<S> total = acc[0][i][v];
      for (int s = 1; s < kSplit; ++s) total += acc[s][i][v];
      store(c + i * ldc + v * kLanes<S>, total);
    }
}

template <class S, class W>
using Tile = void (*)(const S*, int64_t, const W*, int64_t, int64_t, S*, int64_t, bool, const W*);

template <class S, class W, bool kPackedColumns, bool kFar = false, int MR = kTileRows>
FASTRNN_INLINE Tile<S, W> tile_for(int rows, int vectors) {
  constexpr bool kAhead = !kPackedColumns && fetches_ahead(MR, kFar);
  if (MR > 1 && rows < MR) return tile_for<S, W, kPackedColumns, kFar, MR == 1 ? 1 : MR - 1>(rows, vectors);
  return vectors == 2 ? tile<MR, 2, kPackedColumns, kAhead, S, W> : tile<MR, 1, kPackedColumns, kAhead, S, W>;
}

// C[n, vectors] (+)= A[n, K] panel[K, vectors]. The rows are dealt evenly to the tiles: 32 rows on 12-row
// tiles are 11 + 11 + 10, not 12 + 12 + 8. next: distance to the panel that is multiplied after this one; the
// last tile prefetches it.
template <class S, class W, bool kFar = false>
void multiply_rows(Rows<const S> a, int64_t n, int64_t K, const W* panel, int64_t stride, int64_t next,
                   int vectors, S* c, int64_t ldc, bool accumulate) {
  const int64_t width = vectors * kLanes<S>, tiles = (n + kTileRows - 1) / kTileRows;
  if (K == 0 && !accumulate)
    for (int64_t i = 0; i < n; ++i) __builtin_memset(c + i * ldc, 0, width * sizeof(S));
  for (int64_t k = 0, depth, passes = (K + kDepth - 1) / kDepth; k < K; k += depth, --passes) {
    depth = (K - k + passes - 1) / passes;
    const W* const here = panel + k * stride;
    for (int64_t i = 0, left = tiles; left > 0; --left) {
      const int rows = static_cast<int>((n - i + left - 1) / left);
      tile_for<S, W, false, kFar>(rows, vectors)(a[i] + k, a.stride, here, stride, depth, c + i * ldc, ldc,
                                                 accumulate || k > 0, left == 1 ? here + next : here);
      i += rows;
    }
  }
}

// The same product, for a panel that the next panel follows in memory. far: as in fetches_ahead.
template <class S, class W>
FASTRNN_INLINE void multiply(Rows<const S> a, int64_t n, int64_t K, const W* panel, int vectors, S* c,
                             int64_t ldc, bool accumulate, bool far = false) {
  const int64_t stride = panel_width<S, W>(vectors), next = K * stride;
  if (far)
    multiply_rows<S, W, true>(a, n, K, panel, stride, next, vectors, c, ldc, accumulate);
  else
    multiply_rows<S, W, false>(a, n, K, panel, stride, next, vectors, c, ldc, accumulate);
}

/// The same of some panels, whose C's stand side by side in columns c_step apart.
FASTRNN_INLINE void multiply(Rows<const Bfloat16> a, int64_t n, int64_t K, const Bfloat16* panels, int count,
                             int vectors, float* c, int64_t c_step, int64_t ldc, bool accumulate) {
  bfloat16_products()->multiply(a.data, a.stride, n, panel_depth<Bfloat16>(K), panels, count, vectors, c,
                                c_step, ldc, accumulate);
}

FASTRNN_INLINE void multiply(Rows<const uint8_t> a, int64_t n, int64_t K, const Int8* panels, int count,
                             int vectors, float* c, int64_t c_step, int64_t ldc, bool accumulate) {
  int8_products().multiply(a.data, a.stride, n, K, panels, count, vectors * kLanes<float>, c, c_step, ldc,
                           accumulate);
}

// Transposes kLanes x kLanes numbers: log2(kLanes) perfect shuffles of the registers.
template <class S>
FASTRNN_INLINE void transpose(V<S>* rows) {
  constexpr int L = kLanes<S>;
  Integers<S> low, high;
  for (int lane = 0; lane < L; ++lane) {
    low[lane] = lane / 2 + lane % 2 * L;
    high[lane] = low[lane] + L / 2;
  }
  for (int round = 1; round < L; round *= 2) {
    V<S> next[L];
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + L / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + L / 2], high);
    }
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}

// panel[k][unit] = w[unit][k], units beyond the matrix as zeros.
template <class S>
void pack_transposed(Rows<const S> w, int64_t K, int units, int vectors, S* panel) {
  constexpr int L = kLanes<S>;
  const int width = vectors * L;
  for (int first = 0; first < width; first += L) {
    int64_t k = 0;
    for (; k + L <= K; k += L) {
      V<S> square[L];
      for (int u = 0; u < L; ++u) square[u] = first + u < units ? load(w[first + u] + k) : V<S>{};
      transpose<S>(square);
      for (int i = 0; i < L; ++i) store(panel + (k + i) * width + first, square[i]);
    }
    for (; k < K; ++k)
      for (int u = first; u < first + L; ++u) panel[k * width + u] = u < units ? w[u][k] : S{0};
  }
}

/// x rounded to bfloat16 (to nearest, ties to even), in the low half. NaN stays NaN.
FASTRNN_INLINE uint32_t to_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <class S>
void pack_transposed(Rows<const S> w, int64_t K, int units, int /*vectors*/, Pair* panel) {
  constexpr int L = kLanes<S>;
  const auto at = [&](int u, int64_t k) { return u < units ? to_bfloat16(w[u][k]) : 0; };
  for (int64_t k = 0; k < K; ++k)
    for (int u = 0; u < L; ++u) panel[k * L + u] = {at(u, k) | at(L + u, k) << 16};
}

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

/// The same of each lane.
FASTRNN_INLINE Halves to_bfloat16(V<float> v) {
  const auto bits = reinterpret_cast<Integers<float>>(v);
  const Integers<float> rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector(v != v ? Integers<float>{} + 0x7fc0 : rounded, Halves);
}

FASTRNN_INLINE void store(Bfloat16* p, V<float> v, int count = kLanes<float>) {
  const auto halves = to_bfloat16(v);
  __builtin_memcpy(p, &halves, size_t(count) * sizeof *p);
}

FASTRNN_INLINE V<float> load(const Bfloat16* p, int count = kLanes<float>) {
  Halves halves{};
  __builtin_memcpy(&halves, p, size_t(count) * sizeof *p);
  return reinterpret_cast<V<float>>(__builtin_convertvector(halves, Integers<float>) << 16);
}

/// A factor as the number that it stands for.
template <class S>
FASTRNN_INLINE S number(S x) {
  return x;
}
FASTRNN_INLINE float number(Bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// panel[k / 2][unit][k % 2] = w[unit][k], zeros beyond the matrix: pairs of weights are moved as one number.
template <class S>
void pack_transposed(Rows<const Bfloat16> w, int64_t K, int units, int vectors, Bfloat16* panel) {
  constexpr int L = kLanes<float>;
  const int width = vectors * L;
  for (int first = 0; first < width; first += L)
    for (int64_t k = 0; k < panel_depth<Bfloat16>(K); k += 2 * L) {
      V<float> square[L] = {};
      const auto count = static_cast<size_t>(min<int64_t>(2 * L, K - k));
      for (int u = 0; u < min(L, units - first); ++u)
        __builtin_memcpy(&square[u], w[first + u] + k, count * sizeof *panel);
      transpose<float>(square);
      for (int i = 0; i < L; ++i)
        __builtin_memcpy(panel + (k / 2 + i) * 2 * width + 2 * first, &square[i], sizeof square[i]);
    }
}

// panel[k / 2][unit][k % 2] = w[k][unit], zeros beyond the matrix.
template <class S>
void pack(Rows<const Bfloat16> w, int64_t K, int units, int vectors, Bfloat16* panel) {
  constexpr int L = kLanes<float>;
  const auto row = [&](int64_t k, int first) {
    Halves halves{};
    if (k < K && first < units)
      __builtin_memcpy(&halves, w[k] + first, size_t(min(L, units - first)) * sizeof *panel);
    return __builtin_convertvector(halves, Integers<float>);
  };
  for (int64_t k = 0; k < panel_depth<Bfloat16>(K); k += 2)
    for (int first = 0; first < vectors * L; first += L, panel += 2 * L) {
      const Integers<float> pairs = row(k, first) | row(k + 1, first) << 16;
      __builtin_memcpy(panel, &pairs, sizeof pairs);
    }
}

// panel[k][unit] = w[k][unit], units beyond the matrix as zeros.
template <class S>
void pack(Rows<const S> w, int64_t K, int units, int vectors, S* panel) {
  const int width = vectors * kLanes<S>;
  for (int64_t k = 0; k < K; ++k)
    for (int u = 0; u < width; u += kLanes<S>) {
      const int rest = units - u;
      const V<S> v = rest >= kLanes<S> ? load(w[k] + u) : rest > 0 ? load(w[k] + u, rest) : V<S>{};
      store(panel + k * width + u, v);
    }
}

// ---- Products of few rows read W in place: packing it would cost more than it saves. ------------------

// From this many rows of K numbers on, summed over all steps, packing W [units, K] pays. Measured: 8 to 16
// rows at K = 128, about 50 at K = 512 and 1024.
FASTRNN_INLINE bool packing_pays(int64_t rows, int64_t K) { return rows > min<int64_t>(48, 2 + K / 12); }

// The same limit for products A W, which read W [K, columns] in place, one block of columns after the other,
// in `passes` over W. Each row of W lies on a page of its own: where W has more rows than the TLB has
// entries, every pass pays the page walks again.
template <class S>
FASTRNN_INLINE bool packing_columns_pays(int64_t rows, int64_t passes, int64_t K, int64_t columns) {
  constexpr int64_t kReach = 8 << 20;  // bytes
  return K * columns * static_cast<int64_t>(sizeof(S)) > kReach ? passes > 2 : rows > 256;
}

// Up to 3 rows and 8 steps, W is read row by row instead of being packed.
constexpr int64_t kFewRows = 3;
constexpr int64_t kStepsWorthPacking = 8;

// Horizontal sums of kLanes registers, one sum a lane: pairs of registers are added until one is left.
template <class S>
FASTRNN_INLINE V<S> sums(V<S>* v) {
  constexpr int L = kLanes<S>;
  Integers<S> even, odd;
  for (int lane = 0; lane < L; ++lane) even[lane] = 2 * lane, odd[lane] = 2 * lane + 1;
  for (int left = L / 2; left > 0; left /= 2)
    for (int i = 0; i < left; ++i)
      v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) + __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
  return v[0];
}

// Rows of A that share the loads of W: four sums for each, beside A's and one of W's registers.
constexpr int kDotRows = kRegisters == 32 ? 6 : 3;

// C[MR, kLanes] (+)= A[MR, K] W[kLanes, K]^T, of which only the first `rows` rows of W exist. With one row of
// A there are registers for the sums of all rows of W at a time; otherwise four rows of W share each load of
// A.
template <int MR, class S, class T>
void dots(Rows<const T> a, Rows<const T> w, int64_t K, int rows, S* c, int64_t ldc, bool accumulate) {
  constexpr int L = kLanes<S>, kTogether = MR == 1 || L < 4 ? L : 4;
  V<S> total[MR][L];
  for (int first = 0; first < L; first += kTogether) {
    const T *row[kTogether], *ahead[kTogether];
    for (int j = 0; j < kTogether; ++j) {
      row[j] = w[min(first + j, rows - 1)];
      ahead[j] = row[j] + kTogether * w.stride;
    }
    V<S> acc[MR][kTogether] = {};
    const auto step = [&](int64_t k, auto io) FASTRNN_LAMBDA_INLINE {
      V<S> x[MR];
      for (int i = 0; i < MR; ++i) x[i] = io(a[i] + k);
      for (int j = 0; j < kTogether; ++j) {
        V<S> weights = io(row[j] + k);
        if constexpr (MR > 1) {
          __builtin_prefetch(ahead[j] + k);
          FASTRNN_KEEP(weights);
        }
        for (int i = 0; i < MR; ++i) acc[i][j] += x[i] * weights;
      }
    };
    int64_t k = 0;
    for (; k + L <= K; k += L) step(k, [](const T* p) FASTRNN_LAMBDA_INLINE { return load(p); });
    if (const int rest = static_cast<int>(K - k); rest > 0)
      step(k, [rest](const T* p) FASTRNN_LAMBDA_INLINE { return load(p, rest); });
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < kTogether; ++j) total[i][first + j] = acc[i][j];
  }
  for (int i = 0; i < MR; ++i) {
    const V<S> result = sums<S>(total[i]);
    store(c + i * ldc, accumulate ? result + load(c + i * ldc) : result);
  }
}

template <class S, class T>
using Dots = void (*)(Rows<const T>, Rows<const T>, int64_t, int, S*, int64_t, bool);

template <class S, class T, int MR = kDotRows>
FASTRNN_INLINE Dots<S, T> dots_for(int rows) {
  if (MR > 1 && rows < MR) return dots_for<S, T, MR == 1 ? 1 : MR - 1>(rows);
  return dots<MR, S, T>;
}

// C[n, units] (+)= A[n, K] W[units, K]^T. C is a tile: its rows have whole registers.
template <class S, class T>
void multiply_transposed(Rows<const T> a, int64_t n, int64_t K, Rows<const T> w, int units, S* c, int64_t ldc,
                         bool accumulate) {
  for (int j = 0; j < units; j += kLanes<S>)
    for (int64_t i = 0, left = (n + kDotRows - 1) / kDotRows; left > 0; --left) {
      const int rows = static_cast<int>((n - i + left - 1) / left);
      dots_for<S, T>(rows)({a[i], a.stride}, {w[j], w.stride}, K, min(units - j, kLanes<S>), c + i * ldc + j,
                           ldc, accumulate);
      i += rows;
    }
}

// The same product for up to kBlock rows with A^T [K, n] packed as a panel: C^T = W A^T, with W, read in
// place, as the left operand. units is rounded up to whole registers in C.
template <class S, class T>
void multiply_turned(const T* panel, int n, int64_t K, Rows<const T> w, int units, S* c, int64_t ldc,
                     bool accumulate) {
  constexpr int L = kLanes<S>;
  alignas(64) S product[kBlock<S> * kBlock<S>];  // [units][n]
  const int vectors = n > L ? 2 : 1, width = vectors * L;
  if constexpr (std::is_same_v<T, Bfloat16>)
    multiply(w, units, K, panel, 1, vectors, product, 0, width, false);
  else
    multiply<S>(w, units, K, panel, vectors, product, width, false);
  for (int u = 0; u < units; u += L)
    for (int first = 0; first < n; first += L) {
      V<S> square[L];
      for (int j = 0; j < L; ++j) square[j] = load(product + (u + j) * width + first);
      transpose<S>(square);
      for (int i = 0; i < L && first + i < n; ++i) {
        S* const p = c + (first + i) * ldc + u;
        store(p, accumulate ? square[i] + load(p) : square[i]);
      }
    }
}

// C[n, columns] += A[n, K] W[K, columns], n <= kFewRows: streams W row by row and keeps C in the L1 cache.
template <class S, class T>
void multiply_in_place(Rows<const T> a, int64_t n, int64_t K, Rows<const T> w, int64_t columns, Rows<S> c) {
  const auto sweep = [&](int64_t i, int64_t k, auto depth) FASTRNN_LAMBDA_INLINE {
    constexpr int kDeep = decltype(depth)::value;
    int64_t u = 0;
    for (; u + kLanes<S> <= columns; u += kLanes<S>) {
      V<S> acc = load(c[i] + u);
      for (int d = 0; d < kDeep; ++d) acc += number(a[i][k + d]) * load(w[k + d] + u);
      store(c[i] + u, acc);
    }
    if (const int rest = static_cast<int>(columns - u); rest > 0) {
      V<S> acc = load(c[i] + u, rest);
      for (int d = 0; d < kDeep; ++d) acc += number(a[i][k + d]) * load(w[k + d] + u, rest);
      store(c[i] + u, acc, rest);
    }
  };
  int64_t k = 0;
  for (; k + 4 <= K; k += 4)
    for (int64_t i = 0; i < n; ++i) sweep(i, k, Constant<4>{});
  for (; k < K; ++k)
    for (int64_t i = 0; i < n; ++i) sweep(i, k, Constant<1>{});
}

}  // namespace
}  // namespace fastrnn::FASTRNN_ISA
