// A function that never becomes a symbol: headers are compiled once per instruction set, and the linker may
// take one set's copy of a symbol for all of them.
#pragma once

#ifdef __CUDACC__
#define FASTRNN_INLINE __host__ __device__ __forceinline__
#else
#define FASTRNN_INLINE __attribute__((always_inline)) inline
#endif
