# `make train` and `make test` set themselves up: all they need is Python 3.11+ and the package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/cvt.py

.PHONY: train test slow long lint format clean

train: $(VENV)/.run
	$(BIN)/python -m vit_jax.main --config=$(CONFIG) $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 $(ARGS)

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m 'slow and not long' $(ARGS)

long: $(VENV)/.dev
	$(BIN)/python -m pytest -m long --timeout=900 $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'vit_jax needs Python 3.11 or newer, this is ' + sys.version.split()[0])"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
