# Each target does the set-up that it needs, once; see CONTRIBUTING.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: help setup demo test test-tables test-targets lint docs bench gpu gpu-wheels gpu-compile sanitize foreign-tests foreign-transformers foreign-peft foreign-vllm clean
.DELETE_ON_ERROR:

help:  ## these lines
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 22

setup: $(VENV)/.package  ## an environment in .venv with peerlm and its tools

demo: setup  ## compare PEER with its baselines on the embedded corpus: table, plots, a sample of text
	$(BIN)/peerlm compare recipes/demo.toml

# Each core begins with files of its own, so that few fixtures of a module are made twice; who is done takes from others.
test: setup  ## every test, on all cores, against the installed package
	$(BIN)/python -m pytest -n auto --dist worksteal --durations 25

# What may know nothing of how a table keeps its rows.
test-tables: setup  ## tests of layers, packs, growth, interpretation and optimizer with tables in two pieces, then in files
	for kind in two-pieces mapped; do \
	    $(BIN)/python -m pytest -n auto --tables $$kind tests/layers tests/optim tests/interpret tests/growth tests/packs \
	        tests/adapters/test_adapter.py tests/train/test_tables.py \
	        $(addprefix tests/convert/test_,$(addsuffix .py,neuron_layer neuron_index peer_pytorch)) || exit 1; \
	done

test-targets: setup  ## the numerical tests once for each SIMD target that this machine runs
	$(BIN)/python tests/targets.py -n auto

lint: setup  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup  ## the documentation as a site, built without a network: site/index.html
	$(BIN)/python docs/build.py

bench: setup  ## the layer and its kernels against other implementations and the limits of memory; a quarter of an hour, 20 GB
	$(PIP) install -c constraints.txt --no-build-isolation ".[bench]"
	$(BIN)/python benchmarks/run.py

# Needs no installation: on a machine with a GPU the source tree, torch, triton and numpy are all there is.
GPU_PYTHON := $(or $(wildcard $(BIN)/python),$(PYTHON))
gpu:  ## one GPU in eight minutes: its limits, our layer beside others, correctness; OUTPUT=file; without a GPU, tiny sizes
	$(GPU_PYTHON) benchmarks/gpu/run.py $(if $(OUTPUT),--output $(OUTPUT))

gpu-wheels:  ## for a machine without a network: PEER-pytorch, below build/gpu of the checkout
	$(GPU_PYTHON) benchmarks/gpu/run.py --prepare

gpu-compile: setup  ## every Triton kernel compiled for four kinds of GPU; with TRITON=3.6.0, by that version
	$(if $(TRITON),test -d build/triton-$(TRITON) || $(PIP) install --no-deps --target build/triton-$(TRITON) triton==$(TRITON))
	PYTHONPATH=$(if $(TRITON),build/triton-$(TRITON):)src $(BIN)/python -m pytest --gpu-targets all \
	    tests/ops/triton/test_ahead_of_time.py

# Python itself is not instrumented: the sanitizer must come first, with the C++ library whose exceptions it follows, and
# memory that Python keeps until it ends is no leak. A package built beside the installed one is imported before it.
SANITIZED := build/sanitize
sanitize: setup  ## the kernels' tests under the address and undefined-behaviour sanitizers
	rm -rf $(SANITIZED)
	$(PIP) install --no-deps --no-build-isolation --target $(SANITIZED)/package \
	    -C cmake.define.PEERLM_SANITIZE=ON -C build-dir=$(SANITIZED)/cmake .
	ls $(SANITIZED)/package/peerlm/ops/cpu/_native*
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=$(SANITIZED)/package \
	    $(BIN)/python -m pytest -p no:cacheprovider -m "not slow" tests/ops/test_cpu_*.py \
	    tests/optim/test_row_kernels.py

foreign-tests: foreign-transformers foreign-peft  ## the tests of transformers and of peft with our models and adapters; downloads both

foreign-transformers: setup  ## transformers' tests of models; with CHECKOUT=folder, its repository at our version, those of generation too
	$(PIP) install -c constraints.txt ".[foreign]"
	$(BIN)/python foreign/run.py transformers $(if $(CHECKOUT),--checkout $(CHECKOUT))

foreign-peft: setup  ## peft's tests of custom and of decoder models
	$(BIN)/python foreign/run.py peft

foreign-vllm:  ## our models in vLLM itself, without a GPU, against generate; needs PyTorch for CPUs, and 4 GB on the disk
	$(PYTHON) foreign/vllm/run.py

clean:  ## remove the environment and all caches; runs and prepared data stay
	rm -rf $(VENV) build dist site docs/index.md .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Dependencies and package have a stamp each, so that an edit below src/ reinstalls the wheel alone.
$(VENV)/.dependencies: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    "peerlm needs Python 3.10 or newer and $(PYTHON) is %d.%d: run make PYTHON=/path/to/python3.10" % sys.version_info[:2])'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt --upgrade setuptools scikit-build-core nanobind cmake ninja
	$(PIP) install -c constraints.txt --no-build-isolation ".[dev]"
	@touch $@

$(VENV)/.package: $(VENV)/.dependencies README.md $(shell find src -not -name '*.pyc' -not -name __pycache__)
	$(PIP) install --no-deps --no-build-isolation --force-reinstall .
	@$(BIN)/python -c 'from peerlm.ops.cpu import native; print("peerlm:", native.description())'
	@touch $@
