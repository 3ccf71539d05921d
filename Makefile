# PYTHON (used when the virtual environment is made), TORCH and VENV choose its interpreter, its torch and its folder;
# KDFAST_CUDA, TORCH_CUDA_ARCH_LIST and MAX_JOBS go to setup.py. `make help` lists the targets.
PYTHON ?= $(or $(shell command -v python3.11 2>/dev/null),python3)
TORCH ?= torch==2.14.1
VENV ?= .venv
ifneq ($(words $(VENV)),1)
$(error VENV must be a folder without spaces in its name; got '$(VENV)')
endif

# ninja and the other tools are found there
export PATH := $(abspath $(VENV))/bin:$(PATH)
python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check --quiet
# Folders are named too, so that a file taken away counts as a change.
built_from := setup.py pyproject.toml $(shell find csrc)

.PHONY: help test fuzz demo bench accuracy readme-figures lint ctest sanitize audit clean FORCE
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.NOTPARALLEL:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

test: $(VENV)/with-test ## run the tests (PYTEST_ARGS="-k mse -x")
	$(python) -m pytest $(PYTEST_ARGS)

fuzz: $(VENV)/with-test ## 10,000 random calls, right and wrong, in child processes (FUZZ_ARGS="--seed 1 --count 1000")
	$(python) -m tests.fuzz $(FUZZ_ARGS)

demo: $(VENV)/with-demo ## distil students on handwritten digits: tables and plots in runs/demo
	$(python) -m examples.kl_vs_mse sweep limits --quick --out runs/demo $(DEMO_ARGS)

bench: $(VENV)/with-bench ## time, bandwidth, memory and error beside everything else that is installed (BENCH_ARGS="--quick")
	$(python) -m benchmarks.run $(BENCH_ARGS)

accuracy: $(VENV)/with-bench ## the errors of every loss on the whole grid of logits, widths and temperatures
	$(python) -m benchmarks.accuracy

readme-figures: $(VENV)/with-bench ## redraw the README's plots, and print its tables, from benchmarks/results
	$(python) -m benchmarks.figures benchmarks/results --markdown

lint: $(VENV)/with-dev ## check style and types
	ruff check
	ruff format --check
	clang-format --dry-run -Werror $$(find csrc tests -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	mypy

ctest: $(VENV)/with-dev ## test the kernels without torch (CMake)
	cmake -S . -B build/cmake
	cmake --build build/cmake --parallel $(or $(MAX_JOBS),2)
	ctest --test-dir build/cmake --output-on-failure

sanitize: $(VENV)/with-dev ## the same under the address and undefined-behaviour sanitizers
	cmake -S . -B build/sanitize -DKDFAST_SANITIZE=address,undefined
	cmake --build build/sanitize --parallel $(or $(MAX_JOBS),2)
	ctest --test-dir build/sanitize --output-on-failure

audit: $(VENV)/with-dev ## check that the extension uses torch's stable ABI alone
	torch-abi-audit kdfast --check torch

clean: ## remove all that make, pip and the tools made, the virtual environment included (not runs and kdfast-bench: results)
	rm -rf $(VENV) build dist *.egg-info kdfast/_C.*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# One stamp for each extra, older than any changed source or setting: no command runs stale kernels.
$(VENV)/with-%: $(VENV)/torch $(VENV)/settings $(built_from)
	$(pip) install --no-build-isolation --editable '.[$*]'
	@touch $@

$(VENV)/torch: $(VENV)/settings
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(pip) install '$(TORCH)' 'setuptools>=77.0.3' ninja
	@touch $@

# Written only when a setting changes.
settings := $(TORCH) KDFAST_CUDA=$(KDFAST_CUDA) TORCH_CUDA_ARCH_LIST=$(TORCH_CUDA_ARCH_LIST)
$(VENV)/settings: FORCE
	@mkdir -p $(VENV)
	@echo '$(settings)' | cmp -s - $@ || echo '$(settings)' > $@
