# Everything runs in an environment of its own, .venv. Another Python: make PYTHON=python3.12 run
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?= --target sketch --mode da --layers 4

.PHONY: run test bench lint clean

# The main job, with its default layers. Other arguments: make run ARGS="--target photo --mode random --layers 1 --p-zero 0.7"
run: $(VENV)/installed
	$(BIN)/python experiments/run.py $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest

# Timings against what people use today; the table goes to the screen, the figures to .benchmarks/.
bench: $(VENV)/installed
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks --benchmark-json=.benchmarks/last.json --benchmark-columns=median
	$(BIN)/python benchmarks/table.py .benchmarks/last.json --save .benchmarks/last.csv

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info fastshape/*.so fastshape/_build_facts.json

# torch first, then fastshape without an isolated build: so the kernels are built with the torch that will run them, and
# torch is fetched once.
$(VENV)/installed: setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.* csrc/include/fastshape/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch torchvision setuptools pybind11 ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[test,fetch]"
	touch $@
