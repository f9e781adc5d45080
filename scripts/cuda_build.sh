#!/usr/bin/env bash
# Builds the extension with its CUDA kernels against a CUDA build of torch, imports it, runs every operator on the CPU.
# Needs nvcc and a torch for CUDA, no GPU. Nothing is written into the source tree outside build/cuda.
#
#   PYTHON=.venv-cuda/bin/python scripts/cuda_build.sh
#   PYTHON=.venv-cuda/bin/python scripts/cuda_build.sh --pytorch-ood   its users' loops, too: its torchvision is for CUDA
#   PYTHON=.venv-cuda/bin/python scripts/cuda_build.sh --wheel   a wheel in dist/ instead, for all architectures
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
BUILD=build/cuda

# A missing compiler is loud everywhere and an error in CI, where nobody reads.
if ! command -v nvcc >/dev/null; then
  echo "cuda-build: SKIPPED: nvcc (CUDA toolkit) is not on the PATH, so no CUDA kernel was compiled" >&2
  [ -z "${CI:-}" ]
  exit
fi
# The toolkit behind nvcc, which may be reached through a wrapper.
export CUDA_HOME=${CUDA_HOME:-$(nvcc --dryrun -x cu -c /dev/null -o /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')}
export FASTVAE_CUDA=1
if [ "${1:-}" = --wheel ]; then
  exec "$PYTHON" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
fi
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a}
# The CPU kernels are those of every other build: one instruction set will do, in a third of the time.
export CFLAGS="${CFLAGS:-} -DFASTVAE_NO_CLONES"

"$PYTHON" setup.py --quiet build_py --build-lib "$BUILD/lib"
"$PYTHON" setup.py --quiet build_ext --force --build-lib "$BUILD/lib" --build-temp "$BUILD/temp"

# The source tree has a package of this name, too.
export PYTHONPATH="$PWD/$BUILD/lib"
(
  cd "$BUILD/lib"
  "$(cd - >/dev/null && realpath --no-symlinks "$PYTHON")" - <<'EOF'
import torch

import fastvae
from fastvae._extension import raw

info = raw.build_info()
assert info["cuda"] and info["cuda_architectures"], info
print(
    f"cuda-build: fastvae {fastvae.__version__} for CUDA {torch.version.cuda}, architectures "
    f"{info['cuda_architectures']}, imported under torch {torch.__version__}; GPUs here: {torch.cuda.device_count()}"
)
EOF
)
"$PYTHON" scripts/gpu_smoke.py --device cpu
"$PYTHON" scripts/cuda_graph_check.py
if [ "${1:-}" = --pytorch-ood ]; then
  # From tests/, since -m finds the package of the folder that it runs in first. A skipped test would not do.
  python=$(realpath --no-symlinks "$(command -v "$PYTHON")")
  (cd tests && "$python" -m pytest -q test_pytorch_ood.py) | tee "$BUILD/pytorch-ood.txt"
  grep -q "1 passed" "$BUILD/pytorch-ood.txt"
fi
