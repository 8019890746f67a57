#!/usr/bin/env bash
# What a CUDA device says of fastrnn: builds for it, runs the tests on it, the training command line, the tools of
# compute-sanitizer, and the benchmark against cuDNN. Downloads nothing; within ten minutes on 16 cores, or REPORT_SECONDS.
#   PYTHON=python3 benchmarks/gpu_report.sh OUT [STAGE...]
# Stages: build tests training sanitizers bench; all of them by default. A stage that fails is told and the next one
# runs; the exit status is 1 if any has failed or was not possible. OUT gets summary.txt, a log of each stage,
# gpu.json and gpu.png.
# shellcheck disable=SC2317  # stages are called by their names
set -uo pipefail
cd "$(dirname "$0")/.." || exit
if (($# == 0)); then
  sed -n '4,7s/^# *//p' "$0" >&2
  exit 2
fi
mkdir -p "$1" || exit
out=$(cd "$1" && pwd)
shift
stages=("$@")
((${#stages[@]})) || stages=(build tests training sanitizers bench)
python=${PYTHON:-python3}
cuda=${CUDA_HOME:-/usr/local/cuda}
summary=$out/summary.txt
end=${REPORT_SECONDS:-580}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} FAIL_WITHOUT_CUDA=1 PYTHONUNBUFFERED=1
failed=0
: >"$summary"

say() { echo "$*" | tee -a "$summary"; }

# run NAME SECONDS LOG COMMAND...: its output in LOG; told how it ended, at the latest after so many seconds.
run() {
  local name=$1 seconds=$2 log=$out/$3 start=$SECONDS status=0
  shift 3
  ((seconds <= end - SECONDS)) || seconds=$((end - SECONDS))
  if ((seconds <= 0)); then
    say "FAILED  $name: no time left"
    failed=1
    return
  fi
  echo "== $*" >>"$log"
  timeout --kill-after=10 "$seconds" "$@" >>"$log" 2>&1 || status=$?
  case $status in
    0) say "passed  $name ($((SECONDS - start)) s)" ;;
    124 | 137) say "FAILED  $name: not done in $seconds s, see ${log##*/}" ;;
    *) say "FAILED  $name: status $status, see ${log##*/}: $(grep -v '^ *$' "$log" | tail -n 1 | cut -c -200)" ;;
  esac
  ((status == 0)) || failed=1
}

missing() { # what, and what it costs
  say "MISSING $1"
  failed=1
}

has_module() { "$python" -c "import importlib.util as i, sys; sys.exit(i.find_spec('$1') is None)" 2>/dev/null; }

build() {
  local module capability
  for module in setuptools ninja; do
    has_module "$module" || missing "the Python package $module: the build needs it"
  done
  command -v "${CXX:-c++}" >/dev/null || missing "${CXX:-c++}: the build needs a C++20 compiler"
  if ! capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null); then
    missing "a CUDA device that torch sees: built for sm_90 instead"
    capability=9.0
  fi
  # ninja may be there as a Python package alone, with its program beside Python's.
  PATH=$(dirname "$(command -v "$python")"):$PATH FASTRNN_CUDA=1 TORCH_CUDA_ARCH_LIST=$capability \
    run "build for compute capability $capability" 270 build.log \
    "$python" setup.py build_ext --inplace
  if compgen -G 'build/objects/cuda/*.ptxas' >/dev/null; then
    say "        $(cat build/objects/cuda/*.ptxas | grep -c 'bytes spill stores') kernels," \
      "$(cat build/objects/cuda/*.ptxas | grep 'bytes spill stores' | grep -vc ' 0 bytes spill stores') with spills"
  fi
  run "doctor" 60 build.log "$python" -m fastrnn doctor
}

tests() {
  local workers=()
  if ! has_module pytest; then
    missing "pytest: tests/cuda_small.py stands in for the tests"
    run "tests/cuda_small.py" 120 tests.log "$python" tests/cuda_small.py
    return
  fi
  has_module xdist && workers=(-n 6)
  run "tests/test_cuda.py" 200 tests.log \
    "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" tests/test_cuda.py
}

# Every command of the training command line, to its report.
training() {
  local module
  for module in lightning jsonargparse torchmetrics matplotlib rich; do
    if ! has_module "$module"; then
      missing "the Python package $module: the training command line is left out"
      return
    fi
  done
  run "benchmarks/gpu_training.py" 150 training.log "$python" benchmarks/gpu_training.py "$out/runs"
  grep '^== train' "$out/training.log" | sed 's/^== /        /' | tee -a "$summary"
}

# The same kernels on the processor: beside the others, for they need no device.
host_tests() {
  failed=0
  if has_module pytest && has_module pybind11; then
    run "tests/test_cuda_kernels.py" 300 kernels.log \
      "$python" -m pytest -q -p no:cacheprovider tests/test_cuda_kernels.py
  else
    missing "pytest or pybind11: tests/test_cuda_kernels.py is left out"
  fi
  return "$failed"
}

sanitizers() {
  local tool sanitizer jobs=()
  sanitizer=$(command -v compute-sanitizer || echo "$cuda/bin/compute-sanitizer")
  if [[ ! -x $sanitizer ]]; then
    missing "compute-sanitizer: none of its four tools runs"
    return
  fi
  for tool in memcheck racecheck initcheck synccheck; do
    # Without torch's caching of memory, in which nothing is ever out of bounds or new.
    (
      failed=0
      export PYTORCH_NO_CUDA_MEMORY_CACHING=1
      run "$tool" 90 "$tool.log" \
        "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" tests/cuda_small.py --few
      exit "$failed"
    ) &
    jobs+=($!)
  done
  for tool in "${jobs[@]}"; do wait "$tool" || failed=1; done
  cat "$out"/*check.log >"$out/sanitizers.log"
  rm "$out"/*check.log
}

bench() {
  local module left
  for module in rich matplotlib; do
    has_module "$module" || missing "the Python package $module: the benchmark needs it"
  done
  left=$((end - SECONDS))
  ((left <= 300)) || left=300
  run "benchmark" "$left" bench.log "$python" benchmarks/gpu.py "$out" --budget "$((left - 30))"
}

"$python" - >>"$summary" 2>&1 <<'PYTHON' || missing "torch"
import platform, torch
print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0), "cuDNN", torch.backends.cudnn.version())
PYTHON
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,temperature.gpu --format=csv >>"$summary" 2>&1 ||
  missing "nvidia-smi"
PATH=$cuda/bin:$PATH nvcc --version >>"$summary" 2>&1 || missing "nvcc"

host=
for stage in "${stages[@]}"; do
  if [[ -n $host && $stage == bench ]]; then # which nothing may disturb
    wait "$host" || failed=1
    host=
  fi
  case $stage in
    tests)
      host_tests &
      host=$!
      tests
      ;;
    build | training | sanitizers | bench) "$stage" ;;
    *) missing "a stage called $stage: there are build, tests, training, sanitizers and bench" ;;
  esac
done
[[ -z $host ]] || wait "$host" || failed=1
say "$([[ $failed == 0 ]] && echo passed || echo FAILED) after $SECONDS s"
exit "$failed"
