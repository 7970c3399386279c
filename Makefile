# `make demo` and `make test` each do all their own set-up in $(VENV); a second run reuses it, and a change of
# pyproject.toml or constraints.txt brings it up to date. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# TensorRT for RTX is published for x86-64 only; elsewhere the demo and the tests go without it.
comma := ,
RTX := $(if $(filter x86_64,$(shell uname -m)),tensorrt-rtx)
RUN_EXTRAS := cpu,report$(addprefix $(comma),$(RTX))
TEST_EXTRAS := $(RUN_EXTRAS),video,huge,dev
TENSORRT_BINDINGS := 10.16.1.11 11.4.0.106

# Two test processes with one thread each use two cores better than one process with two.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
PYTEST_ARGS ?=
CONSUMERS := packages vapoursynth chainner triton
CONSUMER_PYTHON_packages ?= $(PYTHON)
CONSUMER_PYTHON_vapoursynth ?= python3.12
CONSUMER_PYTHON_chainner ?= python3.11
CONSUMER_PYTHON_triton ?= $(PYTHON)
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types test-consumers test-serving fuzz bench test-scale test-gpu bench-gpu gpu-breakages clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1@\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F@ '{printf "%-18s %s\n", $$1, $$2}'

demo: $(VENV)/run.stamp  ## deploy and run the two example networks; writes demo-output/
	$(BIN)/srdeploy demo --force -o demo-output $(DEMO_ARGS)

test: $(VENV)/test.stamp types  ## run the tests (PYTEST_ARGS="-k name" narrows them)
	$(PYTEST) $(PYTEST_ARGS)

check: lint test  ## everything a commit must pass: lint, format, types, imports, tests

lint: $(VENV)/test.stamp types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

types:  ## links that give the root folders their import names, for type checkers
	@mkdir -p build/types/srdeploy
	@for folder in core models export calibration runtime upscale cli; do \
	  ln -sfn ../../../$$folder build/types/srdeploy/$$folder; done

test-consumers: $(VENV)/test.stamp $(CONSUMERS:%=build/consumers/%.stamp) examples/web/node_modules  ## bundles and graphs in other programs, installed under build/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ncnn]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/consumers tests/runtime/engines/test_ncnn.py $(PYTEST_ARGS)

test-serving: $(VENV)/test.stamp build/consumers/triton.stamp  ## a packaged bundle on a real Triton server, installed under build/
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/consumers/test_triton.py $(PYTEST_ARGS)

fuzz: $(VENV)/test.stamp  ## mutate checkpoints for some minutes: only success or a documented error may come back
	$(BIN)/python tests/fuzz/fuzz_checkpoints.py

bench: $(VENV)/test.stamp  ## measurements that need no data (minutes; want a quiet machine); benchmarks/ holds the others
	$(BIN)/python benchmarks/paper_claims.py --engine openvino -o build/bench
	$(BIN)/srdeploy export examples/srdensenet_x4_demo.pth --force -o build/bench.onnx
	$(BIN)/python benchmarks/bench_agreement.py build/bench.onnx --shape 1x1x96x96 -o build/bench

test-scale: $(VENV)/test.stamp types  ## install the extra `ray` and run the tests on a small Ray cluster (two minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/upscale/scale $(PYTEST_ARGS)

# On a GPU machine: an environment with `pip install -c constraints.txt -e '.[gpu,dev]'`, which these two do not change.
test-gpu:  ## run the GPU tests on the NVIDIA GPU of this machine; an engine family that is missing is an error
	SRDEPLOY_TEST_GPU=real $(BIN)/python -m pytest tests/gpu $(PYTEST_ARGS)

bench-gpu:  ## measure engines and baselines on the NVIDIA GPU of this machine; writes benchmarks/results/
	$(BIN)/python benchmarks/gpu.py $(BENCH_ARGS)

gpu-breakages: $(VENV)/test.stamp  ## break the GPU runner on purpose, in memory: its tests must notice (part of make test)
	$(PYTEST) -v tests/gpu/test_gpu_breakages.py

clean:  ## remove the environment and everything made by these targets
	rm -rf $(VENV) build dist *.egg-info demo-output test-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# Other programs have environments of their own, so that none of their requirements meets ours.
examples/web/node_modules: examples/web/package.json
	cd examples/web && npm install --no-audit --no-fund --no-package-lock --loglevel error || \
	  echo "no npm: the tests of the browser will be skipped" >&2

build/consumers/%.stamp: tests/consumers/environments/%.txt constraints.txt
	@mkdir -p build/consumers
	@if $(CONSUMER_PYTHON_$*) --version >/dev/null 2>&1; then \
	  $(CONSUMER_PYTHON_$*) -m venv build/consumers/$* && \
	  build/consumers/$*/bin/python -m pip install --quiet --disable-pip-version-check -r $< && touch $@; \
	else echo "no $(CONSUMER_PYTHON_$*): the tests with $* will be skipped" >&2; fi

$(VENV)/run.stamp: pyproject.toml constraints.txt
	$(call install,$(RUN_EXTRAS))
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt
	$(call install,$(TEST_EXTRAS))
	$(if $(RTX),$(foreach version,$(TENSORRT_BINDINGS),$(call bindings,$(version))))
	@touch $(VENV)/run.stamp $@

# The names of TensorRT's API that the code uses are checked against the real bindings of both generations; they are small,
# published for CPython 3.11 on x86-64 as used here, and never imported by srdeploy itself. Without them that one test skips.
define bindings
@test -d build/tensorrt-bindings/$(1) || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --target build/tensorrt-bindings/$(1) tensorrt_cu13_bindings==$(1) || \
	  echo "no TensorRT $(1) bindings for this Python: its API check will be skipped" >&2

endef

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) --version) found; Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(1)]'
endef
