PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc python -type f)

.PHONY: demo test lint

demo: .venv/installed
	$(BIN)/bitkern demo --out runs/demo

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[train,dev]'
	touch $@
