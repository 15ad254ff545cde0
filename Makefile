# Each target sets up what it needs: python3 >= 3.11, pip and make are enough.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: demo test test-slow test-kernels lint bench bench-devinterp tpu-aot

demo: .venv/.installed
	$(BIN)/python -m experiments.quickstart

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-slow: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 -m slow

# The suite, or FILES, with the sums and roundings of other processors, one line for each of them:
# make test-kernels KERNELS="zen prescott" FILES="tests/test_vectorize.py tests/test_smoothing.py"
KERNELS := skylakex haswell zen prescott
FILES :=
ONE_THREAD := --xla_cpu_multi_thread_eigen=false
skylakex := OPENBLAS_CORETYPE=SkylakeX OPENBLAS_NUM_THREADS=4 \
	XLA_FLAGS=--xla_cpu_prefer_vector_width=512
haswell := OPENBLAS_CORETYPE=Haswell OPENBLAS_NUM_THREADS=4 ONEDNN_MAX_CPU_ISA=AVX2 \
	NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL AVX512_SPR" XLA_FLAGS=--xla_cpu_max_isa=AVX2
zen := OPENBLAS_CORETYPE=Zen OPENBLAS_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA=AVX \
	XLA_FLAGS="--xla_cpu_max_isa=AVX2 --xla_cpu_prefer_vector_width=128 $(ONE_THREAD)"
prescott := OPENBLAS_CORETYPE=Prescott OPENBLAS_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA=SSE41 \
	NPY_DISABLE_CPU_FEATURES="X86_V3 X86_V4 AVX512_ICL AVX512_SPR" \
	XLA_FLAGS="--xla_cpu_max_isa=SSE4_2 $(ONE_THREAD)"

test-kernels: .venv/.installed-test
	@failed=0; $(foreach kernel,$(KERNELS),\
		lines=$$(env $($(kernel)) $(BIN)/python -m pytest -q -n 2 --dist loadscope \
			--no-loadscope-reorder $(FILES)) || { failed=1; echo "$$lines"; }; \
		echo "$(kernel): $$(echo "$$lines" | tail -n 1)";) exit $$failed

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

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
