# Everything runs in the environment .venv, which is created here. For another Python: make PYTHON=python3.12 run
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?= --target sketch --mode da --layers 4

.PHONY: run test soak parity test-cpu-only-torch bench profile gpu lint clean

# The main experiment. For other arguments: make run ARGS="--target photo --mode random --layers 1 --p-zero 0.7"
run: $(VENV)/installed
	$(BIN)/python experiments/run.py $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest

# Runs a small suite for ten minutes while processes are killed, disks fill and clocks jump, and compares its records with
# undisturbed ones. A superuser gets a small disk and read-only data too.
soak: $(VENV)/installed
	$(BIN)/python tests/experiments/sweep/soak.py

# Compares every backend with the reference, row by row: native, the CUDA source on the CPU, CUDA and Triton on a GPU. Triton's
# interpreter needs a process of its own.
parity: $(VENV)/installed
	$(BIN)/python -m pytest -v tests/kernels/test_parity.py --deselect tests/kernels/test_parity.py::test_in_the_interpreter
	FASTSHAPE_BACKEND=triton TRITON_INTERPRET=1 $(BIN)/python -m pytest -v tests/kernels/test_parity.py

# Builds and tests fastshape with a torch without CUDA, in a temporary environment.
test-cpu-only-torch: $(VENV)/installed
	$(BIN)/python -m pytest -m fetch tests/package/test_cpu_only_torch.py

# Compares time and memory with common alternatives. Prints the table; writes figures and roofline to .benchmarks/.
bench: $(VENV)/installed
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks --benchmark-json=.benchmarks/last.json --benchmark-columns=median
	$(BIN)/python benchmarks/table.py .benchmarks/last.json --save .benchmarks/last.csv
	$(BIN)/python benchmarks/roofline.py .benchmarks/last.json --save .benchmarks/roofline.png

# Profiles time and memory of a training step, unshaped and shaped in each way. With valgrind installed, python
# benchmarks/instructions.py counts the instructions of one call; that takes minutes and does not depend on other load.
profile: $(VENV)/installed
	$(BIN)/python benchmarks/profile_step.py --save .benchmarks/profile.csv

# On a machine with a GPU: runs its tests, compute-sanitizer and timings in ten minutes, and writes
# benchmarks/results/DEVICE.json. PYTHON must have torch; nothing is downloaded. python benchmarks/gpu.py --help lists options.
gpu:
	$(PYTHON) benchmarks/gpu.py

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	PYTHONPATH=experiments $(BIN)/lint-imports --no-cache --no-logo

clean:
	rm -rf $(VENV) build *.egg-info fastshape/*.so fastshape/_build_facts.json

# Installs torch first, then fastshape without build isolation. So the kernels are built with the torch that runs them, and torch
# is downloaded once.
$(VENV)/installed: setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.* csrc/include/fastshape/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch torchvision setuptools pybind11 ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[test,fetch]"
	touch $@
