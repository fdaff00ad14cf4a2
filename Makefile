# A fresh clone needs only `make demo` or `make test`. Both set up a virtual environment first; VENV=
# names another folder for it, PYTHON= another interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles modules at their first import and keeps the result; compiling every installed
# module takes 25 s more. Not kept, it would cost 10 s at each start.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast published lint format bench clean

demo: $(BIN)/.runtime
	$(BIN)/python tools/demo.py

test: lint $(BIN)/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal

test-fast: $(BIN)/.dev
	$(BIN)/python -m pytest -m "not slow and not corpora and not published"

# One batch of every published command at its real size; takes about 8 GB of memory, and minutes.
published: $(BIN)/.dev
	$(BIN)/python -m pytest -m published --durations=0

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(BIN)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BIN)/.runtime
	$(BIN)/python bench/run_all.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(BIN)/.runtime: requirements.txt | $(BIN)/python
	$(INSTALL) -r requirements.txt
	touch $@

$(BIN)/.dev: requirements-dev.txt requirements-plot.txt $(BIN)/.runtime
	$(INSTALL) -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
