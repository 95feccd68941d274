# Every verb sets itself up: the first one builds .venv, which takes some minutes, the others find it ready.
#
#     make quickstart   turn the embedded teacher into a linear-attention ViT, then reload the result
#     make test         HF_HUB_OFFLINE=1 .venv/bin/python -m pytest
#     make test-all     the same and what is long
#     make style        format and fix
#     make check        format, lint and types, without changing a file
#     make test-newest  the tests with the newest packages that setup.py allows, in .venv-newest
#     make test-oldest  the tests with the oldest packages that setup.py allows, in .venv-oldest
#     make docs         render docs/ to out/docs, in .venv-tools; a broken link is an error
#     make lock         pin the newest packages in constraints.txt
#     make clean        remove caches and out/, keep .venv
#
# A machine with a GPU gets the CUDA build of torch. For the small CPU build from pytorch.org:
#
#     make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
#
# The Python is the first of python3.11 to python3.14 and python3 that works. Another:  make test PYTHON=/path/to/python

CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3 python
# It has to run: version managers put names on the path that only print an error. Debian's has no ensurepip at first.
PYTHON ?= $(shell for python in $(CANDIDATES); do \
    $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
    && { echo $$python; break; }; done)
TORCH_INDEX ?=
# The release that `make lock` pins: the one that the tests and the figures in docs/speed.md were made with.
TORCH ?= torch==2.13.0
# Arguments of pytest:  make test-oldest TESTS="tests/modeling_adala/test_families.py -k vit"
TESTS ?=

# Always `python -m`: the first line of an installed script breaks when the folder moves.
PY := .venv/bin/python
UV := .venv-tools/bin/python -m uv
# The packages that exist; mypy refuses a name that does not.
PACKAGES := $(wildcard modeling_adala trainers hub_cards vit_adala benchmarks)
LOCK := --quiet --extra dev --no-annotate setup.py

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all test-newest test-oldest style check docs lock clean has-python

help:
	@sed -n 's/^#     //p' Makefile

has-python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later with venv was found (tried $(CANDIDATES)). Install one (on \
	Debian also python3-venv), or name it: make PYTHON=/path/to/python" >&2; exit 1; }

# $(call venv,FOLDER): make a virtual environment there.
define venv
	@test -x $(1)/bin/python || $(MAKE) -s has-python
	@test -x $(1)/bin/python || { echo "[setup] creating $(1) with $(PYTHON)"; $(PYTHON) -m venv $(1); }
endef

# $(call install,FOLDER,OPTIONS): torch first, so that the rest finds the build that was asked for. An index of torch
# need not have what torch depends on; the last step brings it. setup.py is built with the pinned setuptools.
define install
	@echo "[setup] installing torch (the largest download, minutes on a slow line)"
	@$(1)/bin/python -m pip install -q --disable-pip-version-check $(2) torch \
	    $(if $(TORCH_INDEX),--no-deps --index-url "$(TORCH_INDEX)")
	@echo "[setup] installing vit-adala with its development tools"
	@$(1)/bin/python -m pip install -q --disable-pip-version-check $(2) setuptools
	@$(1)/bin/python -m pip install -q --disable-pip-version-check $(2) --no-build-isolation -e ".[dev]"
endef

# The stamp is touched last, so an interrupted set-up starts again.
.venv/.installed: setup.py constraints.txt
	$(call venv,.venv)
	$(call install,.venv,-c constraints.txt)
	@touch $@
	@echo "[setup] done"

.venv-tools/.installed:
	$(call venv,.venv-tools)
	@.venv-tools/bin/python -m pip install -q --disable-pip-version-check uv
	@touch $@

quickstart: .venv/.installed
	HF_HUB_OFFLINE=1 $(PY) -m vit_adala run quickstart
	HF_HUB_OFFLINE=1 $(PY) examples/reload.py out/quickstart/3-supervised

test: .venv/.installed
	HF_HUB_OFFLINE=1 $(PY) -m pytest $(TESTS)

test-all: .venv/.installed
	HF_HUB_OFFLINE=1 $(PY) -m pytest -m "" $(TESTS)

# What counts as newest changes by the day, so these two look every time.
test-newest:
	$(call venv,.venv-newest)
	$(call install,.venv-newest,--upgrade --upgrade-strategy eager)
	HF_HUB_OFFLINE=1 .venv-newest/bin/python -m pytest -m "" $(TESTS)

test-oldest: .venv-tools/.installed
	$(call venv,.venv-oldest)
	@$(UV) pip compile $(LOCK) --resolution lowest-direct --upgrade --python .venv-oldest \
	    -o .venv-oldest/constraints.txt
	$(call install,.venv-oldest,-c .venv-oldest/constraints.txt)
	HF_HUB_OFFLINE=1 .venv-oldest/bin/python -m pytest -m "" $(TESTS)

style: .venv/.installed
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

check: .venv/.installed
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy $(PACKAGES)

docs: .venv-tools/.installed
	@.venv-tools/bin/python -m pip install -q --disable-pip-version-check mkdocs-material
	@.venv-tools/bin/python -m mkdocs build --quiet --site-dir out/docs
	@echo out/docs/index.html

# For every Python from 3.11 on and every platform at once. The CPU builds of torch satisfy the pin, too.
lock: .venv-tools/.installed
	printf '%s\n' "$(TORCH)" setuptools | $(UV) pip compile $(LOCK) - --universal --python-version 3.11 \
	    --upgrade --custom-compile-command "make lock" -o constraints.txt

clean:
	rm -rf out build dist ./*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
