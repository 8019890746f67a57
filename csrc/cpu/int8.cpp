#include "cpu/int8.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/amx.h"
#include "cpu/kernels.h"

namespace fastrnn {
namespace {

/// multiply() from tile(a, lda, rows, depth, panel, width, c, ldc, accumulate), for at most kRows rows. The
/// rows are dealt evenly to the tiles.
template <int kRows, class Tile>
void by_tiles(const uint8_t* a, int64_t lda, int64_t n, int64_t K, const Int8* panels, int count, int width,
              float* c, int64_t c_step, int64_t ldc, bool accumulate, Tile tile) {
  for (int p = 0; p < count; ++p, panels += int8_panel_depth(K) * width, c += c_step)
    for (int64_t i = 0, left = (n + kRows - 1) / kRows; left > 0; --left) {
      const auto rows = static_cast<int>((n - i + left - 1) / left);
      tile(a + i * lda, lda, rows, int8_depth(K), Int8Panel(panels, width), width, c + i * ldc, ldc,
           accumulate);
      i += rows;
    }
}

float scale_of(const uint8_t* row, int64_t depth) {
  float scale;
  std::memcpy(&scale, row + depth, sizeof scale);
  return scale;
}

#if defined(__x86_64__)

int four(const uint8_t* numbers) {
  int value;
  std::memcpy(&value, numbers, sizeof value);
  return value;
}

// ---- AVX-512 VNNI: a register of sums is 16 units of a row ---------------------------------------------

#define FASTRNN_AVX512 "avx512f,avx512bw,avx512dq,avx512vl"
#define FASTRNN_VNNI __attribute__((target("avx512vnni," FASTRNN_AVX512)))
constexpr int kUnits = 16;  // of a register

/// c (+)= sums * scales, of 16 units.
__attribute__((target(FASTRNN_AVX512))) inline void store_sums(float* c, __m512i sums, __m512 scales,
                                                               bool accumulate) {
  const __m512 numbers = __builtin_convertvector(reinterpret_cast<__v16si>(sums), __m512);
  _mm512_storeu_ps(
      c, accumulate ? _mm512_fmadd_ps(numbers, scales, _mm512_loadu_ps(c)) : _mm512_mul_ps(numbers, scales));
}

/// Few rows split the depth over several sums, which hides the latency of an addition.
template <int MR, int NV>
FASTRNN_VNNI void vnni_tile(const uint8_t* a, int64_t lda, int64_t depth, const Int8Panel& panel, float* c,
                            int64_t ldc, bool accumulate) {
  constexpr int kSplit = MR * NV >= 8 ? 1 : MR * NV >= 4 ? 2 : 4;
  __m512i sums[kSplit][MR][NV];
  for (int s = 0; s < kSplit; ++s)
    for (int i = 0; i < MR; ++i)
      for (int v = 0; v < NV; ++v)
        sums[s][i][v] = s == 0 ? _mm512_loadu_si512(panel.start + v * kUnits) : _mm512_setzero_si512();
  const int8_t* from = panel.weights;
  for (int64_t k = 0; k < depth; k += 16)
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s, from += NV * 64) {
      __m512i weights[NV];
      for (int v = 0; v < NV; ++v) weights[v] = _mm512_loadu_si512(from + v * 64);
      for (int i = 0; i < MR; ++i) {
        const __m512i x = _mm512_set1_epi32(four(a + i * lda + k + 4 * s));
        for (int v = 0; v < NV; ++v)
          sums[s % kSplit][i][v] = _mm512_dpbusd_epi32(sums[s % kSplit][i][v], x, weights[v]);
      }
    }
  for (int i = 0; i < MR; ++i) {
    const __m512 scale = _mm512_set1_ps(scale_of(a + i * lda, depth));
    for (int v = 0; v < NV; ++v) {
      __m512i total = sums[0][i][v];
      for (int s = 1; s < kSplit; ++s) total = _mm512_add_epi32(total, sums[s][i][v]);
      store_sums(c + i * ldc + v * kUnits, total,
                 _mm512_mul_ps(scale, _mm512_loadu_ps(panel.scales + v * kUnits)), accumulate);
    }
  }
}

constexpr int kVnniRows = 12;  // two sums a row beside the weights, in 32 registers

template <int MR = kVnniRows>
auto vnni_tile_for(int rows, int width) {
  if constexpr (MR > 1)
    if (rows < MR) return vnni_tile_for<MR - 1>(rows, width);
  return width > kUnits ? vnni_tile<MR, 2> : vnni_tile<MR, 1>;
}

void vnni_multiply(const uint8_t* a, int64_t lda, int64_t n, int64_t K, const Int8* panels, int count,
                   int width, float* c, int64_t c_step, int64_t ldc, bool accumulate) {
  by_tiles<kVnniRows>(a, lda, n, K, panels, count, width, c, c_step, ldc, accumulate,
                      [](const uint8_t* rows, int64_t stride, int number, int64_t depth,
                         const Int8Panel& panel, int units, float* to, int64_t to_stride, bool adds) {
                        vnni_tile_for(number, units)(rows, stride, depth, panel, to, to_stride, adds);
                      });
}

// ---- Advanced matrix extensions ------------------------------------------------------------------------

#define FASTRNN_AMX __attribute__((target("amx-tile,amx-int8," FASTRNN_AVX512)))

/// One or two rows of tiles of C, each one or two tiles wide.
template <bool kLower, bool kWide>
FASTRNN_AMX void amx_tiles(const uint8_t* a, int64_t lda, int upper, int lower, int64_t depth,
                           const Int8Panel& panel, float* c, int64_t ldc, bool accumulate) {
  constexpr int64_t kTiles = kWide ? 2 : 1, kRowBytes = kTiles * 64;
  const uint8_t* const a_lower = a + upper * lda;
  // The one row of what the sums begin with, for every row of a tile: its stride is 0.
  _tile_loadd(0, panel.start, 0);
  if (kWide) _tile_loadd(1, panel.start + kUnits, 0);
  if (kLower) _tile_loadd(2, panel.start, 0);
  if (kLower && kWide) _tile_loadd(3, panel.start + kUnits, 0);
  for (int64_t k = 0; k < depth; k += 64) {
    const int8_t* const weights = panel.weights + k / 4 * kRowBytes;
    _tile_loadd(6, weights, kRowBytes);
    if (kWide) _tile_loadd(7, weights + 64, kRowBytes);
    _tile_loadd(4, a + k, lda);
    _tile_dpbusd(0, 4, 6);
    if (kWide) _tile_dpbusd(1, 4, 7);
    if (kLower) _tile_loadd(5, a_lower + k, lda);
    if (kLower) _tile_dpbusd(2, 5, 6);
    if (kLower && kWide) _tile_dpbusd(3, 5, 7);
  }
  alignas(64) int32_t sums[2 * amx::kTileRows][kTiles][kUnits];
  _tile_stored(0, sums[0][0], kRowBytes);
  if (kWide) _tile_stored(1, sums[0][1], kRowBytes);
  if (kLower) _tile_stored(2, sums[upper][0], kRowBytes);
  if (kLower && kWide) _tile_stored(3, sums[upper][1], kRowBytes);
  for (int i = 0; i < upper + lower; ++i) {
    const __m512 scale = _mm512_set1_ps(scale_of(a + i * lda, depth));
    for (int v = 0; v < kTiles; ++v) {
      store_sums(c + i * ldc + v * kUnits, _mm512_load_si512(sums[i][v]),
                 _mm512_mul_ps(scale, _mm512_loadu_ps(panel.scales + v * kUnits)), accumulate);
    }
  }
}

/// Up to this many rows the tiles would be mostly empty.
constexpr int64_t kFewRows = 2;

FASTRNN_AMX void amx_multiply(const uint8_t* a, int64_t lda, int64_t n, int64_t K, const Int8* panels,
                              int count, int width, float* c, int64_t c_step, int64_t ldc, bool accumulate) {
  if (n <= kFewRows) return vnni_multiply(a, lda, n, K, panels, count, width, c, c_step, ldc, accumulate);
  constexpr int64_t kRows = 2 * amx::kTileRows;
  const bool wide = width > kUnits;
  for (int64_t i = 0, left = (n + kRows - 1) / kRows; left > 0; --left) {
    const auto rows = static_cast<int>((n - i + left - 1) / left), upper = rows > 16 ? (rows + 1) / 2 : rows;
    amx::shape_tiles(upper, rows - upper);
    const auto tiles = rows > upper ? wide ? amx_tiles<true, true> : amx_tiles<true, false>
                       : wide       ? amx_tiles<false, true>
                                    : amx_tiles<false, false>;
    for (int p = 0; p < count; ++p)
      tiles(a + i * lda, lda, upper, rows - upper, int8_depth(K),
            Int8Panel(panels + p * int8_panel_depth(K) * width, width), c + i * ldc + p * c_step, ldc,
            accumulate);
    i += rows;
  }
  _tile_release();  // what else uses tiles shapes them for itself, and empty ones cost no context switch
}

// ---- AVX2: a register of sums is 8 units of a row ------------------------------------------------------

#define FASTRNN_AVX2 __attribute__((target("avx2,fma")))

/// vpmaddubsw takes unsigned by signed numbers: |w| times a with w's sign. A pair of products is at most
/// 2 * 127 * 127 = 32258, which 16 bits hold: nothing saturates.
template <int MR, int NV>
FASTRNN_AVX2 void avx2_tile(const uint8_t* a, int64_t lda, int64_t depth, const int32_t* start,
                            const float* scales, const int8_t* weights, int width, float* c, int64_t ldc,
                            bool accumulate) {
  __m256i sums[MR][NV];
  for (int v = 0; v < NV; ++v) {
    const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start + 8 * v));
    for (int i = 0; i < MR; ++i) sums[i][v] = first;
  }
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t k = 0; k < depth; k += 4)
    for (int v = 0; v < NV; ++v) {
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + k * width + 32 * v));
      const __m256i magnitude = _mm256_abs_epi8(w);
      for (int i = 0; i < MR; ++i) {
        const __m256i x = _mm256_sign_epi8(_mm256_set1_epi32(four(a + i * lda + k)), w);
        const __m256i pairs = _mm256_maddubs_epi16(magnitude, x);
        sums[i][v] = _mm256_add_epi32(sums[i][v], _mm256_madd_epi16(pairs, ones));
      }
    }
  for (int i = 0; i < MR; ++i) {
    const __m256 scale = _mm256_set1_ps(scale_of(a + i * lda, depth));
    for (int v = 0; v < NV; ++v) {
      float* const to = c + i * ldc + 8 * v;
      const __m256 numbers = _mm256_cvtepi32_ps(sums[i][v]);
      const __m256 factor = _mm256_mul_ps(scale, _mm256_loadu_ps(scales + 8 * v));
      _mm256_storeu_ps(to, accumulate ? _mm256_fmadd_ps(numbers, factor, _mm256_loadu_ps(to))
                                      : _mm256_mul_ps(numbers, factor));
    }
  }
}

