# A fresh clone needs only `make demo` or `make test`. Both set up a virtual environment first; VENV=
# names another folder for it, PYTHON= another interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles modules at their first import and keeps the result; compiling every installed
# module takes 25 s more. Not kept, it would cost 10 s at each start.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast published lint format clean

demo: $(BIN)/.runtime
	$(BIN)/python tools/demo.py

# The linter comes last: an unfinished experiment is tested too.
test: $(BIN)/.dev
	$(BIN)/python -m pytest -n auto --dist worksteal
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

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

$(BIN)/python:
	@$(PYTHON) -c "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))" 2>/dev/null || \
	{ echo "$(PYTHON) must be Python 3.10 or newer with the module venv: on Debian and Ubuntu" \
	"install the package python3-venv, or name another interpreter with PYTHON="; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(BIN)/.runtime: requirements.txt | $(BIN)/python
	@echo "Downloading PyTorch into $(VENV): on Linux pip's build has CUDA, which is gigabytes." \
	"Without a GPU, stop here (Ctrl-C), install the CPU build of the version in requirements.txt" \
	"with the command that pytorch.org gives for pip and CPU, by $(BIN)/python -m pip, and call" \
	"make again."
	$(INSTALL) -r requirements.txt
	touch $@

$(BIN)/.dev: requirements-dev.txt requirements-plot.txt $(BIN)/.runtime
	$(INSTALL) -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
