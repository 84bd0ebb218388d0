# Every command sets itself up in .venv first; a second call installs nothing.
SHELL := /bin/bash
# The first interpreter that runs (a version manager's stand-in may not) and is 3.11 or 3.12.
PYTHON ?= $(shell for python in python3.12 python3.11 python3; do \
	$$python -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$python && break; done)
VENV := .venv
# Set up anew when the lock or the declared packages change.
INSTALLED := $(VENV)/.installed
ARGS ?=
# A file's tests stay in one process, for what they share; the clusters' tests need the cores for themselves. Three
# processes keep two cores busy, since some tests wait. The order of files is that of tests/conftest.py.
UNIT := $(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder tests/architecture tests/unit

.PHONY: pretrain lint check test lock clean

pretrain: $(INSTALLED)  ## train a small Doge on real text; ARGS="--training.max-steps 100" overrides any key
	$(VENV)/bin/python jobs/pretrain.py --recipe tiny $(ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

check: lint  ## in about two minutes: format, lint, types, the directions of imports, the fast unit tests
	$(VENV)/bin/python -m mypy
	$(UNIT) -m "not slow" $(ARGS)

test: lint  ## lint and every test
	$(UNIT) $(ARGS)
	$(VENV)/bin/python -m pytest tests/cluster tests/gpu $(ARGS)

$(INSTALLED): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: name one with make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

lock:  ## pin the whole tree anew (needs uv)
	uv pip compile --upgrade --group dev pyproject.toml --custom-compile-command "make lock" --output-file requirements.lock

clean:
	rm -rf $(VENV)