constexpr int kAvx2Rows = 4;  // two sums a row, in 16 registers

template <int MR = kAvx2Rows>
auto avx2_tile_for(int rows, int units) {
  if constexpr (MR > 1)
    if (rows < MR) return avx2_tile_for<MR - 1>(rows, units);
  return units > 8 ? avx2_tile<MR, 2> : avx2_tile<MR, 1>;
}

void avx2_multiply(const uint8_t* a, int64_t lda, int64_t n, int64_t K, const Int8* panels, int count,
                   int width, float* c, int64_t c_step, int64_t ldc, bool accumulate) {
  by_tiles<kAvx2Rows>(a, lda, n, K, panels, count, width, c, c_step, ldc, accumulate,
                      [](const uint8_t* rows, int64_t stride, int number, int64_t depth,
                         const Int8Panel& panel, int units, float* to, int64_t to_stride, bool adds) {
                        for (int u = 0; u < units; u += 16)
                          avx2_tile_for(number, units - u)(rows, stride, depth, panel.start + u,
                                                           panel.scales + u, panel.weights + 4 * u, units,
                                                           to + u, to_stride, adds);
                      });
}

#endif

// ---- Any processor -------------------------------------------------------------------------------------

typedef int8_t Bytes __attribute__((vector_size(8)));
typedef int16_t Shorts __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

