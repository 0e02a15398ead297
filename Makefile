# The one vocabulary: people, hooks and CI only call these targets.
# PYTHON picks the interpreter the environment is made with (none: the first suitable one); PROFILE a file of profiles/
# for `make run`; MODEL what `make app` opens.
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(or $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c '$(SUITABLE)' 2>/dev/null && echo $$p && break; done),python3)
PROFILE ?=
MODEL ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1
export MLFLOW_DISABLE_TELEMETRY := true
export GRADIO_ANALYTICS_ENABLED := False
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help setup run test test-slow test-faults test-browser test-solutions check app ui bench bench-serve lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## make .venv with the pinned closure

$(STAMP): constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c '$(SUITABLE)' 2>/dev/null || \
	  { echo "lladaflow needs Python 3.11 to 3.13; '$(PYTHON)' is not one: call make PYTHON=/path/to/python3.11"; exit 2; }
	@case "$(VENV):$$PWD" in /*) ;; *:*:*) echo "Python makes no environment in a folder with ':' in its name; call make VENV=/a/folder/without"; exit 2;; esac
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages into $(VENV) (about two minutes the first time)"
	@$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[all,dev]' 2>&1 | { grep -v '^WARNING: Location' || true; }
	@# pip compiles nothing, as the first import does; where it may not, every start of a process would do it anew.
	@test -z "$$PYTHONDONTWRITEBYTECODE" || $(BIN)/python -m compileall -qq -j 0 -x '/tests?/|/transformers/models/' $(VENV)/lib || true
	@$(BIN)/python -c 'import torch, llada_core, cli.main' && touch $(STAMP)

run: setup  ## data to a registered model; PROFILE=real-text runs a file of profiles/
	@$(BIN)/llada run $(PROFILE)

# Three at a time for two cores: a third of the tests' time is waiting for programs that they started.
test: setup  ## the default suite (under 10 minutes on 2 cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not faults and not browser and not gpu and not solutions"

test-slow: setup  ## several ranks, whole runs, servers, packages
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "slow and not faults"

test-faults: setup  ## kills, requeues, damaged files, a real Slurm cluster where its packages are installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m faults

test-browser: setup  ## the page in Debian's Chromium
	@$(BIN)/python -m pytest -m browser

test-solutions: setup  ## the reference solutions of MBPP and HumanEval before reward and benchmark (2 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m solutions -rs tests/verifiers/test_solutions.py

check: setup  ## ruff, mypy, import contracts, docs
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest tests/test_documentation.py tests/test_house.py

app: setup  ## open the page on the registered champion; MODEL=FOLDER opens another
	@$(BIN)/python -m app $(if $(MODEL),--model '$(MODEL)')

ui: setup  ## MLflow and Prefect, with what prefect.yaml deploys, on loopback, until Ctrl-C
	@$(BIN)/llada ui

bench: setup  ## side-by-side speed runs that print ratios
	@$(BIN)/python -m benchmarks

bench-serve: setup  ## the default run's model behind llada serve, under 1, 8, 32 and 128 clients (3 minutes)
	@$(BIN)/python -m benchmarks.serving models/grpo

lock:  ## resolve the closure anew into constraints.txt
	@tools=$$(mktemp -d) && $(PYTHON) -m venv $$tools && $$tools/bin/pip install -q '.[all,dev]' \
	  && $$tools/bin/pip freeze --exclude lladaflow | sed -E 's/\+cpu|\+cu[0-9]+//' | grep -E '^[A-Za-z0-9._-]+==' > constraints.txt.new \
	  && mv constraints.txt.new constraints.txt; rm -rf $$tools

clean:  ## remove the environment and caches, never data, models, runs or the registry
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
