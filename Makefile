# Every target sets up its own virtual environment first, and again after pyproject.toml changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# One file of tests to one worker; each runs on one thread (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist loadfile

.PHONY: demo test test-everywhere check bench docs

demo: $(READY)
	$(BIN)/lustral demo --out demo-out

test: $(READY)
	$(PYTEST)

test-everywhere: $(READY)
	$(BIN)/python tests/everywhere.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(PYTEST)
	@echo "What computes may round otherwise elsewhere: before a change of methods or toys goes in, run make test-everywhere too."

bench: $(READY)
	$(BIN)/python benchmarks/training.py

docs: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "Open site/index.html; it needs no server."

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: lustral needs Python 3.11 or newer, and '$(PYTHON)' is not (`$(PYTHON) --version 2>&1`);" \
	            "name another one: make PYTHON=python3.12"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) \
	  || { echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu install the package python3-venv"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[dev]'
	@touch $@
