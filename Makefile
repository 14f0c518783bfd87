PYTHON ?= python3
BIN := .venv/bin
# A process for each core, whose threads do not spin while they wait for one.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc python -type f)

# Modules are compiled when they are first imported, and kept: most of what is installed never is.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all sweeps lint sanitize wheel docs

demo: .venv/installed
	$(BIN)/bitkern demo --out runs/demo

test: .venv/installed build/triton-3.6.0
	$(PYTEST) -m "not sweep"

# The rest as well: what takes minutes, the benchmarks on tiny shapes among it.
test-all: test sweeps

SWEEPS := tests
sweeps: .venv/installed build/triton-3.6.0
	$(PYTEST) --dist worksteal -m sweep $(SWEEPS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

# The operator tests on an extension built with address and undefined-behaviour sanitizers, then the
# CPU kernels alone under the thread sanitizer.
SANITIZED := build/sanitize/lib
SANITIZERS := address,undefined
UNDER_SANITIZERS = ASAN_OPTIONS=detect_leaks=0 \
  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
  $(CURDIR)/$(BIN)/python -m pytest -p no:cacheprovider
RACES := $(CXX) -std=c++20 -O1 -g -fsanitize=thread -Icsrc/include
sanitize: .venv/installed
	BITKERN_CUDA=0 BITKERN_SANITIZE=$(SANITIZERS) $(BIN)/python setup.py --quiet build \
	  --build-base build/sanitize --build-lib $(SANITIZED)
	rm -rf $(SANITIZED)/tests && cp -r tests $(SANITIZED)
	cd $(SANITIZED) && $(UNDER_SANITIZERS) tests/ops tests/backends/test_cpu.py \
	  -k "cpu and not compile"
	for kernel in group_norm_act weight_standardize; do \
	  $(RACES) -fopenmp -DBITKERN_ISA=baseline -c csrc/cpu/$$kernel.cpp -o build/$$kernel.o || exit; \
	done
	$(RACES) tests/backends/races.cpp build/group_norm_act.o build/weight_standardize.o -o build/races
	build/races

# The wheel for this machine and Python, as the others are built by cibuildwheel. libgomp is PyTorch's,
# so that a process has one pool of threads.
wheel: .venv/installed
	rm -rf build/wheel
	BITKERN_CUDA=0 BITKERN_REQUIRE_EXTENSION=1 $(BIN)/python -m build --wheel --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 -w dist build/wheel/*.whl

docs: .venv/installed
	$(BIN)/mkdocs build --strict

# The Triton of PyTorch 2.11, beside the installed one: the kernels are compiled by both.
build/triton-3.6.0: | .venv/installed
	mkdir -p build
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part triton==3.6.0
	mv $@.part $@

.venv/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile -e '.[train,dev,docs]'
	touch $@
