// W [K, columns] for products A W, in blocks of columns that are packed into panels or read in place. A last
// block of ragged width is always packed.
#pragma once
#include "cpu/gemm.h"
#include "cpu/scratch.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

template <class S>
class Columns {
 public:
  FASTRNN_INLINE void lay_out(Memory& memory, Rows<const S> w, int64_t K, int64_t columns, bool packs) {
    w_ = w, K_ = K, blocks_ = {columns}, packs_ = packs;
    panels_ = memory.take<S>((packs ? blocks_.count() : 1) * kBlock<S> * K);
  }

  /// Packs the blocks of worker `part` of `parts`.
  FASTRNN_INLINE void pack(int64_t part, int64_t parts) const {
    for (int64_t block = part; block < blocks_.count(); block += parts)
      if (packed(block))
        FASTRNN_ISA::pack({w_.data + block * kBlock<S>, w_.stride}, K_, blocks_.in_block(block),
                          blocks_.vectors(block), panel(block));
  }

  /// One block of C[n, columns] (+)= A[n, K] W.
  FASTRNN_INLINE void multiply(Rows<const S> a, int64_t n, int64_t block, S* c, int64_t ldc,
                               bool accumulate) const {
    const int vectors = blocks_.vectors(block);
    if (packed(block))
      FASTRNN_ISA::multiply<S>(a, n, K_, panel(block), vectors, c, ldc, accumulate);
    else
      multiply_rows<S>(a, n, K_, w_.data + block * kBlock<S>, w_.stride, kBlock<S>, vectors, c, ldc,
                       accumulate);
  }

 private:
  FASTRNN_INLINE bool packed(int64_t block) const {
    return packs_ || blocks_.in_block(block) < blocks_.vectors(block) * kLanes<S>;
  }
  FASTRNN_INLINE S* panel(int64_t block) const { return panels_ + (packs_ ? block * kBlock<S> * K_ : 0); }

  Rows<const S> w_{};
  int64_t K_ = 0;
  Blocks<S> blocks_{};
  bool packs_ = false;
  S* panels_ = nullptr;
};

}  // namespace
}  // namespace fastrnn::FASTRNN_ISA
