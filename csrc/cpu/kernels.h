// The CPU kernels of every cell, once per instruction set: the table that the operators call through.
#pragma once
#include "cells/registry.h"
#include "common/problem.h"

namespace fastrnn {

/// Each returns false when there is no memory for its working arrays; pack returns the size in bytes.
template <class S>
struct Kernels {
  bool (*forward)(const ForwardProblem<S>&);
  bool (*backward)(const BackwardProblem<S>&);
  bool (*products)(const ProductsProblem<S>&);
  int64_t (*pack)(const PackProblem<S>&);
};

struct CellKernels {
  Kernels<float> f32;
  Kernels<double> f64;

  template <class S>
  const Kernels<S>& of() const {
    if constexpr (std::is_same_v<S, float>)
      return f32;
    else
      return f64;
  }
};

struct InstructionSet {
  const char* name;
  int block_bytes;  // of the units that one tile covers
  bool bfloat16;  // whether its kernels take matrices of Bfloat16, which makes them larger
  CellKernels cells[AllCells::kCount];
};

/// Best first; which ones exist depends on the platform that was built for.
extern const InstructionSet kAvx512, kAvx2, kBaseline;

/// The best one that this processor has, or the one that FASTRNN_CPU_ISA names. Chosen once.
const InstructionSet& instruction_set();

}  // namespace fastrnn
