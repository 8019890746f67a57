// Working memory of one call: laid out twice by the same function, first to measure, then to hand out.
#pragma once
#include "cpu/memory.h"
#include "cpu/vector.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

class Scratch {
 public:
  /// layout(scratch) calls take() for each array, in the same order both times.
  template <class F>
  FASTRNN_INLINE explicit Scratch(F&& layout) {
    layout(*this);
    base_ = borrow_memory(size_);
    if (base_ == nullptr) return;
    size_ = 0;
    layout(*this);
  }
  FASTRNN_INLINE ~Scratch() { return_memory(base_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  FASTRNN_INLINE bool failed() const { return base_ == nullptr; }

  template <class S>
  FASTRNN_INLINE S* take(int64_t count) {
    char* const p = base_ + size_;
    size_ += (count * static_cast<int64_t>(sizeof(S)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<S*>(p);
  }

 private:
  static constexpr int64_t kAlignment = 64;
  char* base_ = nullptr;
  int64_t size_ = 0;
};

/// Stride of a row of `units` numbers in scratch memory: whole blocks, and one cache line more, so that the
/// rows of a tile do not fall into the same set of the L1 cache.
template <class S>
FASTRNN_INLINE int64_t padded(int64_t units, int64_t block) {
  return (units + block - 1) / block * block + 64 / static_cast<int64_t>(sizeof(S));
}

}  // namespace
}  // namespace fastrnn::FASTRNN_ISA
