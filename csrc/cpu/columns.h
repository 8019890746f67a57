// W [K, columns] for products A W, in blocks of columns that are packed into panels or read in place. A last
// block of ragged width is always packed.
#pragma once
#include "cpu/gemm.h"
#include "cpu/scratch.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

template <class S, class W = S>
class Columns {
 public:
  FASTRNN_INLINE void lay_out(Memory& memory, Rows<const W> w, int64_t K, int64_t columns, bool packs) {
    w_ = w, K_ = K, blocks_ = {columns}, packs_ = packs || std::is_same_v<W, Bfloat16>;
    panels_ = memory.take<W>((packs_ ? blocks_.count() : 1) * kBlock<S> * panel_depth<W>(K));
  }

  /// Packs the blocks of worker `part` of `parts`.
  FASTRNN_INLINE void pack(int64_t part, int64_t parts) const {
    for (int64_t block = part; block < blocks_.count(); block += parts)
      if (packed(block))
        FASTRNN_ISA::pack<S>(Rows<const W>{w_.data + block * kBlock<S>, w_.stride}, K_,
                             blocks_.in_block(block), blocks_.vectors(block), panel(block));
  }

  /// One block of C[n, columns] (+)= A[n, K] W.
  FASTRNN_INLINE void multiply(Rows<const W> a, int64_t n, int64_t block, S* c, int64_t ldc,
                               bool accumulate) const {
    const int vectors = blocks_.vectors(block);
    if constexpr (std::is_same_v<W, Bfloat16>)
      FASTRNN_ISA::multiply(a, n, K_, panel(block), 1, vectors, c, 0, ldc, accumulate);
    else if (packed(block))
      FASTRNN_ISA::multiply<S>(a, n, K_, panel(block), vectors, c, ldc, accumulate);
    else
      multiply_rows<S>(a, n, K_, w_.data + block * kBlock<S>, w_.stride, kBlock<S>, vectors, c, ldc,
                       accumulate);
  }

 private:
  FASTRNN_INLINE bool packed(int64_t block) const {
    return packs_ || blocks_.in_block(block) < blocks_.vectors(block) * kLanes<S>;
  }
  FASTRNN_INLINE W* panel(int64_t block) const {
    return panels_ + (packs_ ? block * kBlock<S> * panel_depth<W>(K_) : 0);
  }

  Rows<const W> w_{};
  int64_t K_ = 0;
  Blocks<S> blocks_{};
  bool packs_ = false;
  W* panels_ = nullptr;
};

}  // namespace
}  // namespace fastrnn::FASTRNN_ISA
