#include "cpu/memory.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace fastrnn {
namespace {

constexpr int64_t kAlignment = 64, kHugePage = 2 << 20;

// The size of a block stands in the cache line before it.
std::atomic<char*> kept{nullptr};

int64_t& size_of(char* memory) { return *reinterpret_cast<int64_t*>(memory - kAlignment); }

void release(char* memory) {
  if (memory) std::free(memory - kAlignment);
}

}  // namespace

void prefer_huge_pages([[maybe_unused]] char* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto address = reinterpret_cast<uintptr_t>(memory), page = uintptr_t{kHugePage};
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint
#endif
}

char* borrow_memory(int64_t bytes) {
  char* const found = kept.exchange(nullptr);
  if (found && size_of(found) >= bytes) return found;
  release(found);
  const int64_t page = bytes > 2 * kHugePage ? kHugePage : kAlignment;
  const int64_t size = (bytes + kAlignment + page - 1) / page * page;
  auto* const block = static_cast<char*>(std::aligned_alloc(page, static_cast<size_t>(size)));
  if (!block) return nullptr;
  if (page == kHugePage) prefer_huge_pages(block, size);
  size_of(block + kAlignment) = size - kAlignment;
  return block + kAlignment;
}

void return_memory(char* memory, int64_t kept_bytes) {
  if (memory && size_of(memory) <= kept_bytes) memory = kept.exchange(memory);
  release(memory);
}

}  // namespace fastrnn
