// A function that never becomes a symbol: headers are compiled once per instruction set, and the linker may
// take one set's copy of a symbol for all of them.
#pragma once

#ifdef __CUDACC__
#define FASTRNN_INLINE __host__ __device__ __forceinline__
#else
#define FASTRNN_INLINE __attribute__((always_inline)) inline
#endif

namespace fastrnn {
template <class S>
FASTRNN_INLINE S square_root(S v) {
#ifdef __CUDACC__
  return sqrt(v);
#else
  return static_cast<S>(__builtin_sqrt(static_cast<double>(v)));
#endif
}
}  // namespace fastrnn
