#!/usr/bin/env bash
# Compiles every CUDA kernel for each architecture that a wheel holds, warnings as errors, and keeps what ptxas says of
# registers and spills in build/cuda-report.txt. A spill fails. Needs nvcc, no GPU and no torch.
set -euo pipefail
cd "$(dirname "$0")/.."

# A missing compiler is loud everywhere and an error in CI, where nobody reads.
if ! command -v nvcc >/dev/null; then
  echo "cuda-check: SKIPPED: nvcc (CUDA toolkit) is not on the PATH, so no CUDA kernel was compiled" >&2
  [ -z "${CI:-}" ]
  exit
fi

REPORT=build/cuda-report.txt
OBJECTS=build/cuda-check
mkdir -p "$OBJECTS"
# The architectures of setup.py: A100, H100, B200, and PTX for what comes after.
ARCHITECTURES=(-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a
  -gencode arch=compute_100,code=sm_100 -gencode arch=compute_100,code=compute_100)
FLAGS=(-std=c++20 -O3 --expt-relaxed-constexpr -Werror all-warnings -Xptxas -v
  -Xcompiler -Wall,-Wextra,-Wno-unused-parameter --threads 2)

nvcc --version | tail -n 2 >"$REPORT"
for source in csrc/kernels/cuda/*.cu; do
  echo "cuda-check: $source"
  log=$OBJECTS/$(basename "$source").log
  nvcc "${FLAGS[@]}" "${ARCHITECTURES[@]}" -c "$source" -o "$OBJECTS/$(basename "$source").o" >"$log" 2>&1 ||
    { cat "$log" >&2; exit 1; }
  { echo "== $source"; if command -v cu++filt >/dev/null; then cu++filt <"$log"; else c++filt <"$log"; fi; } >>"$REPORT"
done

kernels=$(grep -c 'Used [0-9]* registers' "$REPORT")
most=$(grep -o 'Used [0-9]* registers' "$REPORT" | sort -k2 -n | tail -n 1)
if grep -B1 -E '[1-9][0-9]* bytes spill' "$REPORT" >&2; then
  echo "cuda-check: the kernels above spill registers (all: $REPORT)" >&2
  exit 1
fi
echo "cuda-check: $kernels kernels compiled, none spills; at most: $most (all: $REPORT)"
