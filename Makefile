# Every target installs what it needs into a local virtual environment first, once.
.DEFAULT_GOAL := help
.PHONY: help docs demo demo-cluster serve test check bench faults audit conformance compat format clean
MAKEFLAGS += --no-print-directory

PYTHON ?=
VENV ?= .venv
MODEL ?=
ARGS ?=
BENCHMARKS ?= benchmarks/step_overhead.py
STUDY ?=
BIN := $(VENV)/bin
INSTALL := @VENV="$(VENV)" PYTHON="$(PYTHON)" scripts/install

help: ## list the targets
	@echo "make TARGET [PYTHON=python3.12] [VENV=.venv] [ARGS='...']"
	@sed -n 's/^\([a-z-]*\):.*## /  \1	/p' $(MAKEFILE_LIST)

demo: ## vLLM against vLLM with slos-serve, same load, same machine: report in demo-report/
	$(INSTALL) cpu bench
	@$(BIN)/slos-serve demo --out demo-report $(ARGS)

demo-cluster: ## two replicas behind one port, one of them killed under load: what its clients see
	$(INSTALL) cpu bench ray
	@$(BIN)/python benchmarks/cluster.py demo $(ARGS)

serve: ## OpenAI-compatible server on port 8000 (MODEL=... for your own, ARGS for more flags)
	$(INSTALL) cpu bench
	@model="$(MODEL)"; [ -n "$$model" ] || model=$$($(BIN)/python -m slos_serve.bench.model) && \
	    exec $(BIN)/slos-serve serve "$$model" --enforce-eager $(ARGS)

test: ## the whole test suite, real engine, real cluster and real browser included
	$(INSTALL) cpu bench dev ray browser
	@$(BIN)/python -m pytest $(ARGS)

check: ## formatting, lint, types, import rules
	$(INSTALL) dev
	@$(BIN)/ruff format --check --quiet . || { echo "formatting: run make format"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q --no-header tests/test_imports.py

bench: ## the claims: scheduler cost, then vLLM against slos-serve at five rates (hours; STUDY=--quick: a quarter of one)
	$(INSTALL) cpu bench
	@for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python "$$file" $(ARGS) || exit 1; done
	@$(BIN)/python -m slos_serve.bench.study --out bench-report $(STUDY)

faults: ## every kind of trouble on one real server under load: a table of what became of every request (20 minutes)
	$(INSTALL) cpu bench dev
	@$(BIN)/python benchmarks/faults.py $(ARGS)

audit: ## known vulnerabilities of the locked packages (asks PyPI's advisories, ARGS='-s osv' OSV's; what cannot be judged is an error)
	$(INSTALL) dev
	@$(BIN)/python -m pip install -qq --disable-pip-version-check pip-audit
	@for lock in requirements/lock/*.txt; do sed 's/+cpu / /' "$$lock" | \
	    $(BIN)/pip-audit --strict --disable-pip --no-deps --progress-spinner off $(ARGS) -r /dev/stdin || \
	    { echo "audit: $$lock: a package above is vulnerable, or its advisories could not be asked for"; exit 1; }; done

conformance: ## vLLM's own scheduler tests (fetched, never kept here) on vLLM's class and on ours: the same must pass
	$(INSTALL) cpu dev
	@$(BIN)/python scripts/conformance.py $(ARGS)

compat: ## every tested vLLM in an environment of its own (.compat/): tests, vLLM's tests, a request; docs/compatibility.md
	$(INSTALL) dev bench
	@$(BIN)/python scripts/compat.py $(ARGS)

docs: ## the documentation site, in site/: reference pages from the code, every warning an error
	$(INSTALL) docs
	@$(BIN)/python scripts/reference.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: ## rewrite the sources the way check wants them
	$(INSTALL) dev
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .

clean: ## remove the environment and everything generated
	@rm -rf "$(VENV)" build dist site demo-report cluster-report faults-report soak-report .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
