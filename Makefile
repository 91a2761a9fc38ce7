# Every target sets up .venv by itself. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test lint bench docs clean
help:
	@echo "make demo   fit a flow to a real table and to a real posterior (under 3 minutes)"
	@echo "make test   the test suite and the doctests"
	@echo "make lint   ruff and mypy"
	@echo "make bench  train steps and sampling beside Pyro, zuko, nflows and FrEIA"
	@echo "make docs   the site, into docs/_build/html"

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[dev]"
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) -e ".[docs]"
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) -e ".[bench]"
	@touch $@

demo: $(VENV)/.dev
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

bench: $(VENV)/.bench
	$(BIN)/python -m tests.benchmarks --out docs/benchmark-results.md

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf build dist docs/_build .pytest_cache .mypy_cache .ruff_cache
