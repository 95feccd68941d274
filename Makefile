# Every verb sets itself up: the first one builds .venv, which takes some minutes, the others find it ready.
#
#     make quickstart   turn the embedded teacher into a linear-attention ViT, then reload the result
#     make test         HF_HUB_OFFLINE=1 .venv/bin/python -m pytest
#     make style        format and fix
#     make check        format, lint and types, without changing a file
#     make clean        remove caches and out/, keep .venv
#
# A machine with a GPU gets the CUDA build of torch. For the small CPU build from pytorch.org:
#
#     make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
#
# Another Python, another release of torch:  make test PYTHON=python3.12 TORCH=torch==2.14.0

PYTHON ?= python3.11
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

# Always `python -m`: the first line of an installed script breaks when the folder moves.
PY := .venv/bin/python
# The packages that exist; mypy refuses a name that does not.
PACKAGES := $(wildcard modeling_adala trainers hub_cards vit_adala benchmarks)

.DEFAULT_GOAL := help
.PHONY: help quickstart test style check clean

help:
	@sed -n 's/^#     //p' Makefile

# The stamp is touched last, so an interrupted set-up starts again.
.venv/.installed: setup.py $(wildcard modeling_adala/*.c modeling_adala/*.h)
	@echo "[setup] creating .venv with $(PYTHON)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "[setup] installing $(TORCH) (the largest download, minutes on a slow line)"
	@$(PY) -m pip install -q --disable-pip-version-check "$(TORCH)" $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)")
	@echo "[setup] installing vit-adala with its development tools"
	@$(PY) -m pip install -q --disable-pip-version-check -e ".[dev]"
	@touch $@
	@echo "[setup] done"

quickstart: .venv/.installed
	HF_HUB_OFFLINE=1 .venv/bin/vit-adala run vit_adala/recipes/quickstart.yaml
	HF_HUB_OFFLINE=1 $(PY) examples/reload.py out/quickstart/3-supervised

test: .venv/.installed
	HF_HUB_OFFLINE=1 $(PY) -m pytest

style: .venv/.installed
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

check: .venv/.installed
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy $(PACKAGES)

clean:
	rm -rf out build dist ./*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
