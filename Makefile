# The verbs: demo test bench results lint docs. `make install` is done by the others when it is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SWEEPS := $(notdir $(basename $(wildcard benchmarks/sweeps/*.toml)))

.DEFAULT_GOAL := help
.PHONY: help install rabbitmq demo test test-all bench results lint format docs clean

help:  ## show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

install: $(STAMP)  ## the environment in .venv, with the pinned versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Fluffle needs Python 3.11 or newer: set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@# torch first and exact: a range makes pip choose the newest build with gigabytes of GPU libraries
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep -E '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: install  ## real federated training: MNIST, ten participants with very different digits
	$(BIN)/fluffle simulate mnist-2nn --participants 10 --partition dirichlet:0.3 --rounds 20

rabbitmq:  ## a RabbitMQ for the tests, where it is missing and root can install it
	@tests/get_rabbitmq.sh

test: install rabbitmq  ## all quick tests
	$(BIN)/pytest -m "not slow" -n 2 --dist loadgroup

test-all: install rabbitmq  ## the slow ones too
	$(BIN)/pytest -n 2 --dist loadgroup

bench: install rabbitmq  ## what it costs: W1 to W6, beside their references (nothing else should run meanwhile)
	$(BIN)/python -m benchmarks

results: install  ## the sweeps of docs/results.md: what is there is not run again (runs/sweeps)
	mkdir -p benchmarks/results/sweeps
	FLUFFLE_DATA_DIR=runs/data/full $(BIN)/fluffle data fetch mnist
	for sweep in $(SWEEPS); do \
	  case $$sweep in *-full) data=full ;; *) data=shipped ;; esac; \
	  FLUFFLE_DATA_DIR=runs/data/$$data $(BIN)/fluffle sweep benchmarks/sweeps/$$sweep.toml \
	    --json benchmarks/results/sweeps/$$sweep.json --picture docs/results-$$sweep.png || exit 1; \
	done
	$(BIN)/python -m docs.generate

lint: install  ## formatting, lint, strict types, import walls
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install  ## write the generated pages anew and check all of them
	$(BIN)/python -m docs.generate
	$(BIN)/pytest -q tests/docs

clean:  ## remove what the tools left behind (not runs/)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
