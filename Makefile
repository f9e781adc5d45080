# Everything a contributor runs. Each target sets up what it needs (.venv, the build) and nothing twice.
#
#   make demo        train models on real and drawn images, write a report (ARGS="--data FOLDER" for others)
#   make test        Python tests and C++ kernel tests                     (ARGS="-k leapfrog")
#   make test-all    the slow tests too, and all under sanitizers
#   make test-asan   the operators' Python tests with the extension under AddressSanitizer
#   make test-cuda-emulated   Python tests on a build whose CUDA kernels and glue run on the CPU  (EMULATED_TESTS=tests: all)
#                    (test-cuda-emulated-asan: under AddressSanitizer)
#   make fuzz        one fuzzer, as long as you like                      (ARGS="raw_entries --seconds 600"; all: the lot)
#   make lint        clang-format, clang-tidy, ruff, mypy
#   make format      clang-format and ruff put the sources in shape
#   make bench       every operator at every size, JAX among the rivals    (ARGS=--quick: under 5 minutes)
#   make bench-flow  one thing in depth: flow, models, jacobian, operators, consistency, log_likelihood, ais, regret, ...
#   make zoo         the operators on other people's decoders, PyPI's installed        (ARGS="-k disent")
#   make bench-zoo   and how quick they are on each, an hour               (ARGS=--quick, ARGS="--only mlp,disent-fc")
#   make cuda-check  nvcc compiles the CUDA kernels for every architecture we ship, and their grids are looked at; needs no GPU
#   make cuda-build  the extension against a CUDA build of torch, in its own .venv-cuda (5 GB); needs no GPU
#   make test-pytorch-ood   that build under pytorch-ood's loops, whose torchvision is built for CUDA
#   make docs        guides, API and results as one site, build/docs/index.html    (notebooks: runs those of docs anew)
#   make wheel       dist/*.whl for the torch of .venv                     (with CUDA kernels, for that of .venv-cuda: wheel-cuda)
#   make test-wheel  that wheel in a new environment: every public name, every page (CUDA's: test-wheel-cuda)
#   make test-install  what README and docs/install.md tell to type, with pip and with uv
#   make sdist       dist/*.tar.gz, to build from
#   make clean       removes what was built, not the environments

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
BENCHMARKS := $(addprefix bench-,flow models jacobian consistency likelihoods log_likelihood ais operators regret tracin scale zoo \
  encoders)
.PHONY: demo test zoo test-pytorch-ood test-py test-cpp test-all test-slow test-sanitizers test-asan test-cuda-emulated test-cuda-emulated-asan fuzz lint format bench $(BENCHMARKS) cuda-check cuda-build docs notebooks wheel wheel-cuda sdist test-wheel test-wheel-cuda test-install clean build

