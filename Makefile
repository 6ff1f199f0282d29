# Everything a newcomer needs. `make` alone lists the targets; each one installs what it needs into
# $(VENV) first. Override on the command line, for example:  make test PYTHON=python3.12 JOBS=8

PYTHON      ?= python3
VENV        ?= .venv
JOBS        ?= 2
PIP_ARGS    ?=
PYTEST_ARGS ?=
DEMO_ARGS   ?=
BENCH_ARGS  ?=
CUDA_ARGS   ?=
GPU_ARGS    ?=
MUTANTS_ARGS ?=
FUZZ_ARGS   ?=

BIN  := $(VENV)/bin
PY   := $(BIN)/python
PIP  := $(PY) -m pip --disable-pip-version-check

# What the compiled extension and the package's metadata are made from.
SOURCES := pyproject.toml $(wildcard setup.py MANIFEST.in) \
  $(shell find csrc -type f ! -name '*.pyc' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help install demo demo-lm reproduce test mutants peers bench fuzz fuzz-sanitized cuda-check \
  gpu-check lint format clean

help:  ## list the targets
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
	  awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) JOBS=$(JOBS), and PIP_ARGS, PYTEST_ARGS,"
	@echo "DEMO_ARGS, BENCH_ARGS, FUZZ_ARGS, MUTANTS_ARGS, CUDA_ARGS, GPU_ARGS: what to add to a"
	@echo "command (BENCH_ARGS=--quick, DEMO_ARGS='--seeds 0', CUDA_ARGS='--archs 90',"
	@echo "MUTANTS_ARGS='--only kd')."
	@echo "No GPU? PIP_ARGS='--extra-index-url URL', with the URL of PyTorch's CPU wheels (see"
	@echo "pytorch.org, Get Started), avoids gigabytes of CUDA libraries."

install: $(VENV)/.installed  ## create the environment and build the package into it (editable)

demo: $(VENV)/.installed  ## distil on Fashion-MNIST, or digits: table, figure; three minutes, no GPU
	$(PY) examples/distill.py --teachers weak strong --methods ce kd dist iekd@strong \
	  --seeds 0 1 2 --jobs 2 --output runs/demo $(DEMO_ARGS)

demo-lm: $(VENV)/.installed  ## distil a small language model: table, figure; three to five minutes, no GPU, no download
	$(PY) examples/distill_lm.py --threads 2 --output runs/demo-lm $(DEMO_ARGS)

reproduce: $(VENV)/.installed  ## the papers' claims on Fashion-MNIST; examples/results, half an hour
	$(PY) examples/reproduce.py --dataset fashion-mnist --jobs 2 --results examples/results $(DEMO_ARGS)

test: $(VENV)/.installed  ## run the tests
	$(PY) -m pytest -n $(JOBS) --dist worksteal -rfEs --benchmark-disable tests $(PYTEST_ARGS)

mutants: $(VENV)/.installed  ## check that the tests notice small wrong changes; three quarters of an hour
	$(PY) tests/mutants.py --jobs $(JOBS) $(MUTANTS_ARGS)

peers: $(VENV)-peers/.installed  ## run README's "Coming from ..." against the toolkits it names
	$(VENV)-peers/bin/python -m pytest -rfEs tests/test_peers.py tests/test_hf_trainer.py $(PYTEST_ARGS)

bench: $(VENV)/.installed  ## measure the losses against eager and torch.compile; benchmarks/results
	$(PY) -m benchmarks.run $(BENCH_ARGS)

fuzz: $(VENV)/.installed  ## random calls against independent formulas; FUZZ_ARGS='--minutes 60'
	$(PY) tests/fuzz.py --every-capability --minutes 10 $(FUZZ_ARGS)

SANITIZED := build/sanitized/lib
fuzz-sanitized: $(VENV)/.installed  ## likewise on a build with AddressSanitizer and UBSan (slow)
	KDKERNELS_NATIVE=1 KDKERNELS_CUDA=0 KDKERNELS_SANITIZE=address,undefined \
	  $(PY) setup.py build --build-base build/sanitized --build-lib $(SANITIZED)
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONPATH=$(SANITIZED) \
	  $(PY) tests/fuzz.py --every-capability --minutes 10 $(FUZZ_ARGS)

cuda-check: $(VENV)/.torch  ## compile the CUDA kernels and judge the machine code; nvcc, no GPU
	$(PY) tests/gpu/compile.py --jobs $(JOBS) $(CUDA_ARGS)

gpu-check: $(VENV)/.installed  ## the checks that need an NVIDIA GPU
	$(PY) tests/gpu/check.py $(GPU_ARGS)

lint: $(VENV)/.linters  ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.linters  ## apply the style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## delete the environment, builds, caches and runs
	rm -rf "$(VENV)" "$(VENV)-peers" build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf .benchmarks
	find kdkernels \( -name '*.so' -o -name '*.pyd' \) -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a step runs again only when what it depends on has changed.

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "kdkernels needs Python 3.10 or newer, and PYTHON=$(PYTHON) is" \
	    "$$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv "$(VENV)" || { \
	  echo "Could not create $(VENV); on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@

# The build sees the environment's torch (no isolation), so torch and the build tools come first.
$(VENV)/.torch: $(VENV)/.created constraints.txt
	$(PIP) install $(PIP_ARGS) -c constraints.txt setuptools ninja pybind11 torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) install $(PIP_ARGS) -c constraints.txt --no-build-isolation -e '.[test,examples]'
	@$(PY) -m kdkernels.info
	@touch $@

# The toolkits bring a hundred packages: they lie in an environment of their own, above the other.
$(VENV)-peers/.installed: $(VENV)/.installed pyproject.toml constraints.txt
	$(PYTHON) -m venv "$(VENV)-peers"
	@$(PY) -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
	  > "$$($(VENV)-peers/bin/python -c 'import site; print(site.getsitepackages()[0])')/below.pth"
	$(VENV)-peers/bin/python -m pip --disable-pip-version-check install $(PIP_ARGS) \
	  -c constraints.txt 'kdkernels[peers]'
	@touch $@

$(VENV)/.linters: $(VENV)/.installed
	$(PIP) install $(PIP_ARGS) -c constraints.txt ruff mypy pre-commit
	@touch $@
