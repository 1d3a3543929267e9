# One virtual environment, one stamp per set of packages: a second call of any target starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/commissure/native/*.cpp src/commissure/native/*.h)

.PHONY: demo test soak lint bench docs clean

demo: $(VENV)/.demo
	$(BIN)/commissure reproduce --budget quick

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not soak"

soak: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.bench
	OMP_NUM_THREADS=1 $(BIN)/commissure decode bench
	OMP_NUM_THREADS=1 $(BIN)/commissure mesa bench
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/least_squares.py
	OMP_NUM_THREADS=1 $(BIN)/commissure reservoirs bench
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/hmm_oracle.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/reservoirs.py
	$(PIP) install -q --no-deps 'reptrix>=0.1'  # its torchvision breaks transformers beside a CPU build of torch
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/geometry.py

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W -q -b html docs docs/_build/html

clean:
	rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.demo: $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip
	$(PIP) install -q -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev $(VENV)/.bench $(VENV)/.docs: $(VENV)/.%: $(VENV)/.demo
	$(PIP) install -q -c constraints.txt --group $*
	touch $@
