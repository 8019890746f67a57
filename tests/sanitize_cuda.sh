#!/usr/bin/env bash
# Runs the CUDA kernels on the CPU under AddressSanitizer with UndefinedBehaviorSanitizer: every cell, path and
# form; and under ThreadSanitizer, to which every CUDA thread is a thread: small shapes. Planted faults must be
# found.
#   PYTHON=.venv/bin/python tests/sanitize_cuda.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
sanitized() { PYTHONPATH=. "$python" tests/cuda_on_host.py "$@" -q; }
tests=(tests/test_cuda_on_host.py tests/test_cuda_kernels.py)
sanitized address "${tests[@]}" -k 'on_host or not (schedule or relu or peephole or coupled)'
# A program may have 8,000 threads at most, and barriers are slow: of the kernels only tests that launch few.
sanitized thread "${tests[@]}" \
  -k 'on_host or ((lstm or gru) and not (lstm_ or slstm) and (equals_the_reference and (f32 or bf16) or schedule and bf16))'
echo "sanitizers: nothing found in the CUDA kernels"
