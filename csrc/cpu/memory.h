// Working memory that outlives a call: one block of at most kKeptBytes a process. A fresh block of this size
// comes from the kernel page by page, which takes longer than a single step computes. It holds nothing that a
// later call reads.
#pragma once
#include <cstdint>

namespace fastrnn {

constexpr int64_t kKeptBytes = int64_t{64} << 20;

/// At least `bytes` of uninitialised memory, aligned to a cache line; null when there is none.
char* borrow_memory(int64_t bytes);
void return_memory(char* memory);

}  // namespace fastrnn
