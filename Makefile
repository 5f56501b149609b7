# Everything runs in an environment of its own, .venv. Another Python: make PYTHON=python3.12 run
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?= --target sketch --mode da --layers 4

.PHONY: run test parity test-cpu-only-torch bench profile gpu lint clean

# The main job, with its default layers. Other arguments: make run ARGS="--target photo --mode random --layers 1 --p-zero 0.7"
run: $(VENV)/installed
	$(BIN)/python experiments/run.py $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest

# Every backend against the reference, row by row: native, the CUDA source on the CPU, CUDA and Triton on a GPU; then Triton
# through its interpreter, which wants a process of its own.
parity: $(VENV)/installed
	$(BIN)/python -m pytest -v tests/test_parity.py --deselect tests/test_parity.py::test_in_the_interpreter
	FASTSHAPE_BACKEND=triton TRITON_INTERPRET=1 $(BIN)/python -m pytest -v tests/test_parity.py

# fastshape built and tested beside a torch that has no CUDA, in an environment that is made for it and thrown away.
test-cpu-only-torch: $(VENV)/installed
	$(BIN)/python -m pytest -m fetch tests/test_cpu_only_torch.py

# Timings and memory against what people use today; the table goes to the screen, figures and roofline to .benchmarks/.
bench: $(VENV)/installed
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks --benchmark-json=.benchmarks/last.json --benchmark-columns=median
	$(BIN)/python benchmarks/table.py .benchmarks/last.json --save .benchmarks/last.csv
	$(BIN)/python benchmarks/roofline.py .benchmarks/last.json --save .benchmarks/roofline.png

# Where the time and the memory of a training step go, unshaped and shaped in each way. With valgrind,
# python benchmarks/instructions.py counts what one call costs, in minutes and whatever else the machine does.
profile: $(VENV)/installed
	$(BIN)/python benchmarks/profile_step.py --save .benchmarks/profile.csv

# On a machine with a GPU: its tests, compute-sanitizer and timings, in ten minutes, to benchmarks/results/DEVICE.json. With
# PYTHON as it is, which has torch: nothing is fetched. python benchmarks/gpu.py --help says what can be chosen.
gpu:
	$(PYTHON) benchmarks/gpu.py

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