PYTHON ?= python3
# With the version spelt out, pip takes a CPU build where one is at hand, and nothing drifts.
TORCH := 2.13.0
TORCH_CUDA := 2.14.1
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
CUDA_PY := .venv-cuda/bin/python
SOURCES := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/kernels/*/*.h csrc/kernels/*/*.cpp)
CUDA_SOURCES := $(wildcard csrc/kernels/cuda/*.cu csrc/kernels/cuda/*.cuh)
TESTS_CPP := $(wildcard tests/cpp/*.cpp tests/cpp/*.h) CMakeLists.txt CMakePresets.json
CPP_FILES := $(filter-out CMake%,$(SOURCES) $(CUDA_SOURCES) $(TESTS_CPP))
# The cmake and ninja of .venv, unless the system has its own in front.
export PATH := $(PATH):$(CURDIR)/$(VENV)/bin

define CHECK_TOOLS
missing=""; \
command -v $(PYTHON) >/dev/null || { echo "Python 3.10 or newer is needed: apt-get install python3"; exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
  { echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); name another: make PYTHON=python3.11"; exit 1; }; \
$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' \
  || missing="$$missing python3-dev"; \
command -v $${CXX:-g++} >/dev/null || missing="$$missing g++"; \
if [ -n "$$missing" ]; then echo "Not on this machine:$$missing. Install with: apt-get install$$missing"; exit 1; fi
endef

# --- environments ---------------------------------------------------------------------------------------------------

# Other pins make a new environment: pip would leave behind what is pinned no more.
$(VENV)/.torch-$(TORCH): constraints.txt
	@$(CHECK_TOOLS)
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt torch==$(TORCH)
	touch $@

$(VENV)/.packages: pyproject.toml $(VENV)/.torch-$(TORCH)
	$(PY) scripts/requirements.py demo test lint docs > $(VENV)/requirements.txt
	$(PY) -m pip install --quiet -c constraints.txt torch==$(TORCH) -r $(VENV)/requirements.txt
	touch $@

$(VENV)/.bench: pyproject.toml $(VENV)/.packages
	$(PY) scripts/requirements.py bench > $(VENV)/requirements-bench.txt
	$(PY) -m pip install --quiet -c constraints.txt torch==$(TORCH) -r $(VENV)/requirements-bench.txt
# kronfluence asks for torchvision and does without; PyPI's is for CUDA, and ends the import of whatever looks for it.
	$(PY) -m pip uninstall --quiet --yes torchvision
	touch $@

# Packages whose decoders are in the zoo. Without what they ask for, which would bring another torch.
$(VENV)/.zoo: tests/zoo-requirements.txt $(VENV)/.packages
	$(PY) -m pip install --quiet --no-deps -r tests/zoo-requirements.txt
	touch $@

# pytorch-ood imports torchvision, whose builds for CUDA fit this torch and not that of .venv.
.venv-cuda/.torch-$(TORCH_CUDA): pyproject.toml constraints.txt
	@$(CHECK_TOOLS)
	$(PYTHON) -m venv --clear .venv-cuda
	$(CUDA_PY) -m pip install --quiet -c constraints.txt torch==$(TORCH_CUDA)
	$(CUDA_PY) scripts/requirements.py pytorch-ood > .venv-cuda/requirements.txt
	$(CUDA_PY) -m pip install --quiet -c constraints.txt torch==$(TORCH_CUDA) -r .venv-cuda/requirements.txt
	touch $@

# --- build ----------------------------------------------------------------------------------------------------------

# --force leaves the decision what to compile to ninja, which knows the headers of each file.
build/.extension: $(SOURCES) $(CUDA_SOURCES) setup.py $(VENV)/.packages
	$(PY) setup.py --quiet build_ext --inplace --force
	@mkdir -p build && touch $@

build: build/.extension

build/cpp/%/.built: $(SOURCES) $(CUDA_SOURCES) $(TESTS_CPP) $(VENV)/.packages
	cmake --preset $*
	cmake --build --preset $*
	touch $@

# --- what people ask for --------------------------------------------------------------------------------------------

demo: build/.extension
	$(PY) -m fastvae demo $(ARGS)

test: test-cpp test-py

# Tests run side by side, so a thread that has nothing to do must not spin. One worker more than there are cores: a third
# of their time they wait, for processes of their own and for files.
test-py test-slow test-asan test-cuda-emulated test-cuda-emulated-asan zoo: export OMP_WAIT_POLICY := PASSIVE
PYTEST_ARGS := -q -n $(shell expr $$(nproc) + 1) --maxprocesses 4 --dist worksteal

test-py: build/.extension
	$(PY) -m pytest $(PYTEST_ARGS) -m "not slow" $(ARGS)

zoo: build/.extension $(VENV)/.zoo
	$(PY) -m pytest $(PYTEST_ARGS) tests/test_zoo.py $(ARGS)

test-cpp: build/cpp/default/.built
	ctest --preset default

test-all: test test-slow test-sanitizers test-asan test-cuda-emulated test-cuda-emulated-asan

test-slow: build/.extension
	$(PY) -m pytest $(PYTEST_ARGS) -m "slow and not heavy" $(ARGS) || [ $$? -eq 5 ]  # 5: no test is marked slow

# The extension under AddressSanitizer, in a folder of its own. CPython's own allocations that live to its end would be
# reported as leaks.
build/asan/.built: $(SOURCES) $(wildcard fastvae/*.py fastvae/*/*.py) setup.py $(VENV)/.packages
	FASTVAE_CUDA=0 FASTVAE_SANITIZE=address $(PY) setup.py --quiet build --build-base build/asan --build-lib build/asan/lib
	touch $@

