# make train and make test do everything on a fresh machine with Python 3.11 or newer; make help lists the rest.

PYTHON ?= python3
DATA ?= data
WORKDIR ?= runs/default
RUN := .venv/bin/python -m
PYTEST := $(RUN) pytest -n 2 --dist=loadfile --no-loadscope-reorder

.PHONY: help train test test-all bars bench lint clean
.DELETE_ON_ERROR:

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.venv/runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: PYTHON: %d.%d, expected: Python 3.11 or newer, as in make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(RUN) pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	$(RUN) pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.venv/parity: .venv/dev requirements-parity.txt
	$(RUN) pip install --quiet --disable-pip-version-check -r requirements-parity.txt
	@touch $@

train: .venv/runtime  ## the default job: prepare, train, evaluate, sample, report (about 7 minutes on 2 cores)
	$(RUN) gptjax.train --config=configs/default.py --workdir=$(WORKDIR)
	$(RUN) gptjax.evaluate --workdir=$(WORKDIR)
	$(RUN) gptjax.generate --workdir=$(WORKDIR) --prompt='def read_lines(path):'
	$(RUN) tools.report --workdir=$(WORKDIR)

test: .venv/dev  ## every property at its smallest (at most 5 minutes on 2 cores)
	$(PYTEST) -m 'not full' $(CHECKS)

test-all: .venv/parity  ## make test, then all other cases, with types checked and coverage
	$(MAKE) test CHECKS='--typed --cov --cov-report= --cov-fail-under=0'
	$(PYTEST) -m full --typed --cov --cov-append --cov-report=term

bars: .venv/parity  ## every bar at full size; writes docs/bars.md (DATA=FOLDER)
	$(RUN) tests.acceptance --data=$(DATA)

bench: .venv/parity  ## the step beside torch's; writes docs/bench.md
	$(RUN) tools.bench --out=docs/bench.md

lint: .venv/dev  ## style and types
	$(RUN) ruff check .
	$(RUN) mypy

clean:  ## removes the environment and the caches of tests; runs and data stay
	rm -rf .venv .jax_cache .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage*
