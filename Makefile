# `make demo` and `make test` set everything up by themselves: Python 3.11, 3.12 or 3.13, make and a package index suffice.
FITS := import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c '$(FITS)' 2>/dev/null && { echo $$python; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo demo-train tables test check bench-gpu setup

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(FITS)' || \
		{ echo "hovle needs Python 3.11, 3.12 or 3.13; $(or $(PYTHON),python3) is none: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

setup: $(READY)

# The training, until weights ship that `hovle demo` can show.
demo: demo-train

# Train a small model on this machine in three stages and let it answer questions about unseen pictures.
demo-train: $(READY)
	$(BIN)/hovle fetch
	$(BIN)/hovle demo train

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

# Whole models of the released shapes on a GPU, compiled, beside InternVL2; never run yet.
bench-gpu: $(READY)
	$(BIN)/hovle bench generate --device cuda --dtype bfloat16 --compile --out eval/results/speed/generate_gpu.json
