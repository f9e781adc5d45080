#!/usr/bin/env bash
# What only a GPU can show, within ten minutes and without a network: builds the extension in place for this GPU, runs
# the tests on it, compute-sanitizer, the benchmarks and ncu. Results go to $OUT (default build/gpu); every stage runs
# as long as time is left, and the exit status tells whether all passed.
#
#   PYTHON=python3 OUT=build/gpu scripts/gpu_check.sh          (a python3 with a CUDA build of torch; nvcc on the PATH)
#
# What that python3 lacks besides torch can be brought along in a folder, made where there is a network:
#   pip install --target build/gpu-packages --python-version 3.12 --only-binary :all: ninja numpy pytest pytest-benchmark setuptools tqdm
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
PACKAGES=${PACKAGES:-build/gpu-packages}
export FASTVAE_CUDA=1 PYTHONPATH="$PWD:$PWD/$PACKAGES${PYTHONPATH:+:$PYTHONPATH}" PATH="$PWD/$PACKAGES/bin:$PATH"

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "gpu-check: $PYTHON sees no GPU (torch.cuda.is_available() is False)" >&2; exit 2; }
TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major == 9 else ""))')
export TORCH_CUDA_ARCH_LIST

failed=()
: >"$OUT/summary.txt"
note() { echo "gpu-check: $*" | tee -a "$OUT/summary.txt"; }

# stage SECONDS NAME COMMAND...: output to $OUT/NAME.txt, its end to the terminal.
stage() {
  local limit=$1 name=$2 start=$SECONDS status=0
  shift 2
  limit=$((limit < 590 - SECONDS ? limit : 590 - SECONDS))
  if [ "$limit" -lt 10 ]; then
    note "no time left for $name"
    failed+=("$name")
    return
  fi
  timeout "$limit" "$@" >"$OUT/$name.txt" 2>&1 || status=$?
  printf '== %s: exit status %d after %d s\n' "$name" "$status" $((SECONDS - start)) | tee -a "$OUT/summary.txt"
  tail -n 15 "$OUT/$name.txt" | cut -c 1-300
  [ "$status" -eq 0 ] || failed+=("$name")
}

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

stage 20 machine nvidia-smi
command -v ninja >/dev/null || note "ninja is not installed: files compile one after the other, which may take too long"
stage 280 build "$PYTHON" setup.py build_ext --inplace --force
stage 60 smoke "$PYTHON" scripts/gpu_smoke.py
if has pytest; then
  stage 150 tests-cuda "$PYTHON" -m pytest -q -m "not slow" -k cuda tests
else
  note "pytest is not installed: only scripts/gpu_smoke.py compares the GPU with the CPU"
fi
# Without triton there is no torch.compile to compare with.
stage 150 benchmarks "$PYTHON" benchmarks/flow.py --cuda --no-jax --output "$OUT" --compile "$(has triton && echo dense || echo none)"
stage 60 memory "$PYTHON" benchmarks/flow.py --cuda --memory --output "$OUT"
if command -v compute-sanitizer >/dev/null; then
  stage 100 sanitizer-memcheck compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" scripts/gpu_smoke.py
  stage 60 sanitizer-racecheck compute-sanitizer --tool racecheck --error-exitcode 9 "$PYTHON" scripts/gpu_smoke.py small
else
  note "compute-sanitizer is not installed: memory and races are not checked"
fi
if command -v ncu >/dev/null; then
  # Counters may be closed to us, which is no fault of the kernels.
  stage 60 ncu bash -c 'ncu --set basic -k regex:small_flow -c 6 "$@" || echo "ncu: no counters"' - "$PYTHON" \
    scripts/gpu_smoke.py small
else
  note "ncu is not installed: no counters"
fi
stage 90 benchmarks-jacobian "$PYTHON" benchmarks/jacobian.py --cuda --no-compile --output "$OUT"
stage 90 benchmarks-regret "$PYTHON" benchmarks/regret.py --cuda --output "$OUT"
if has pytest_benchmark; then
  stage 120 benchmarks-suite "$PYTHON" benchmarks/suite.py --quick --cuda --no-jax --no-compile --output "$OUT"
else
  note "pytest-benchmark is not installed: the operators' suite was not run"
fi
if has pytest; then
  stage 590 tests-all "$PYTHON" -m pytest -q -m "not slow" -k "not cuda" tests
fi

if [ ${#failed[@]} -gt 0 ]; then
  note "failed: ${failed[*]} (see $OUT)"
  exit 1
fi
note "everything passed (see $OUT)"
