// Packed weights that a caller keeps: a header with the kernels, the number type and the sizes that the
// panels after it are made for.
#pragma once
#include <cstring>

#include "cpu/int8.h"
#include "cpu/kernels.h"

namespace fastrnn {

/// The kernels, the number type and the sizes of a pack. Cells with the same gates have the same panels.
struct PackHeader {
  char isa[16];
  int64_t gates, scalar_bytes, D, I, H, P, split, vectors, projected, storage, zero;
  int64_t unused[3];  // zero
};
constexpr int64_t kHeaderBytes = 128;
static_assert(sizeof(PackHeader) == kHeaderBytes);

template <class S>
PackHeader header_of(const CellInfo& cell, const PackProblem<S>& sizes) {
  PackHeader header{.isa = {},
                    .gates = cell.gates,
                    .scalar_bytes = sizeof(S),
                    .D = sizes.directions,
                    .I = sizes.I,
                    .H = sizes.H,
                    .P = sizes.P,
                    .split = cell.split,
                    .vectors = cell.vectors,
                    .projected = sizes.projected,
                    .storage = static_cast<int64_t>(sizes.storage),
                    .zero = sizes.storage == Storage::kInt8 ? int8_products().zero : 0,
                    .unused = {}};
  std::strncpy(header.isa, instruction_set().name, sizeof header.isa - 1);
  return header;
}

/// Whether these bytes are the pack of a layer of the cell, for numbers S; its sizes, which every byte of the
/// header is checked against: a damaged pack must not end in a read beyond it.
template <class S>
bool read_pack(const CellInfo& cell, const Kernels<S>& kernels, const char* from, int64_t bytes,
               PackProblem<S>& sizes) {
  if (bytes <= kHeaderBytes || reinterpret_cast<uintptr_t>(from) % sizeof(double) != 0) return false;
  PackHeader header;
  std::memcpy(&header, from, sizeof header);
  const auto& [isa, gates, scalar_bytes, D, I, H, P, split, vectors, projected, storage, zero, unused] =
      header;
  const bool possible =
      D >= 1 && D <= kMaxDirections && I >= 0 && H > 0 && P > 0 && (projected ? cell.projects : H == P) &&
      (storage == 0 || (storage > 0 && storage < int64_t(Storage::kCount) && sizeof(S) == sizeof(float))) &&
      // A weight takes a byte at least. After this no product of the sizes overflows.
      double(H) * ((cell.takes_gates ? 0 : double(I)) + (cell.dense ? double(P) : 0)) <= double(bytes);
  if (!possible) return false;
  sizes = {I, H, P, projected != 0, static_cast<Storage>(storage), static_cast<int>(D), {}, nullptr};
  const PackHeader expected = header_of(cell, sizes);
  return !std::memcmp(&header, &expected, sizeof header) && bytes == kHeaderBytes + kernels.pack(sizes);
}

}  // namespace fastrnn
