// Launches of the kernels in primitives.cuh, and kernels that are wrong, with plain types.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "testing/cuda_on_host.h"

namespace fastrnn::testing {

/// What these kernels are compiled with: address, thread, or nothing.
std::string sanitizer();

void number_threads(const Launch& launch, unsigned* out);
void exchange_lanes(const float* x, float* y, unsigned blocks, unsigned threads, int lane_mask,
                    Schedule schedule);
/// type: bf16, f16 or tf32
void multiply_tile(const std::string& type, const float* a, const float* b, float* d, Schedule schedule);
void round_numbers(const std::string& type, const float* x, float* y, int count);
void relay(uint32_t* values, unsigned blocks, unsigned threads, int steps, bool cooperative,
           Schedule schedule);
/// The first float of shared memory that no one has written.
float unset_memory();

/// Runs a kernel with the fault of this name.
void commit(const std::string& fault, Schedule schedule);
std::vector<std::string> faults();

}  // namespace fastrnn::testing
