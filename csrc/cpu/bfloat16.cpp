#include "cpu/bfloat16.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/amx.h"
#include "cpu/kernels.h"

namespace fastrnn {
namespace {

#if defined(__x86_64__)

#define FASTRNN_AVX512 "avx512f,avx512bw,avx512dq,avx512vl"
constexpr int kUnits = 16;  // of a register

// ---- Advanced matrix extensions: tiles of 16 rows of 64 bytes ------------------------------------------

#define FASTRNN_AMX __attribute__((target("amx-tile,amx-bf16," FASTRNN_AVX512)))

/// One or two rows of tiles of C, each one or two tiles wide.
template <bool kLower, bool kWide>
FASTRNN_AMX void amx_tiles(const Bfloat16* a, int64_t lda, int upper, int64_t K, const Bfloat16* panel,
                           float* c, int64_t ldc, bool accumulate) {
  constexpr int64_t kRowBytes = (kWide ? 2 : 1) * 64;
  const Bfloat16* const a_lower = a + upper * lda;
  float* const c_lower = c + upper * ldc;
  const int64_t a_bytes = lda * int64_t(sizeof *a), c_bytes = ldc * int64_t(sizeof *c);
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if (kWide) _tile_loadd(1, c + kUnits, c_bytes);
    if (kLower) _tile_loadd(2, c_lower, c_bytes);
    if (kLower && kWide) _tile_loadd(3, c_lower + kUnits, c_bytes);
  } else {
    _tile_zero(0);
    if (kWide) _tile_zero(1);
    if (kLower) _tile_zero(2);
    if (kLower && kWide) _tile_zero(3);
  }
  for (int64_t k = 0; k < K; k += kBfloat16Depth) {
    const char* const weights = reinterpret_cast<const char*>(panel) + k / 2 * kRowBytes;
    _tile_loadd(6, weights, kRowBytes);
    if (kWide) _tile_loadd(7, weights + 64, kRowBytes);
    _tile_loadd(4, a + k, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kWide) _tile_dpbf16ps(1, 4, 7);
    if (kLower) _tile_loadd(5, a_lower + k, a_bytes);
    if (kLower) _tile_dpbf16ps(2, 5, 6);
    if (kLower && kWide) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if (kWide) _tile_stored(1, c + kUnits, c_bytes);
  if (kLower) _tile_stored(2, c_lower, c_bytes);
  if (kLower && kWide) _tile_stored(3, c_lower + kUnits, c_bytes);
}

FASTRNN_AMX void amx_multiply(const Bfloat16* a, int64_t lda, int64_t n, int64_t K, const Bfloat16* panels,
                              int count, int vectors, float* c, int64_t c_step, int64_t ldc,
                              bool accumulate) {
  constexpr int64_t kRows = 2 * 16;
  for (int64_t i = 0, left = (n + kRows - 1) / kRows; left > 0; --left) {
    const auto rows = static_cast<int>((n - i + left - 1) / left), upper = rows > 16 ? (rows + 1) / 2 : rows;
    amx::shape_tiles(upper, rows - upper);
    const auto tiles = rows > upper   ? vectors == 2 ? amx_tiles<true, true> : amx_tiles<true, false>
                       : vectors == 2 ? amx_tiles<false, true>
                                      : amx_tiles<false, false>;
    for (int p = 0; p < count; ++p)
      tiles(a + i * lda, lda, upper, K, panels + p * K * vectors * kUnits, c + i * ldc + p * c_step, ldc,
            accumulate);
    i += rows;
  }
  _tile_release();  // what else uses tiles shapes them for itself, and empty ones cost no context switch
}

// ---- AVX-512: a register of C is 16 units of a row -----------------------------------------------------

#define FASTRNN_BF16 __attribute__((target("avx512bf16," FASTRNN_AVX512)))

/// C[MR, NV registers] (+)= A panel.
template <int MR, int NV>
FASTRNN_BF16 void avx512_tile(const Bfloat16* a, int64_t lda, int64_t K, const Bfloat16* panel, float* c,
                              int64_t ldc, bool accumulate) {
  __m512 sums[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v)
      sums[i][v] = accumulate ? _mm512_loadu_ps(c + i * ldc + v * kUnits) : _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += 2) {
    __m512bh weights[NV];
    for (int v = 0; v < NV; ++v)
      weights[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panel + (k * NV + 2 * v) * kUnits));
    for (int i = 0; i < MR; ++i) {
      int32_t pair;
      std::memcpy(&pair, a + i * lda + k, sizeof pair);
      const auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
      for (int v = 0; v < NV; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], x, weights[v]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) _mm512_storeu_ps(c + i * ldc + v * kUnits, sums[i][v]);
}

constexpr int kTileRows = 12;  // two sums a row beside the weights, in 32 registers

template <int MR = kTileRows>
auto avx512_tile_for(int rows, int vectors) {
  if constexpr (MR > 1)
    if (rows < MR) return avx512_tile_for<MR - 1>(rows, vectors);
  return vectors == 2 ? avx512_tile<MR, 2> : avx512_tile<MR, 1>;
}

void avx512_multiply(const Bfloat16* a, int64_t lda, int64_t n, int64_t K, const Bfloat16* panels, int count,
                     int vectors, float* c, int64_t c_step, int64_t ldc, bool accumulate) {
  for (int p = 0; p < count; ++p, panels += K * vectors * kUnits, c += c_step)
    for (int64_t i = 0, left = (n + kTileRows - 1) / kTileRows; left > 0; --left) {
      const auto rows = static_cast<int>((n - i + left - 1) / left);
      avx512_tile_for(rows, vectors)(a + i * lda, lda, K, panels, c + i * ldc, ldc, accumulate);
      i += rows;
    }
}

constexpr unsigned kAmxBf16 = 1u << 22;
constexpr Bfloat16Products kAmx{"amx", amx_multiply}, kAvx512Bf16{"avx512_bf16", avx512_multiply};

#endif

// ---- Any processor -------------------------------------------------------------------------------------

float value(Bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

void portable_multiply(const Bfloat16* a, int64_t lda, int64_t n, int64_t K, const Bfloat16* panels,
                       int count, int vectors, float* c, int64_t c_step, int64_t ldc, bool accumulate) {
  const int64_t width = 16 * vectors;
  for (int p = 0; p < count; ++p, panels += K * width, c += c_step)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t u = 0; u < width; ++u) {
        float sum = accumulate ? c[i * ldc + u] : 0;
        for (int64_t k = 0; k < K; ++k)
          sum += value(a[i * lda + k]) * value(panels[(k / 2 * width + u) * 2 + k % 2]);
        c[i * ldc + u] = sum;
      }
}

constexpr Bfloat16Products kPortable{"portable", portable_multiply};

const Bfloat16Products* choose() {
  const char* const wanted = std::getenv("FASTRNN_CPU_BFLOAT16");
  const bool possible = instruction_set().bfloat16, named = wanted && *wanted;
  const auto asked = [&](const char* name) { return named && !std::strcmp(wanted, name); };
  if (asked("0") || (!possible && !named)) return nullptr;
  if (possible) {
#if defined(__x86_64__)
    if ((!named || asked("amx")) && amx::available(kAmxBf16)) return &kAmx;
    if ((!named || asked("avx512_bf16")) && __builtin_cpu_supports("avx512bf16")) return &kAvx512Bf16;
#endif
    if (asked("portable")) return &kPortable;
  }
  if (!named) return nullptr;
  // An override that cannot be followed must be heard: a test would otherwise prove the wrong kernel.
  throw std::runtime_error("FASTRNN_CPU_BFLOAT16=" + std::string(wanted) +
                           " is unknown or not available on this processor");
}

}  // namespace

const Bfloat16Products* bfloat16_products() {
  static const Bfloat16Products* const chosen = choose();
  return chosen;
}

}  // namespace fastrnn
