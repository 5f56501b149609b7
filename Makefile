# Everything runs in the environment .venv, which is created here. For another Python: make PYTHON=python3.12 run
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?= --target sketch --mode da --layers 4

.PHONY: run test soak parity test-cpu-only-torch test-distribution bench profile gpu docs lint clean

# The main experiment. For other arguments: make run ARGS="--target photo --mode random --layers 1 --p-zero 0.7"
run: $(VENV)/installed
	$(BIN)/python experiments/run.py $(ARGS)

test: $(VENV)/installed-for-tests
	$(BIN)/python -m pytest

# Runs a small suite for ten minutes while processes are killed, disks fill and clocks jump, and compares its records with
# undisturbed ones. A superuser gets a small disk and read-only data too.
soak: $(VENV)/installed-for-tests
	$(BIN)/python tests/experiments/sweep/soak.py

# Compares every backend with the reference, row by row: native, the CUDA source on the CPU, CUDA and Triton on a GPU. Triton's
# interpreter needs a process of its own.
parity: $(VENV)/installed-for-tests
	$(BIN)/python -m pytest -v tests/kernels/test_parity.py --deselect tests/kernels/test_parity.py::test_in_the_interpreter
	FASTSHAPE_BACKEND=triton TRITON_INTERPRET=1 $(BIN)/python -m pytest -v tests/kernels/test_parity.py

# Builds and tests fastshape with a torch without CUDA, in a temporary environment.
test-cpu-only-torch: $(VENV)/installed-for-tests
	$(BIN)/python -m pytest -m fetch tests/package/test_cpu_only_torch.py

# Builds the source distribution and a wheel from it, installs each into a fresh environment and uses it there.
test-distribution: $(VENV)/installed-for-tests
	$(BIN)/python -m pytest -v -s -m fetch tests/package/test_distribution.py

# Compares time and memory with common alternatives. Prints the table; writes figures and roofline to .benchmarks/.
bench: $(VENV)/installed-for-tests
	mkdir -p .benchmarks
	$(BIN)/python -m pytest benchmarks --benchmark-json=.benchmarks/last.json --benchmark-columns=median
	$(BIN)/python benchmarks/table.py .benchmarks/last.json --save .benchmarks/last.csv
	$(BIN)/python benchmarks/roofline.py .benchmarks/last.json --save .benchmarks/roofline.png
	$(BIN)/python benchmarks/clients.py

# Profiles time and memory of a training step, unshaped and shaped in each way. With valgrind installed, python
# benchmarks/instructions.py counts the instructions of one call; that takes minutes and does not depend on other load.
profile: $(VENV)/installed-for-tests
	$(BIN)/python benchmarks/profile_step.py --save .benchmarks/profile.csv

# On a machine with a GPU: runs its tests, compute-sanitizer and timings in nine minutes, and writes
# benchmarks/results/DEVICE.json. PYTHON must have torch; nothing is downloaded. python benchmarks/gpu.py --help lists options.
gpu:
	$(PYTHON) benchmarks/gpu.py

# Writes the documentation of the public names to build/docs. Its warnings are errors. fastshape.attach is the function's page.
docs: $(VENV)/installed-for-tests
	FASTSHAPE_BACKEND=reference $(BIN)/python -W error::UserWarning -m pdoc --docformat google --output-directory build/docs \
		fastshape '!fastshape.attach'

lint: $(VENV)/installed-for-tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	PYTHONPATH=experiments $(BIN)/lint-imports --no-cache --no-logo

clean:
	rm -rf $(VENV) build dist *.egg-info fastshape/*.so fastshape/_build_facts.json

# Installs torch first, then fastshape without build isolation. So the kernels are built with the torch that runs them, and torch
# is downloaded once.
$(VENV)/installed: setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.* csrc/include/fastshape/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch torchvision "setuptools>=77" pybind11 ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[experiments,fetch]"
	touch $@

# What only tests, benchmarks and documentation need. fastshape is there already, so pip fetches no other and builds nothing.
$(VENV)/installed-for-tests: $(VENV)/installed
	$(BIN)/pip install --quiet "fastshape[test]"
	touch $@
