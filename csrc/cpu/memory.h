// Working memory that outlives a call: one block a process. A fresh block comes from the kernel page by page,
// which takes longer than a single step computes; a large one asks for huge pages. It holds nothing that a
// later call reads.
#pragma once
#include <cstdint>

namespace fastrnn {

constexpr int64_t kKeptBytes = int64_t{64} << 20;
// Kept after a backward scan, which the gradients of the weights follow: these need as much memory.
constexpr int64_t kKeptInTraining = int64_t{16} << 20;

/// Asks for huge pages where memory that nobody has written yet is large: the weights stream through it.
void prefer_huge_pages(char* memory, int64_t bytes);

/// At least `bytes` of uninitialised memory, aligned to a cache line; null when there is none.
char* borrow_memory(int64_t bytes);
/// Keeps it, up to so many bytes.
void return_memory(char* memory, int64_t kept_bytes);

}  // namespace fastrnn
