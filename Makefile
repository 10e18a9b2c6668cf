# make demo     prune a packaged model by several methods and compare them
# make test     run the tests
# make lint     ruff: rules and formatting
# make types    mypy and pyright
# make package  build sdist and wheel, and test them outside the checkout
# make clean    delete everything that these targets create
#
# The first target that needs it creates .venv. Another interpreter: make PYTHON=python3.12

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Pyright ships its program in its package; without this it asks npm for the newest version.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := test
.NOTPARALLEL:
.PHONY: demo test lint types package clean

demo: $(VENV)/.report
	$(BIN)/layerwise demo

# One process per core, one thread each: tests are many and small.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy
	$(BIN)/pyright

package: $(VENV)/.dev
	$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	$(BIN)/python -m pytest -m package tests/test_packaging.py

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info
	rm -rf .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find layerwise solvers adapters tests -name __pycache__ -prune -exec rm -rf {} +

# One stamp per set of extras, so that a second target adds only what the first lacked.

$(VENV)/.torch:
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 found: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	@touch $@

$(VENV)/.report: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e ".[report]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@
