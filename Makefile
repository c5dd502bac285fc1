# README's commands. Every target sets up first; the stamp makes that free the second time. VENV may name an environment
# that exists, such as conda's (environment.yml).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.tvmlab-installed
# Two files of tests at a time; what the tests of a file share is made once.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: setup demo test test-slow test-browser test-all lint lab clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tvmlab needs Python 3.11 or newer; '$(PYTHON)' is older. Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/tvmlab demo

test: setup
	$(PYTEST)

test-slow: setup
	$(PYTEST) -m 'slow and not gpu and not browser'

test-browser: setup
	$(BIN)/python -m pytest -m browser

test-all: test lint test-slow test-browser

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/nbstripout --verify notebooks/*.ipynb

lab: setup
	TVMLAB_RUNS="$${TVMLAB_RUNS:-$(CURDIR)/runs}" $(BIN)/jupyter lab notebooks/01_tune_a_model.ipynb

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
