# make train        set everything up and train on the shipped names     make train ARGS="--steps 2000 --backward steps"
# make test         set everything up and run the tests                  make test ARGS="-k cross_entropy"
# make kernels      compile what has changed of the CPU kernels, in place, and install nothing
# make test-other   run them on the same kernels with another torch       make test-other OTHER=torch==2.10.0
# make test-emulated  run the CUDA kernels on an emulated card, with every access to memory checked
# make test-cuda    run the tests of CUDA, on a card                     make clean test-cuda TORCH=torch
# make sanitize     run some of them under compute-sanitizer             make sanitize
# make memory       measure the peak memory of linear cross-entropy     make memory ARGS="--rows 512 --dtype bfloat16"
# make bench        measure speed and memory beside PyTorch's           make bench ARGS="--only batch_norm --quick"
# make lint         check the code's style
# make docs         collect the docstrings that derive the gradients into docs/derivations.md
# make cuda-report  compile the CUDA kernels and write what they take to docs/cuda.md
# make clean        remove what these made
#
# FUSED_OPS_BUILD=0 before any of them leaves the kernels out: every op runs its PyTorch reference. FUSED_OPS_BUILD=cpu
# leaves out those of CUDA.
# TORCH=... names another torch to install, PYTHON=... another Python to make .venv with.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# The oldest that is supported.
OTHER ?= torch==2.10.0
LINTERS := clang-format==22.1.8 ruff==0.15.21
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check --quiet
# So that torch finds ninja, which compiles side by side, and in place only what has changed.
WITH_NINJA := PATH="$(abspath $(VENV)/bin):$$PATH"

# One stamp for each kind of installation, removed by the others: going from one to another installs anew.
INSTALLED := $(VENV)/installed-$(or $(FUSED_OPS_BUILD:0=references),kernels)
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*)

.PHONY: train test kernels test-other test-emulated test-cuda sanitize card memory bench lint docs cuda-report clean
.DELETE_ON_ERROR:

train: $(INSTALLED)
	$(VENV)/bin/python train.py $(ARGS)

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n auto $(ARGS)

kernels: $(VENV)/torch
	$(WITH_NINJA) FUSED_OPS_BUILD=cpu $(VENV)/bin/python setup.py -q build_ext --inplace

# One library serves every torch from the oldest on: the kernels stay as they were built.
test-other: $(INSTALLED)
	$(PYTHON) -m venv --clear $(VENV)-other
	$(VENV)-other/bin/pip install --quiet "$(OTHER)" "setuptools>=77"
	FUSED_OPS_BUILD=0 $(VENV)-other/bin/pip install --quiet --no-build-isolation --editable ".[test]"
	$(VENV)-other/bin/python -m pytest -n auto $(ARGS)

# Each op beside its reference, above all. Streamed outputs, of several MB, are no different there.
EMULATED := emulation ops made_gradients products mlp functional
test-emulated: $(INSTALLED)
	$(MAKE) --no-print-directory --jobs $(shell nproc) --file tests/emulation/Makefile PYTHON=$(VENV)/bin/python
	$(VENV)/bin/python -m pytest -n auto --kernels build/emulated/kernels.so $(EMULATED:%=tests/test_%.py) \
	  -k "emulation or made_gradients or products or cpu and (undecorated or sgd_steps or bounds) and not streamed" $(ARGS)

test-cuda: card
	$(VENV)/bin/python -m pytest -n auto -k cuda $(ARGS)

# Without PyTorch's cache of memory, so that what lies beside a tensor belongs to none.
sanitize: card
	for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(VENV)/bin/python -m pytest \
	    tests/test_ops.py -k "cuda and undecorated and float32 and not linear" $(ARGS) || exit 1; \
	done

card: $(INSTALLED)
	@$(VENV)/bin/python -c 'import torch; torch.cuda.is_available() or exit(f"torch {torch.__version__} finds no CUDA card")'

memory: $(INSTALLED)
	$(VENV)/bin/python benchmarks/memory.py $(ARGS)

bench: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks $(ARGS)

lint: $(VENV)/linters
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(wildcard csrc/*.h csrc/*/* tests/*.cpp tests/emulation/*.[hc]*)

docs:
	$(PYTHON) docs/make_derivations.py

cuda-report: $(INSTALLED)
	$(VENV)/bin/python docs/cuda_report.py

clean:
	rm -rf $(VENV) $(VENV)-other build *.egg-info fused_ops/*.so

# torch comes first and alone, so that no later step chooses another build of it.
$(VENV)/torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)" "setuptools>=77" ninja
	touch $@

$(INSTALLED): $(VENV)/torch $(SOURCES)
	rm -rf build/emulated fused_ops/*.so $(VENV)/installed-*
	$(WITH_NINJA) $(PIP) install --no-build-isolation --editable ".[test,bench]"
	touch $@

$(VENV)/linters: $(VENV)/torch
	$(PIP) install $(LINTERS)
	touch $@
