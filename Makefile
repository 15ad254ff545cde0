# Each target sets up what it needs: python3 >= 3.11, pip and make are enough.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: demo test test-slow lint bench bench-devinterp tpu-aot

demo: .venv/.installed
	$(BIN)/python -m experiments.quickstart

test: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-slow: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 -m slow

lint: .venv/.installed-test
	$(BIN)/ruff check .

# Quiet machine, please: nothing else should run beside a timing.
bench: .venv/.installed
	$(BIN)/python -m experiments.benchmarks.chain_step
	$(BIN)/python -m experiments.benchmarks.devices
	$(BIN)/python -m experiments.benchmarks.compile_once
	$(BIN)/python -m experiments.benchmarks.memory

# Side by side with devinterp, whose torch lives apart from .venv.
bench-devinterp: .venv/.installed .venv-bench/.installed
	$(BIN)/python -m experiments.benchmarks.compare_devinterp

# The TPU compiler without a TPU, apart from .venv: where libtpu is, JAX looks for a TPU.
tpu-aot: .venv-tpu/.installed
	.venv-tpu/bin/python -m pytest -o addopts= tests/test_benchmarks.py -k tpu
	.venv-tpu/bin/python -m experiments.benchmarks.tpu_aot

.venv-tpu/.installed: pyproject.toml constraints.txt
	test -x .venv-tpu/bin/python || $(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[tpu-aot]' pytest
	touch $@

# The extra `bench` without the package: JAX beside torch could only disturb the measurement.
.venv-bench/.installed: Makefile constraints.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0 devinterp==2.0.1
	touch $@

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.installed-test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@ .venv/.installed