/// 4 integers of a row, once for each of two units.
Shorts twice(const uint8_t* x) {
  Bytes bytes;
  std::memcpy(&bytes, x, 4), std::memcpy(reinterpret_cast<char*>(&bytes) + 4, x, 4);
  return __builtin_convertvector(bytes, Shorts);
}

/// The products of two units with 4 integers each, as two sums a unit.
Ints pair_sums(Shorts x, const int8_t* weights) {
  Bytes bytes;
  std::memcpy(&bytes, weights, sizeof bytes);
  const auto w = __builtin_convertvector(bytes, Shorts);
#if defined(__x86_64__)
  return reinterpret_cast<Ints>(_mm_madd_epi16(reinterpret_cast<__m128i>(x), reinterpret_cast<__m128i>(w)));
#else
  Ints sums;
  for (int k = 0; k < 4; ++k) sums[k] = x[2 * k] * w[2 * k] + x[2 * k + 1] * w[2 * k + 1];
  return sums;
#endif
}

/// 2 * kPairs units of a row.
template <int kPairs>
void portable_tile(const uint8_t* row, int64_t depth, const float* scales, const int8_t* weights, int width,
                   float* c, bool accumulate) {
  Ints sums[kPairs] = {};
  for (int64_t k = 0; k < depth; k += 4, weights += 4 * width) {
    const Shorts x = twice(row + k);
    for (int pair = 0; pair < kPairs; ++pair) sums[pair] += pair_sums(x, weights + 8 * pair);
  }
  const float scale = scale_of(row, depth);
  for (int pair = 0; pair < kPairs; ++pair)
    for (int u = 0; u < 2; ++u) {
      const int sum = sums[pair][2 * u] + sums[pair][2 * u + 1];
      const float product = float(sum) * (scale * scales[2 * pair + u]);
      float& to = c[2 * pair + u];
      to = accumulate ? to + product : product;
    }
}

