# `make demo` and `make test` are the two commands of this house; each makes its own environment in .venv first.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
# The interpreter that makes the environment; empty: the first of python3.11, 3.12, 3.13, python3 that is new enough.
PYTHON ?=
export PYTHON
BIN := $(VENV)/bin
TRITON ?= .venv-triton
# Extra arguments for pytest or the benchmark, e.g. make test ARGS="tests/client -x"
ARGS ?=
# What `make bench` serves and sends: the demo's, or your own.
MODELS ?= demo/models
IMAGES ?= demo/images/val
# How long each fuzzer of `make fuzz` looks, in seconds.
FUZZ_SECONDS ?= 300
AUDIT ?= .venv-audit
# The other servers' environments, and the repository of the one file that all of them serve.
COMPARE ?= .venv-compare
SAME ?= same

.PHONY: help demo test lint format nightly triton-env bench compare-env compare fuzz audit lock clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.all  ## Train, export and serve on generated pictures, and classify one (Ctrl-C ends it)
	@$(BIN)/python scripts/demo.py

test: lint  ## Lint, type-check and run the tests: what CI runs
	$(BIN)/python -m pytest -m "not slow and not triton" $(ARGS)

lint: $(VENV)/.dev  ## Lint and type-check only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## Format the code and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

nightly: lint triton-env  ## Everything: the slow tests and those with a real Triton, too
	TOPFIVE_TRITON=$(CURDIR)/$(TRITON)/bin/tritonserver $(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.dev  ## Requests per second against what the machine can decode and infer (after make demo; needs wrk)
	$(BIN)/python benchmarks/serve.py $(MODELS) $(IMAGES) $(ARGS)

compare-env:  ## The servers that topfive is compared with, each in an environment of its own
	@scripts/compare_environments.sh $(COMPARE)

compare: $(VENV)/.dev  ## Topfive against them: SAME=repository that all serve, MODELS=topfive's own (after make compare-env)
	$(BIN)/python benchmarks/compare.py $(SAME) $(IMAGES) --own $(MODELS) --environments $(COMPARE) $(ARGS)

fuzz: $(VENV)/.dev  ## Fuzz the decoder, the parsers and a running server, FUZZ_SECONDS=300 each
	TOPFIVE_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest tests/fuzz $(ARGS)

# Strict: what could not be looked up is not thereby free of known vulnerabilities.
audit: $(AUDIT)/.stamp  ## Look the pinned dependencies up in PyPI's advisories (needs the network)
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt $(ARGS)

triton-env: $(TRITON)/.stamp  ## A real Triton server, in an environment of its own

lock:  ## Bring constraints.txt up to date
	@scripts/lock.sh

# Two stamps over one environment: the demo does not wait for the test tools.
$(VENV)/.all: pyproject.toml constraints.txt scripts/environment.sh
	@scripts/environment.sh $(VENV) --editable '.[all]'
	@touch $@

$(TRITON)/.stamp: scripts/triton_environment.sh
	@scripts/triton_environment.sh $(TRITON)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt scripts/environment.sh
	@scripts/environment.sh $(VENV) --editable '.[dev]'
	@touch $@ $(VENV)/.all

$(AUDIT)/.stamp: scripts/environment.sh
	@scripts/environment.sh $(AUDIT) pip-audit
	@touch $@

clean:  ## Remove the environment, caches and the demo's files
	rm -rf $(VENV) $(TRITON) $(AUDIT) $(COMPARE) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist demo
