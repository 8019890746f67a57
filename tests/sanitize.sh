#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer in a folder of its own and runs
# random configurations and the forms of the operators through it, on the best instruction set of the processor.
# The teams of threads run under ThreadSanitizer, in a program of their own. The package in the tree is not touched.
#   PYTHON=.venv/bin/python tests/sanitize.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-.venv/bin/python}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r setup.py pyproject.toml csrc fastrnn tests "$work"
[ -f README.md ] && cp README.md LICENSE "$work"
cd "$work"
rm -f fastrnn/_C*.so
FASTRNN_SANITIZE=1 "$python" setup.py -q build_clib build_ext --inplace

g++ -std=c++20 -O1 -g -fsanitize=thread -Icsrc csrc/testing/team_races.cpp csrc/testing/team.cpp csrc/cpu/team.cpp \
  -pthread -o team_races
TSAN_OPTIONS=halt_on_error=1 ./team_races

# The runtime must be there before Python's own allocator. torch leaks on purpose at exit.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=99
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:exitcode=98
export PYTHONPATH=$work PYTHONMALLOC=malloc
"$python" tests/sweep.py --configs "${CONFIGS:-60}" --seed 9000 --threads 2
"$python" -m pytest -q -p no:cacheprovider tests/test_scan.py \
  -k "every_form or without_rows or strides or empty_batch or (projection and 17)"
echo "sanitizers: nothing found"