void portable_multiply(const uint8_t* a, int64_t lda, int64_t n, int64_t K, const Int8* panels, int count,
                       int width, float* c, int64_t c_step, int64_t ldc, bool accumulate) {
  by_tiles<1>(a, lda, n, K, panels, count, width, c, c_step, ldc, accumulate,
              [](const uint8_t* row, int64_t, int, int64_t depth, const Int8Panel& panel, int units,
                 float* to, int64_t, bool adds) {
                const auto tile = units == 4 ? portable_tile<2> : portable_tile<4>;
                for (int u = 0; u < units; u += 8)
                  tile(row, depth, panel.scales + u, panel.weights + 4 * u, units, to + u, adds);
              });
}

constexpr Int8Products kPortable{"portable", 0, portable_multiply};
#if defined(__x86_64__)
constexpr unsigned kAmxInt8 = 1u << 25;
constexpr Int8Products kAmx{"amx", 128, amx_multiply}, kVnni{"avx512_vnni", 128, vnni_multiply},
    kAvx2Products{"avx2", 0, avx2_multiply};
#endif

const Int8Products& choose() {
  const char* const wanted = std::getenv("FASTRNN_CPU_INT8");
  const auto takes = [&](const Int8Products& products) {
    return !wanted || !*wanted || !std::strcmp(wanted, products.name);
  };
#if defined(__x86_64__)
  const int block = instruction_set().block_bytes;
  const bool vnni = block == 128 && __builtin_cpu_supports("avx512vnni");
  if (takes(kAmx) && vnni && amx::available(kAmxInt8)) return kAmx;
  if (takes(kVnni) && vnni) return kVnni;
  if (takes(kAvx2Products) && block >= 64) return kAvx2Products;
#endif
  if (takes(kPortable)) return kPortable;
  // An override that cannot be followed must be heard: a test would otherwise prove the wrong kernel.
  throw std::runtime_error("FASTRNN_CPU_INT8=" + std::string(wanted) +
                           " is unknown or not available on this processor");
}

}  // namespace

const Int8Products& int8_products() {
  static const Int8Products& chosen = choose();
  return chosen;
}

}  // namespace fastrnn