UNDER_ASAN = LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0
ASAN_TESTS := $(wildcard tests/test_flow_contract.py tests/test_flow_decoders.py tests/test_flow_gradients.py \
  tests/test_flow_options.py tests/test_flow_refusals.py tests/test_leapfrog*.py tests/test_jacobian_l1*.py \
  tests/test_grad_dot.py tests/test_hardening.py)

# pytest and not python -m pytest, which would find the package of this folder first.
test-asan: build/asan/.built
	$(UNDER_ASAN) PYTHONPATH=build/asan/lib \
	  $(VENV)/bin/pytest $(PYTEST_ARGS) -m "not slow" -k "not compile and not inductor" $(ASAN_TESTS) $(ARGS)

EMULATED_SOURCES := $(SOURCES) $(CUDA_SOURCES) $(wildcard fastvae/*.py fastvae/*/*.py fastvae/*/*/*.py tests/cpp/host_*.h tests/cpp/moved_bytes.h tests/cpp/emulated_*) \
  setup.py
build/emulated/.built: $(EMULATED_SOURCES) $(VENV)/.packages
	FASTVAE_EMULATE_CUDA=1 $(PY) setup.py --quiet build --build-base build/emulated --build-lib build/emulated/lib
	touch $@

# Those of the operators, by their names, and of what drives them, which reach every kernel. (A bound of many samples runs
# the kernels of one, for minutes.)
EMULATED_TESTS := $(filter-out tests/test_iwae_bound.py,$(wildcard $(patsubst fastvae/ops/%.py,tests/test_%*.py,$(wildcard fastvae/ops/[a-z]*.py)))) \
  $(wildcard tests/test_flow_*.py tests/test_influence*.py) $(patsubst %,tests/test_%.py,consistency copied_networks densities \
  encoder_zoo fused_log_prob geometry gpu_smoke hardening launches learned_likelihoods likelihood_regret likelihoods model_training \
  models network network_operators noise ood penalties raw_entries replays straight_code weights)

# Without ARGS, which may select a part, every kernel must have been launched. Emulated, a training to the optimum would take
# ten minutes.
test-cuda-emulated: build/emulated/.built
	rm -rf build/emulated/launches
	PYTHONPATH=build/emulated/lib FASTVAE_LAUNCHES=$(CURDIR)/build/emulated/launches \
	  $(VENV)/bin/pytest $(PYTEST_ARGS) -m "not slow" -k "not compile and not inductor and not probabilistic_pca" $(EMULATED_TESTS) $(ARGS)
	$(if $(ARGS),,$(PY) scripts/emulated_launches.py build/emulated/launches)

build/emulated/asan/.built: $(EMULATED_SOURCES) $(VENV)/.packages
	FASTVAE_SANITIZE=address FASTVAE_EMULATE_CUDA=1 $(PY) setup.py --quiet build --build-base build/emulated/asan \
	  --build-lib build/emulated/asan/lib
	touch $@

test-cuda-emulated-asan: build/emulated/asan/.built
	$(UNDER_ASAN) PYTHONPATH=build/emulated/asan/lib \
	  $(VENV)/bin/pytest $(PYTEST_ARGS) -m "not slow" -k "not compile and not inductor" $(filter-out %hardening.py,$(ASAN_TESTS)) \
	  $(patsubst %,tests/test_%.py,copied_networks elbo gaussian_kl likelihood_regret log_px noise replays) $(ARGS)

