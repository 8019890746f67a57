// Working memory of one call: laid out twice by the same function, first to measure, then to hand out.
#pragma once
#include "cpu/memory.h"
#include "cpu/vector.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

/// Hands out arrays from a block that begins at `base`, each on a cache line of its own.
class Memory {
 public:
  FASTRNN_INLINE explicit Memory(char* base) : base_(base) {}

  template <class S>
  FASTRNN_INLINE S* take(int64_t count) {
    char* const p = base_ + size_;
    size_ += (count * static_cast<int64_t>(sizeof(S)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<S*>(p);
  }

  FASTRNN_INLINE int64_t size() const { return size_; }

 private:
  static constexpr int64_t kAlignment = 64;
  char* base_;
  int64_t size_ = 0;
};

class Scratch {
 public:
  /// layout(memory) calls take() for each array, in the same order both times.
  template <class F>
  FASTRNN_INLINE explicit Scratch(F&& layout, int64_t kept_bytes = kKeptBytes) : kept_bytes_(kept_bytes) {
    Memory measure(nullptr);
    layout(measure);
    base_ = borrow_memory(measure.size());
    if (base_ == nullptr) return;
    Memory memory(base_);
    layout(memory);
  }
  FASTRNN_INLINE ~Scratch() { return_memory(base_, kept_bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  FASTRNN_INLINE bool failed() const { return base_ == nullptr; }

 private:
  char* base_ = nullptr;
  int64_t kept_bytes_;
};

/// Stride of a row of `units` numbers in scratch memory: whole blocks, and one cache line more, so that the
/// rows of a tile do not fall into the same set of the L1 cache.
template <class S>
FASTRNN_INLINE int64_t padded(int64_t units, int64_t block) {
  return (units + block - 1) / block * block + 64 / static_cast<int64_t>(sizeof(S));
}

}  // namespace
}  // namespace fastrnn::FASTRNN_ISA
