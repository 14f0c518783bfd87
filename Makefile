PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc python -type f)

.PHONY: demo test lint sanitize

demo: .venv/installed
	$(BIN)/bitkern demo --out runs/demo

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The operator tests on an extension built with address and undefined-behaviour sanitizers.
SANITIZED := build/sanitize/lib
sanitize: .venv/installed
	BITKERN_CUDA=0 BITKERN_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build \
	  --build-base build/sanitize --build-lib $(SANITIZED)
	rm -rf $(SANITIZED)/tests && cp -r tests $(SANITIZED)
	cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  $(CURDIR)/$(BIN)/python -m pytest -p no:cacheprovider tests/ops -k "cpu and not compile"

.venv/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[train,dev]'
	touch $@
