#!/usr/bin/env bash
# What only a GPU can show, on a bare machine without a network, in three calls of at most ten minutes each:
#
#   scripts/gpu_check.sh first     import, smoke, the GPU tests, compute-sanitizer
#   scripts/gpu_check.sh second    the benchmarks, each case written as it ends; torch.compile's rivals last
#   scripts/gpu_check.sh third     ncu, JAX, what torch.compile does on a GPU
#
# $OUT (default build/gpu) receives CALL.tar.gz and CALL.txt, both rewritten after each stage, so that a call that is cut
# off has lost one stage at most. A stage that fails is recorded and the next one runs; the exit status tells in the end.
#
#   PYTHON     a python3 with a CUDA build of torch (default python3)
#   PREBUILT   a folder with _C.*.so and _build.py built elsewhere for that Python and torch (default
#              build/gpu-prebuilt); without one that imports, the extension is compiled here, for this GPU
#   PACKAGES   a folder of packages that PYTHON lacks (default build/gpu-packages), made where there is a network:
#                pip install --target build/gpu-packages --no-deps --python-version 3.12 --only-binary :all: captum
#   STAGES     only these, by name         TESTS   what pytest is given (default tests)
#   SHARE      of the time that benchmarks take (default 1); FASTVAE_COMMIT names what they measure, without a history
#   SECONDS_IN_ALL  of a call (default 580)
#   --dry-run  before the call's name: everything on the CPU and small, with whatever tools the PATH holds
set -uo pipefail
cd "$(dirname "$0")/.."

dry=
[ "${1:-}" != --dry-run ] || { dry=yes; shift; }
call=${1:-}
case $call in first | second | third) ;; *)
  echo "gpu-check: expected first, second or third, got '$call'" >&2
  exit 2
  ;;
esac

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
PREBUILT=${PREBUILT:-build/gpu-prebuilt}
PACKAGES=${PACKAGES:-build/gpu-packages}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-580}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$OUT" "$work/$call"
export PYTHONPATH="$PWD:$PWD/$PACKAGES${PYTHONPATH:+:$PYTHONPATH}" PATH="$PWD/$PACKAGES/bin:$PATH"
# Unbuffered: what was printed before a limit is what there is to see. The workspace makes cuBLAS repeat to the bit.
export PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
# pip's nvcc is not where torch looks, and a wrapper on the PATH does not say where its toolkit is.
if [ -z "${CUDA_HOME:-}" ] && command -v nvcc >/dev/null; then
  # shellcheck disable=SC2016  # a dollar sign that nvcc prints
  CUDA_HOME=$(nvcc --dryrun -x cu -c /dev/null -o /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
fi
[ -n "${CUDA_HOME:-}" ] || CUDA_HOME=$(ls -d /usr/local/cuda 2>/dev/null || true)
[ -z "$CUDA_HOME" ] || export CUDA_HOME

failed=()
note() { echo "gpu-check: $*" | tee -a "$work/$call/summary.txt"; }

# What there is so far, in one file; the old one stays until the new one is whole.
keep() {
  cp "$work/$call/summary.txt" "$OUT/$call.txt"
  tar czf "$OUT/.$call.tar.gz" -C "$work" "$call" && mv "$OUT/.$call.tar.gz" "$OUT/$call.tar.gz"
}

# stage LIMIT NAME COMMAND...: at most so many seconds; output to NAME.txt, its end to the terminal.
stage() {
  local limit=$1 name=$2 start=$SECONDS status=0
  shift 2
  [ -z "${STAGES:-}" ] || [[ " $STAGES " == *" $name "* ]] || return 0
  [ -z "$dry" ] || limit=$((limit * 10)) # a dry run may be on a small and busy machine
  limit=$((limit < SECONDS_IN_ALL - SECONDS ? limit : SECONDS_IN_ALL - SECONDS))
  if [ "$limit" -lt 5 ]; then
    note "no time left for $name"
    failed+=("$name")
    keep
    return
  fi
  timeout --kill-after 5 "$limit" "$@" >"$work/$call/$name.txt" 2>&1 || status=$?
  note "$name: exit status $status after $((SECONDS - start)) s"
  tail -n 12 "$work/$call/$name.txt" | cut -c 1-300
  [ "$status" -eq 0 ] || failed+=("$name")
  keep
}

has() { "$PYTHON" -c "import $1" 2>/dev/null; }
imports() { "$PYTHON" -c "from fastvae._extension import raw; assert raw.build_info()['cuda'] or '$dry', 'no CUDA kernels'"; }
machine() {
  nvidia-smi || echo "nvidia-smi: exit status $?"
  "$PYTHON" - <<'PY'
import importlib.metadata, os, pathlib, platform, sys, sysconfig
print("Python", platform.python_version(), sys.executable)
print("Python.h", (pathlib.Path(sysconfig.get_path("include")) / "Python.h").is_file())
print("CUDA_HOME", os.environ.get("CUDA_HOME", "none"))
for name in ("torch", "setuptools", "ninja", "pybind11", "numpy", "pytest", "pytest-xdist", "jax", "tqdm",
             "triton", "captum", "matplotlib", "scikit-learn", "safetensors"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "none")
PY
}

# The extension that was carried, or one that is compiled here.
extension() {
  imports && { echo "imported as it lies here"; return; }
  if compgen -G "$PREBUILT/_C.*.so" >/dev/null; then
    cp "$PREBUILT"/_C.*.so "$PREBUILT/_build.py" fastvae/
    imports && { echo "imported from $PREBUILT"; return; }
  fi
  [ -z "$dry" ] || return 1
  TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major == 9 else ""))') || return 1
  export TORCH_CUDA_ARCH_LIST FASTVAE_CUDA=1
  # The kernels for a CPU are tested elsewhere: one instruction set will do, in a third of the time.
  CFLAGS="${CFLAGS:-} -DFASTVAE_NO_CLONES" "$PYTHON" setup.py build_ext --inplace --force && imports
}
export -f machine extension imports
export PYTHON PREBUILT dry

