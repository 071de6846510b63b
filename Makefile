# make demo   train SwAV on the embedded data, and show what it learned
# make test   lint, and run the tests that are not slow
# make slow   run the slow ones: minutes of training, processes that are killed
# Each makes .venv first. PYTHON chooses the interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The machine's accelerator decides which jax is installed; the rest is the same.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -n 1)
JAX := $(if $(GPU),jax[cuda13],jax)

.PHONY: demo test slow lint install clean

demo: $(VENV)/.installed
	$(BIN)/python -m swav_jax.main --config configs/demo.py --workdir runs/demo

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m 'not slow'

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e . '$(JAX)'
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]' '$(JAX)'
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build *.egg-info
