#!/usr/bin/env bash
# What only a GPU can show, within ten minutes and without a network: builds the extension in place for this GPU, runs
# the tests on it, compute-sanitizer and the benchmarks. Results go to $OUT (default build/gpu); every stage runs, and
# the exit status tells whether all passed.
#
#   PYTHON=python3 OUT=build/gpu scripts/gpu_check.sh          (a python3 with a CUDA build of torch; nvcc on the PATH)
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
export FASTVAE_CUDA=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "gpu-check: $PYTHON sees no GPU (torch.cuda.is_available() is False)" >&2; exit 2; }
TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major == 9 else ""))')
export TORCH_CUDA_ARCH_LIST

failed=()
# stage SECONDS NAME COMMAND...: output to $OUT/NAME.txt, its end to the terminal.
stage() {
  local limit=$1 name=$2 start=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" >"$OUT/$name.txt" 2>&1 || status=$?
  printf '== %s: exit status %d after %d s\n' "$name" "$status" $((SECONDS - start)) | tee -a "$OUT/summary.txt"
  tail -n 15 "$OUT/$name.txt" | cut -c 1-300
  [ "$status" -eq 0 ] || failed+=("$name")
}

: >"$OUT/summary.txt"
stage 20 machine nvidia-smi
stage 240 build "$PYTHON" setup.py build_ext --inplace --force
stage 60 smoke "$PYTHON" scripts/gpu_smoke.py
if "$PYTHON" -c 'import pytest' 2>/dev/null; then
  stage 150 tests-cuda "$PYTHON" -m pytest -q -m "not slow" -k cuda tests
else
  echo "gpu-check: pytest is not installed; only scripts/gpu_smoke.py compares the GPU with the CPU" | tee -a "$OUT/summary.txt"
fi
if command -v compute-sanitizer >/dev/null; then
  stage 100 sanitizer-memcheck compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" scripts/gpu_smoke.py
  stage 60 sanitizer-racecheck compute-sanitizer --tool racecheck --error-exitcode 9 "$PYTHON" scripts/gpu_smoke.py
else
  echo "gpu-check: compute-sanitizer is not installed; memory and races are not checked" | tee -a "$OUT/summary.txt"
fi
if [ -f benchmarks/flow.py ] && [ $SECONDS -lt 480 ]; then
  stage 100 benchmarks "$PYTHON" -m benchmarks.flow --device cuda
fi
if "$PYTHON" -c 'import pytest' 2>/dev/null && [ $SECONDS -lt 540 ]; then
  stage $((590 - SECONDS)) tests-all "$PYTHON" -m pytest -q -m "not slow" tests
fi

if [ ${#failed[@]} -gt 0 ]; then
  echo "gpu-check: failed: ${failed[*]} (see $OUT)" | tee -a "$OUT/summary.txt"
  exit 1
fi
echo "gpu-check: everything passed (see $OUT)" | tee -a "$OUT/summary.txt"
