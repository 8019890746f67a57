// The CPU kernels of every cell, once per instruction set: the table that the operators call through.
#pragma once
#include "cells/registry.h"
#include "common/problem.h"

namespace fastrnn {

/// Each returns false when there is no memory for its working arrays; pack returns the size in bytes.
struct CellKernels {
  bool (*forward_f32)(const ForwardProblem<float>&);
  bool (*forward_f64)(const ForwardProblem<double>&);
  bool (*backward_f32)(const BackwardProblem<float>&);
  bool (*backward_f64)(const BackwardProblem<double>&);
  bool (*products_f32)(const ProductsProblem<float>&);
  bool (*products_f64)(const ProductsProblem<double>&);
  int64_t (*pack_f32)(const PackProblem<float>&);
  int64_t (*pack_f64)(const PackProblem<double>&);
};

struct InstructionSet {
  const char* name;
  int block_bytes;  // of the units that one tile covers
  CellKernels cells[AllCells::kCount];
};

/// Best first; which ones exist depends on the platform that was built for.
extern const InstructionSet kAvx512, kAvx2, kBaseline;

/// The best one that this processor has, or the one that FASTRNN_CPU_ISA names. Chosen once.
const InstructionSet& instruction_set();

}  // namespace fastrnn
