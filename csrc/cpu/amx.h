// Intel's advanced matrix extensions: what products of any number type need to use the tile registers.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace fastrnn::amx {

constexpr int kTileRows = 16, kTileBytes = 64;  // of a row

/// What ldtilecfg reads.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

/// Tiles 0 to 3 are C, two rows of tiles with `upper` and `lower` rows; 4 and 5 are A, 6 and 7 the panel.
__attribute__((target("amx-tile"))) inline void shape_tiles(int upper, int lower) {
  const int rows[] = {upper, upper, lower, lower, upper, lower, kTileRows, kTileRows};
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile)
    if (rows[tile] > 0)
      shapes.rows[tile] = static_cast<uint8_t>(rows[tile]), shapes.row_bytes[tile] = kTileBytes;
  // gcc 12 takes ldtilecfg to read 8 bytes, and may drop what is written to the other 56.
  asm volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
}

/// Whether this processor has tiles and their products of a number type (a bit of edx in leaf 7 of cpuid),
/// and Linux lends the process their registers, as it does on request.
inline bool available(unsigned products) {
  constexpr unsigned kTiles = 1u << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & products) && (edx & kTiles) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace fastrnn::amx
#endif