if [ -z "$dry" ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  note "$PYTHON sees no GPU (torch.cuda.is_available() is False)"
  keep
  exit 2
fi

stage 30 machine bash -c machine
stage 420 extension bash -c extension
if [[ " ${failed[*]} " == *" extension "* ]]; then
  note "no extension, so nothing else can run"
  keep
  exit 1
fi

smoke=("$PYTHON" scripts/gpu_smoke.py)
# What is looked at for races and for counters.
races=(grad_dot log_px-small log_px-image log_px-categorical jacobian-small jacobian-activations jacobian-image small)
counters=(grad_dot small log_px-small jacobian-small)
if [ -n "$dry" ]; then
  smoke+=(--device cpu)
  races=(grad_dot)
  counters=(grad_dot)
fi
# One thread each: as many processes as there are processors share them.
pytest=(env OMP_NUM_THREADS=1 "$PYTHON" -m pytest -v --tb=short -m "not slow" -p no:cacheprovider)
! has xdist || pytest+=(-n "${WORKERS:-$(($(nproc) > 1 ? $(nproc) - 1 : 1))}" --dist worksteal)
read -ra tests <<<"${TESTS:-tests}"
# Files that name no device, which run on the GPU as well by way of the default one.
unplaced=(adapted_step_size ais conditions consistency densities elbo imputation influence influence_modules iwae_bound
  learned_likelihoods network_density network_operators select_outputs weighted_models)
default=cuda
[ -z "$dry" ] || { default=cpu; unplaced=(select_outputs); }
unplaced=("${unplaced[@]/#/tests/test_}")
unplaced=("${unplaced[@]/%/.py}")
results="$work/$call/results"
device=${dry:+--cpu --quick}
device=${device:---cuda}

# bench LIMIT NAME MODULE OPTION...: results in their own folder, each case as it ends.
bench() {
  local limit=$1 name=$2 module=$3
  shift 3
  # shellcheck disable=SC2086  # one option or two
  stage "$limit" "$name" "$PYTHON" -m benchmarks.speed "$module" $device --output "$results" "$@"
}

case $call in
  first)
    stage 90 smoke "${smoke[@]}" ${dry:+leapfrog grad_dot}
    if has pytest; then
      stage 260 tests "${pytest[@]}" -k "(cuda or gpu) and not compile and not inductor and not export" "${tests[@]}"
      stage 150 tests-default-device "${pytest[@]}" --default-device "$default" -k "not compile" \
        "${unplaced[@]}"
    else
      note "pytest is not installed: only scripts/gpu_smoke.py compares the GPU with the CPU"
    fi
    if command -v compute-sanitizer >/dev/null; then
      # PyTorch's allocator hands out parts of large blocks, whose ends no tool would notice.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage 150 memcheck compute-sanitizer --tool memcheck --error-exitcode 9 \
        "${smoke[@]}" ${dry:+leapfrog}
      stage 120 racecheck compute-sanitizer --tool racecheck --error-exitcode 9 "${smoke[@]}" "${races[@]}"
    else
      note "compute-sanitizer is not installed: memory and races are not checked"
    fi
    ;;
  second)
    share=(--share "${SHARE:-1}")
    bench 90 flow flow --no-jax --no-compile "${share[@]}"
    bench 100 tracin tracin "${share[@]}"
    bench 80 regret regret "${share[@]}"
    bench 80 log_likelihood log_likelihood --no-compile "${share[@]}"
    bench 60 jacobian jacobian --no-compile --no-jax "${share[@]}"
    bench 30 jacobian-memory jacobian --memory
    # What the README promises somebody with much data, then where the time of each operator goes.
    stage 60 profile-large "$PYTHON" scripts/gpu_profile.py ${dry:+--device cpu} tracin-60000 regret-500
    stage 120 profile "$PYTHON" scripts/gpu_profile.py ${dry:+--device cpu} ${dry:+jacobian-small}
    bench 200 zoo zoo --batches 64 "${share[@]}" ${dry:+--only mlp}
    bench 40 flow-memory flow --memory
    bench 90 operators operators --no-jax --no-compile --share 0.2
    # Without triton there is no torch.compile to compare with.
    if has triton || [ -n "$dry" ]; then
      results="$work/$call/results-compile"
      bench 120 jacobian-compile jacobian --no-jax
      bench 120 log_likelihood-compile log_likelihood
      bench 200 flow-compile flow --no-jax
    fi
    ;;
  third)
    if command -v ncu >/dev/null; then
      # Counters may be closed to us, which is no fault of the kernels, but is to be seen.
      stage 120 ncu ncu --set basic -k "regex:small_flow|grad_dot|log_px|jacobian" -c 24 "${smoke[@]}" "${counters[@]}"
    else
      note "ncu is not installed: no counters"
    fi
    if has jax || [ -n "$dry" ]; then
      bench 200 flow-jax flow --no-compile
      bench 100 operators-jax operators --no-compile --share 0.2
    else
      note "JAX is not installed"
    fi
    if has pytest; then
      stage 300 tests-compile "${pytest[@]}" -k "(cuda or gpu) and (compile or inductor or export)" "${tests[@]}"
    fi
    ;;
esac

if [ ${#failed[@]} -gt 0 ]; then
  note "failed: ${failed[*]} (see $OUT/$call.tar.gz)"
  keep
  exit 1
fi
note "everything passed (see $OUT/$call.tar.gz)"
keep
