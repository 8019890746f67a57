// From tensors to the problem structs: every argument is checked here, once, and trusted afterwards.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/problem.h"

namespace fastrnn {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;
using MaybeTensors = std::vector<MaybeTensor>;

inline std::string to_string(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

/// Checks shape, dtype and device against those of the whole call.
class Arguments {
 public:
  explicit Arguments(const Tensor& like) : like_(like) {}

  void check(const Tensor& tensor, const char* name, const char* letters,
             const std::vector<int64_t>& expected, bool bfloat16 = false) const {
    const auto dtype = bfloat16 ? torch::headeronly::ScalarType::BFloat16 : like_.scalar_type();
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name,
                    bfloat16 ? " must be bfloat16, as the other matrices" : " must have the dtype of h0");
    check_device(tensor, name);
    check_sizes(tensor, name, letters, expected);
  }

  static void check_sizes(const Tensor& tensor, const char* name, const char* letters,
                          const std::vector<int64_t>& expected) {
    STD_TORCH_CHECK(sizes_of(tensor) == expected, name, " must be ", letters, " = ", to_string(expected),
                    ", got ", to_string(sizes_of(tensor)));
  }

  void check_device(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(
        tensor.is_cpu() == like_.is_cpu() && tensor.get_device_index() == like_.get_device_index(), name,
        " must be on the device of h0");
  }

 private:
  const Tensor& like_;
};

/// A row's units must lie side by side; rows may be any distance apart.
inline Tensor with_rows(const Tensor& matrix) {
  const int64_t last = matrix.dim() - 1;
  if (matrix.size(last) <= 1 || matrix.stride(last) == 1) return matrix;
  return torch::stable::contiguous(matrix);
}

/// with_rows and one distance between all rows, for [D, N, *].
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline MaybeTensor contiguous_if(const MaybeTensor& tensor) {
  return tensor ? MaybeTensor(as_contiguous(*tensor)) : std::nullopt;
}

/// Uninitialised, with the dtype and device of `like`. The shim, because the dispatcher costs 2 us a tensor.
inline Tensor empty(const std::vector<int64_t>& sizes, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  int32_t dtype, device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, device_type, like.get_device_index(),
                                                  &handle));
  return Tensor(handle);
}

template <class S>
Rows<const S> rows(const Tensor& matrix) {
  return {static_cast<const S*>(matrix.const_data_ptr()), matrix.stride(0)};
}

/// Row-shaped tensors [D, N, *] of one direction, contiguous.
template <class S>
Rows<S> direction_rows(const Tensor& tensor, int64_t direction) {
  const int64_t width = tensor.size(2);
  return {static_cast<S*>(tensor.data_ptr()) + direction * tensor.size(1) * width, width};
}

/// The layout of the rows. batch_sizes [T] (packed): positive, non-increasing, and B first. lengths [B]
/// (dense): from 0 to T, in any order. reset [N]: bool.
class SequenceLayout {
 public:
  SequenceLayout(int64_t N, int64_t B, const MaybeTensor& batch_sizes, const MaybeTensor& lengths,
                 const MaybeTensor& reset, bool batch_first) {
    if (batch_sizes)
      packed(N, B, *batch_sizes);
    else
      dense(N, B, batch_first);
    if (lengths) {
      STD_TORCH_CHECK(!batch_sizes, "a packed sequence has its lengths already");
      set_lengths(*lengths);
    }
    if (!reset) return;
    STD_TORCH_CHECK(reset->scalar_type() == torch::headeronly::ScalarType::Bool, "reset must be bool");
    STD_TORCH_CHECK(sizes_of(*reset) == std::vector<int64_t>{N}, "reset must be [N] = [", N, "], got ",
                    to_string(sizes_of(*reset)));
    reset_ = as_contiguous(*reset);
    sequence_.reset = reset_->const_data_ptr<bool>();
  }
  SequenceLayout(const SequenceLayout&) = delete;
  SequenceLayout& operator=(const SequenceLayout&) = delete;

  const Sequence& get() const { return sequence_; }

 private:
  void dense(int64_t N, int64_t B, bool batch_first) {
    STD_TORCH_CHECK(N > 0 || B == 0, "Expected sequence length to be larger than 0 in RNN");
    STD_TORCH_CHECK(B == 0 ? N == 0 : N % B == 0, "x must have T*B rows for B = ", B, ", got ", N);
    const int64_t T = B == 0 ? 0 : N / B;
    sequence_.T = T, sequence_.B = B;
    sequence_.t_stride = batch_first ? 1 : B, sequence_.b_stride = batch_first ? T : 1;
  }

  static Tensor integers(const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(
        tensor.is_cpu() && tensor.dim() == 1 && tensor.scalar_type() == torch::headeronly::ScalarType::Long,
        name, " must be a 1-D int64 tensor on the CPU");
    return as_contiguous(tensor);
  }

  void packed(int64_t N, int64_t B, const Tensor& batch_sizes) {
    const Tensor sizes = integers(batch_sizes, "batch_sizes");
    const int64_t* const size = sizes.const_data_ptr<int64_t>();
    const int64_t T = sizes.numel();
    offsets_.assign(1, 0);
    for (int64_t t = 0; t < T; ++t) {
      STD_TORCH_CHECK(size[t] > 0 && size[t] <= (t == 0 ? B : size[t - 1]),
                      "batch_sizes must be positive and must not increase, got ", size[t], " at step ", t);
      offsets_.push_back(offsets_.back() + size[t]);
    }
    STD_TORCH_CHECK(T > 0 && size[0] == B, "batch_sizes must begin with the batch size of h0, ", B);
    STD_TORCH_CHECK(offsets_.back() == N, "batch_sizes must add up to the rows of x, ", N, ", got ",
                    offsets_.back());
    sequence_.T = T, sequence_.B = B, sequence_.b_stride = 1;
    sequence_.offsets = offsets_.data();
    for (int64_t t = T; t > 0; --t)  // the rows that end with step t - 1, the longest first
      last_.insert(last_.end(), static_cast<size_t>(size[t - 1]) - last_.size(), t - 1);
    sequence_.last = last_.data();
  }

  void set_lengths(const Tensor& lengths) {
    const Tensor given = integers(lengths, "lengths");
    const int64_t* const length = given.const_data_ptr<int64_t>();
    STD_TORCH_CHECK(given.numel() == sequence_.B, "lengths must be [B] = [", sequence_.B, "], got [",
                    given.numel(), "]");
    counts_.assign(static_cast<size_t>(sequence_.T) + 1, 0);
    for (int64_t b = 0; b < sequence_.B; ++b) {
      STD_TORCH_CHECK(length[b] >= 0 && length[b] <= sequence_.T,
                      "lengths must be between 0 and T = ", sequence_.T, ", got ", length[b], " at ", b);
      ++counts_[static_cast<size_t>(length[b])];
      order_.push_back(b);
    }
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int64_t a, int64_t b) { return length[a] > length[b]; });
    // From the rows that have each length to those that take part in each step: they are longer.
    for (int64_t t = sequence_.T, longer = 0; t >= 0; --t)
      longer += std::exchange(counts_[static_cast<size_t>(t)], longer);
    for (const int64_t b : order_) last_.push_back(length[b] - 1);
    sequence_.last = last_.data();
    sequence_.counts = counts_.data();
    sequence_.order = order_.data();
  }

  std::vector<int64_t> offsets_, counts_, order_, last_;
  MaybeTensor reset_;
  Sequence sequence_{};
};

}  // namespace fastrnn
