#include "cpu/memory.h"

#include <atomic>
#include <cstdlib>

namespace fastrnn {
namespace {

constexpr int64_t kAlignment = 64;

// The size of a block stands in the cache line before it.
std::atomic<char*> kept{nullptr};

int64_t& size_of(char* memory) { return *reinterpret_cast<int64_t*>(memory - kAlignment); }

void release(char* memory) {
  if (memory) std::free(memory - kAlignment);
}

}  // namespace

char* borrow_memory(int64_t bytes) {
  char* const found = kept.exchange(nullptr);
  if (found && size_of(found) >= bytes) return found;
  release(found);
  const int64_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  auto* const block =
      static_cast<char*>(std::aligned_alloc(kAlignment, static_cast<size_t>(size + kAlignment)));
  if (!block) return nullptr;
  size_of(block + kAlignment) = size;
  return block + kAlignment;
}

void return_memory(char* memory) {
  if (memory && size_of(memory) <= kKeptBytes) memory = kept.exchange(memory);
  release(memory);
}

}  // namespace fastrnn
