# Needs Python >= 3.11 and GNU Make >= 4. The checkout's path must have no spaces in it.
#   make PYTHON=/path/to/python3.12 ...   makes .venv with another Python than the `python3` on PATH

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
BIN := .venv/bin
# Named by content, so that a checkout's new timestamps install nothing and another pyproject.toml does.
STAMP := .venv/.installed-$(shell cksum < pyproject.toml | cut -d ' ' -f 1)

# Where it is set, as in many containers, each of hundreds of processes would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install quickstart test nightly check bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## Make .venv and install everything into it (once for each pyproject.toml; 3 to 7 minutes, 8 GB)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: got $$($(PYTHON) --version 2>&1) as $(PYTHON); expected Python >= 3.11; fix: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "make: $(PYTHON) cannot make virtual environments; fix: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (3 to 7 minutes the first time)"
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@rm -f .venv/.installed-*
	@touch $@

quickstart: install ## Train a small model on real photographs, release it, upsample a held-out one (about 10 minutes)
	@$(BIN)/linearsr run pipelines/quickstart.yaml --profile pipelines/profiles/local.yaml
	@$(BIN)/linearsr upscale "$$($(BIN)/python -c 'from importlib.util import find_spec; print(find_spec("skimage").submodule_search_locations[0])')/data/coffee.png" \
	  runs/quickstart/coffee-x4.png --model models:/linearsr-quickstart@champion --storage runs --overwrite
	@echo "Picture:  runs/quickstart/coffee-x4.png"
	@echo "Report:   runs/quickstart/report.html"
	@echo "MLflow:   $(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db"

# One thread a process: workers of one test share the cores, and sums come out in the same order everywhere. Two processes, because tests
# with Ray also wait; who gets which is in tests/conftest.py, and those that take longest come first.
test nightly: export OMP_NUM_THREADS := 1
test nightly: export MKL_NUM_THREADS := 1
test nightly: PYTEST = $(BIN)/python -m pytest -n 2 $(wildcard tests/chaos tests/distributed tests/unit tests/contracts)
test: check ## Everything CI checks: `make check`, then the tests (about an hour on two slow cores)
	@$(PYTEST) -m "not gpu and not nightly"

nightly: check ## The same with further cases of the longest tests
	@$(PYTEST) -m "not gpu"

check: install ## Lint, formatting, types, import directions, Dockerfiles, shell scripts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/hadolint infra/images/Dockerfile infra/images/Dockerfile.mlflow
	@$(BIN)/shellcheck .ci/run infra/images/build.sh

bench: install ## Benchmarks: what platform and guard cost a step, what a checkpoint and a trainer's start cost, the knee detector's error rates, an enlargement's time (a quarter of an hour)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/step_overhead.py
	@OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/guard_overhead.py
	@OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/checkpoint.py
	@OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/trainer_start.py
	@OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/knee/bench.py
	@OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/upscale.py

clean: ## Remove caches and builds; keep .venv and runs
	@rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
