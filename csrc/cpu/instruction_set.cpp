#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace fastrnn {
namespace {

struct Choice {
  const InstructionSet* set;
  bool available;
};

const InstructionSet& choose() {
  const Choice choices[] = {
#if defined(__x86_64__)
      {&kAvx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")},
      {&kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&kBaseline, true},
  };
  const char* const wanted = std::getenv("FASTRNN_CPU_ISA");
  for (const Choice& choice : choices)
    if (choice.available && (!wanted || !std::strcmp(wanted, choice.set->name))) return *choice.set;
  // An override that cannot be followed must be heard: a test would otherwise prove the wrong kernel.
  throw std::runtime_error("FASTRNN_CPU_ISA=" + std::string(wanted) +
                           " is unknown or not available on this processor");
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace fastrnn
