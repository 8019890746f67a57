#!/usr/bin/env bash
# Runs the CUDA kernels on the CPU under AddressSanitizer with UndefinedBehaviorSanitizer, and under
# ThreadSanitizer, to which every CUDA thread is a thread: small cases, and planted faults that must be found.
#   PYTHON=.venv/bin/python tests/sanitize_cuda.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
tests=(tests/test_cuda_on_host.py)
for sanitizer in address thread; do
  PYTHONPATH=. "$python" tests/cuda_on_host.py "$sanitizer" -q "${tests[@]}"
done
echo "sanitizers: nothing found in the CUDA kernels"
