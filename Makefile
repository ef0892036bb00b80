# make quickstart   install, then run `repa quickstart`
# make test         install, then run the checks and the tests
# make test-slow    install, then run the tests that take minutes
# make docs         build the documentation site in build/site
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --no-compile -c constraints.txt
# pip would compile every file on one core. Python compiles only imported files and, with this setting, keeps the result.
export PYTHONDONTWRITEBYTECODE :=
TEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -q --dist worksteal

.PHONY: quickstart test fast-tests test-slow lint docs clean

quickstart: $(VENV)/installed
	$(BIN)/repa quickstart

# all at once: while a test waits for a subprocess, its core lints
test: $(VENV)/installed-dev
	$(MAKE) -j 3 lint docs fast-tests

fast-tests: $(VENV)/installed-dev
	$(TEST)

test-slow: $(VENV)/installed-dev
	$(TEST) -m slow

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# torch is installed first, so that later steps find it and do not look for another build
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("repa needs Python 3.11 or later: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e ".[quickstart]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) -e ".[dev]"
	touch $@

docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf $(VENV) quickstart
