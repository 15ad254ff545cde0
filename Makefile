# Each target sets up what it needs: python3 >= 3.11, pip and make are enough.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: demo test test-slow lint

demo: .venv/.installed
	$(BIN)/python -m experiments.quickstart

test: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadscope

test-slow: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 -m slow

lint: .venv/.installed-test
	$(BIN)/ruff check .

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.installed-test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@ .venv/.installed
