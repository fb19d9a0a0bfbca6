# `make train` sets up and trains, `make test` sets up and tests. All that is installed lives in .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
PYTEST := $(BIN)/python -m pytest
ARGS ?=

.PHONY: help setup train demo test soak lint constraints clean

help:
	@echo 'make train    set up, then train jobs/quickstart.yaml on this machine; ARGS="--set training.steps=50"'
	@echo 'make demo     the same, shorter: a node is killed midway and another joins; the run goes on'
	@echo 'make test     set up, then run the tests; ARGS="tests/layout -x"'
	@echo 'make setup    a virtual environment in .venv and nothing else; PYTHON=python3.12 chooses the interpreter'
	@echo 'make lint     ruff, mypy, import-linter'
	@echo 'make soak     the long tests, then 2,200 faults: two hours and more'
	@echo 'make clean    delete .venv and caches; runs/ stays'

setup: $(STAMP)

train: $(STAMP)
	@$(BIN)/concertina train jobs/quickstart.yaml $(ARGS)

demo: $(STAMP)
	@$(BIN)/concertina train jobs/quickstart.yaml --set training.steps=160 --chaos 'kill node=1 step=30' --chaos 'join step=60' $(ARGS)

test: $(STAMP)
	@$(PYTEST) -m "not soak" $(ARGS)

soak: $(STAMP)
	@$(PYTEST) -m soak $(ARGS)
	@$(BIN)/python -m benchmarks.faults --allow-dirty -o $(VENV)/faults.json

lint: $(STAMP)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# pip's own output is long and its silence longer: show the large downloads, keep all of it in a log, and show
# the log's end when it fails. $(1) names the log, $(2) is what to install.
SHOW := s,^ *(Downloading|Using cached) ([^ ]*/)?([^ /-]+)-([^ /-]+)-[^ ]*\.whl.* \(([0-9.]+ [MG]B)\)$$,      \3 \4  \5,p; \
        s,^Installing collected.*,      unpacking,p
define install
	log=$(VENV)/install-$(1).log; : >$$log; \
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt $(2) >>$$log 2>&1 & pip=$$!; \
	trap "kill $$pip 2>/dev/null || true" INT TERM; \
	tail -n +1 -f --pid=$$pip $$log 2>/dev/null | sed -un -E '$(SHOW)' || true; \
	wait $$pip || { tail -n 15 $$log; echo "make: installing failed; all that pip said is in $$log"; exit 1; }
endef

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here: install Python 3.11 or newer, or name one: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else f"make: $(PYTHON) is Python {v}, Concertina needs 3.11 or newer: install one, or name one: make setup PYTHON=python3.12")'
	@echo "[1/3] virtual environment in $(VENV), $$($(PYTHON) --version 2>&1)"
	@$(PYTHON) -m venv $(VENV) || { echo "make: no virtual environment: on Debian and Ubuntu, apt install python3-venv; then make setup again"; exit 1; }
	@echo "[2/3] PyTorch, the largest part"
	@$(call install,torch,torch)
	@echo "[3/3] Ray, MLflow, Concertina itself and its tools"
	@$(call install,all,-e '.[dev]')
	@touch $(STAMP)
	@echo "set up: everything is in $(VENV)"

constraints: $(STAMP)
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+[^ ]*$$//'; } >$(VENV)/constraints.txt
	@mv $(VENV)/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
