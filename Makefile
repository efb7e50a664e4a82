# Everyday commands. CONTRIBUTING.md says when to use which.
#
# They use the active virtual environment, or .venv if none is active.
PYTHON ?= python3.11
VENV ?= $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup lint unit test serve bench

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup:  ## editable installation with all development tools
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e '.[cpu,dev]'

lint:  ## ruff and mypy, as CI runs them
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

unit:  ## tests without an engine, under a minute
	$(BIN)/pytest tests/unit

test:  ## the whole suite
	$(BIN)/pytest

# Example: make serve ARGS='llava-hf/llava-1.5-7b-hf --shallow-layer 2'
serve:  ## the gateway with the bundled model, or with MODEL and flags in ARGS
	$(BIN)/himap serve $(or $(ARGS),--enforce-eager)

bench:  ## stock vLLM beside pruning; the bundled model, or MODEL and flags in ARGS
	$(BIN)/python bench.py $(ARGS)
