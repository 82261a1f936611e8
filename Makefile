# `make demo` and `make test` set everything up by themselves: python3 (3.11), make and a package index suffice.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo tables test check setup

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info[:2] == (3, 11) or sys.exit("hovle is tested on Python 3.11: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

setup: $(READY)

# Train a small model on this machine in three stages and let it answer questions about unseen pictures.
demo: $(READY)
	$(BIN)/hovle fetch
	$(BIN)/hovle demo

# Write the measured figures from eval/results into README, model cards and eval/README.md.
tables: $(READY)
	$(BIN)/python eval/tables.py

# Run every test, and name the slowest.
test: $(READY)
	$(BIN)/hovle fetch
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --durations=20

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python dev/check_models.py
