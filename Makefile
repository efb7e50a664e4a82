# Everyday commands. CONTRIBUTING.md says when to use which.
#
# They use the active virtual environment, or .venv if none is active.
PYTHON ?= python3.11
VENV ?= $(or $(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup lint unit test latest constraints check-images check-vllm serve bench

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup:  ## editable installation with all development tools
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e '.[cpu,dev]' -c constraints.txt

lint:  ## ruff and mypy, as CI runs them
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy /dev/stdin < bench.py  # by its own name it would be the package

unit:  ## tests without an engine, under a minute
	$(BIN)/pytest tests/unit -n 2

test:  ## the whole suite, and what it needs; more options in ARGS
	$(BIN)/python -m tests $(ARGS)

latest:  ## tests without an engine, on the newest versions that the project allows
	rm -rf build/latest && $(PYTHON) -m venv build/latest
	build/latest/bin/pip install --quiet -e '.[cpu,dev]'
	build/latest/bin/pip freeze --exclude-editable | diff constraints.txt - || true  # what is newer
	build/latest/bin/pytest tests/unit

constraints:  ## write constraints.txt anew from the active environment
	header=$$(grep '^#' constraints.txt) && freeze=$$($(BIN)/pip freeze --exclude-editable) \
	    && printf '%s\n' "$$header" "$$freeze" | sed 's/+cpu$$//' > constraints.txt

check-images:  ## the image built and compose run, without Docker; Debian 12, root, 20 minutes
	docker/verify --install

# Example: make check-vllm VERSION=0.33.0
check-vllm:  ## what the project relies on, against the sources of a vLLM release
	$(BIN)/python -m scripts.check_vllm $(VERSION)

# Example: make serve ARGS='llava-hf/llava-1.5-7b-hf --shallow-layer 2'
serve:  ## the gateway with the bundled model, or with MODEL and flags in ARGS
	$(BIN)/himap serve $(or $(ARGS),--enforce-eager)

bench:  ## stock vLLM beside pruning; the bundled model, or MODEL and flags in ARGS
	$(BIN)/python bench.py $(ARGS)
