// Working memory that outlives a call: one block a process. The operating system hands out a fresh block page
// by page, which takes longer than a single step computes. A large block asks for huge pages. No call reads
// what an earlier one left in it.
#pragma once
#include <cstdint>

namespace fastrnn {

constexpr int64_t kKeptBytes = int64_t{64} << 20;
// The most that is kept after a backward scan: the weight gradients that follow it need memory of that size.
constexpr int64_t kKeptInTraining = int64_t{16} << 20;

/// Asks for huge pages under a large array that has not been written yet: fewer TLB misses when weights
/// stream.
void prefer_huge_pages(char* memory, int64_t bytes);

/// At least `bytes` of uninitialised memory, aligned to a cache line; null when there is none.
char* borrow_memory(int64_t bytes);
/// Gives the memory back to the pool, which keeps up to `kept_bytes` for the next call.
void return_memory(char* memory, int64_t kept_bytes);

}  // namespace fastrnn
