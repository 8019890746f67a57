// The CUDA operators of one cell: lstm.cu and its siblings register them.
#pragma once
#include <torch/csrc/stable/library.h>

#include "cuda/device.h"

namespace fastrnn {

template <class Cell>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& h0, const MaybeTensor& c0, Tensors w_ih, Tensors w_hh, Tensors b_ih,
    Tensors b_hh, Tensors w_hr, Tensors u, const MaybeTensor& batch_sizes, const MaybeTensor& lengths,
    const MaybeTensor& reset, bool batch_first, int64_t save) {
  CudaDevice device(h0);
  const ForwardCall call(Cell::kInfo, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, u, batch_sizes, lengths, reset,
                         batch_first, save);
  Driver<CudaDevice, Cell>(device, takes_tf32(h0)).forward(call);
  return call.results();
}

template <class Cell, bool kWriteOver>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n, const MaybeTensor& dsaved_c,
    const Tensor& saved, const Tensor& saved_c, const Tensor& y, const Tensor& h0, const MaybeTensor& c0,
    Tensors w_hh, Tensors w_hr, Tensors u, const MaybeTensor& batch_sizes, const MaybeTensor& lengths,
    const MaybeTensor& reset, bool batch_first, bool keep) {
  CudaDevice device(h0);
  const BackwardCall call(Cell::kInfo, dy, dh_n, dc_n, dsaved_c, saved, saved_c, y, h0, c0, w_hh, w_hr, u,
                          batch_sizes, lengths, reset, batch_first, keep, kWriteOver);
  Driver<CudaDevice, Cell>(device, takes_tf32(h0)).backward(call);
  return call.results();
}

template <class Cell, class Library>
void register_operators(Library& m) {
  const std::string name = Cell::kInfo.name;
  m.impl(name.c_str(), TORCH_BOX(&forward<Cell>));
  m.impl((name + "_backward").c_str(), TORCH_BOX((&backward<Cell, false>)));
  if constexpr (Cell::kInfo.reuses_saved)
    m.impl((name + "_backward_in_place").c_str(), TORCH_BOX((&backward<Cell, true>)));
}

}  // namespace fastrnn