test-sanitizers: build/cpp/asan/.built build/cpp/tsan/.built
	ctest --preset asan
	ctest --preset tsan

fuzz: build/.extension
	$(PY) tests/fuzz.py $(or $(ARGS),all)

lint: $(VENV)/.packages build/cpp/default/.built
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)
	printf '%s\n' $(wildcard csrc/kernels/cpu/*.cpp) | \
	  xargs -P "$$(getconf _NPROCESSORS_ONLN)" -n 1 $(VENV)/bin/clang-tidy --quiet -p build/cpp/default
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.packages
	$(VENV)/bin/clang-format -i $(CPP_FILES)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: build/.extension $(VENV)/.bench
	$(PY) -m benchmarks.speed suite $(ARGS)

bench-zoo bench-encoders: $(VENV)/.zoo

$(BENCHMARKS): bench-%: build/.extension $(VENV)/.bench
	$(PY) -m benchmarks.speed $* $(ARGS)

# Without nvcc the script says so, and there is nothing to look at.
cuda-check: build/emulated/.built
	scripts/cuda_check.sh
	! command -v nvcc >/dev/null || PYTHONPATH=build/emulated/lib $(PY) scripts/launches.py geometry build/cuda-report.txt
	PYTHONPATH=build/emulated/lib $(PY) scripts/launch_floors.py

cuda-build: .venv-cuda/.torch-$(TORCH_CUDA)
	PYTHON=$(CURDIR)/$(CUDA_PY) scripts/cuda_build.sh

# Links that lead nowhere, names that nothing describes and whatever else Sphinx warns of are errors; nothing is fetched.
docs: build/.extension
	$(PY) -m sphinx --quiet --nitpicky --fail-on-warning --keep-going --fresh-env -c docs -d build/doctrees . build/docs
	@echo "build/docs/index.html"

# Their outputs anew, small enough to be committed.
notebooks: build/.extension
	PYTHONPATH=$(CURDIR) $(PY) scripts/notebooks.py docs/notebooks/*.ipynb

# build/lib.* would bring along modules that are gone; what is compiled is in build/temp.*
wheel: build/.extension
	rm -rf build/lib.* dist/*torch$(basename $(TORCH)).cpu*.whl
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(PY) scripts/check_wheel.py dist/*torch$(basename $(TORCH)).cpu*.whl

test-pytorch-ood: .venv-cuda/.torch-$(TORCH_CUDA)
	PYTHON=$(CURDIR)/$(CUDA_PY) scripts/cuda_build.sh --pytorch-ood

wheel-cuda: .venv-cuda/.torch-$(TORCH_CUDA)
	rm -rf build/lib.* dist/*torch$(basename $(TORCH_CUDA)).cu*.whl
	PYTHON=$(CURDIR)/$(CUDA_PY) scripts/cuda_build.sh --wheel
	$(CUDA_PY) scripts/check_wheel.py dist/*torch$(basename $(TORCH_CUDA)).cu*.whl

# It must hold the CUDA kernels too, whatever the torch at hand.
sdist: $(VENV)/.packages
	rm -f dist/*.tar.gz
	$(PY) -c "from setuptools import build_meta; build_meta.build_sdist('dist')" > /dev/null
	diff <(find csrc -type f | sort) <(tar tzf dist/*.tar.gz | grep -o '/csrc/.*[^/]$$' | cut -c2- | sort)
	ls dist/*.tar.gz

test-wheel: wheel
	PYTHON=$(PYTHON) TORCH=$(TORCH) scripts/test_wheel.sh dist/*torch$(basename $(TORCH)).cpu*.whl

test-wheel-cuda: wheel-cuda
	PYTHON=$(PYTHON) TORCH=$(TORCH_CUDA) scripts/test_wheel.sh dist/*torch$(basename $(TORCH_CUDA)).cu*.whl

test-install:
	PYTHON=$(PYTHON) TORCH=$(TORCH) scripts/test_install.sh

clean:
	rm -rf build dist *.egg-info fastvae/_C*.so fastvae/_build.py
