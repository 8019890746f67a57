#pragma once
#include <torch/csrc/stable/ops.h>

#include "common/problem.h"

namespace fastrnn {

/// torch's own threads, as many as torch.get_num_threads() says.
inline Parallel torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t count, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
            });
          }};
}

}  // namespace fastrnn
