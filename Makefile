# Two commands do everything on a fresh machine: `make demo` and `make test`. Each creates .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
PARALLEL := -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo test lint bench

demo: .venv/ready
	$(BIN)/engrammar demo

test: .venv/ready lint
	$(BIN)/pytest $(PARALLEL) -m "not slow"
	$(BIN)/pytest $(PARALLEL) -m slow

lint: .venv/ready
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/engrammar bench hash
	$(BIN)/engrammar bench step

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $@
