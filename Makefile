# Two commands for a machine that has only Python (3.11 or later), pip and make:
#   make demo   exports the sample model, compares it with PyTorch, asks it about a picture, prints the answer and the
#               time of each stage
#   make test   linter, type checker, tests
# Two more:
#   make published       graphs of 30B-A3B and 235B-A22B, without their weights: could TensorRT engines be built? CI runs it too
#   make test-tensorrt   downloads NVIDIA's Python bindings and holds the stand-in for TensorRT against them; with
#                        TENSORRT_INCLUDE_DIR=<folder of NvInferRuntime.h> also the plugins' adapters against those
#                        headers and TensorRT 8.6's library
# All create .venv and install what they need; a second call starts at once.

PYTHON ?= python3
# The tracing was written against this version. PIP_TORCH picks another source for it, for example
#   make demo PIP_TORCH="--index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
PIP_TORCH ?=
PYTEST_ARGS ?= -n 2 --dist loadfile
# The adapters for TensorRT 8.6 are tested in the registry of its library, which is in a wheel of 819 MB.
TENSORRT_INCLUDE_DIR ?=
TENSORRT_LIBRARY_DIR ?= $(VENV)/tensorrt-8.6.0

# One of the questions of models/sample/pictures/questions.json
PICTURE := models/sample/pictures/count.png
QUESTION := How many squares are there?

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint typecheck pytest published test-tensorrt clean

demo: $(VENV)/export-installed
	rm -rf demo
	$(BIN)/deepstitch export models/sample/checkpoint --target ort-cpu -o demo
	$(BIN)/deepstitch run demo --image $(PICTURE) --prompt "$(QUESTION)"

test: lint typecheck pytest

lint: $(VENV)/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# On what a user gets, not on the working tree: see "Layout" in the README. build/ would bring deleted modules back.
typecheck: $(VENV)/dev-installed
	rm -rf build $(VENV)/wheel
	$(PIP) install --quiet --no-deps --no-build-isolation --target $(VENV)/wheel .
	rm -rf build
	MYPYPATH=$(VENV)/wheel $(BIN)/mypy -p deepstitch

pytest: $(VENV)/dev-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

published: $(VENV)/dev-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m published -n 2 --dist loadfile

test-tensorrt: $(VENV)/dev-installed $(VENV)/tensorrt-bindings \
		$(if $(TENSORRT_INCLUDE_DIR),$(TENSORRT_LIBRARY_DIR)/libnvinfer.so.8)
	TENSORRT_INCLUDE_DIR="$(TENSORRT_INCLUDE_DIR)" TENSORRT_LIBRARY_DIR="$(TENSORRT_LIBRARY_DIR)" \
		TENSORRT_BINDINGS_WHEELS="$(VENV)/tensorrt-bindings" \
		$(BIN)/python -m pytest -rs tests/plugins/test_tensorrt.py tests/export/tensorrt/test_fake_tensorrt.py

# The Python side alone, a megabyte each; there is not one of every version for every Python.
$(VENV)/tensorrt-bindings: | $(VENV)/dev-installed
	mkdir -p $@
	for each in tensorrt_bindings==8.6.1 tensorrt_cu12_bindings==10.0.1 tensorrt_cu12_bindings==10.13.3.9 \
		tensorrt_cu12_bindings==11.1.0.106; do \
		$(PIP) download --quiet --no-deps --only-binary=:all: --dest $@ $$each || true; done

# The wheel is for Python 3.10; only the library is taken out of it.
$(VENV)/tensorrt-8.6.0/libnvinfer.so.8: | $(VENV)/dev-installed
	$(PIP) download --no-deps --only-binary=:all: --python-version 310 --platform manylinux_2_17_x86_64 \
		--implementation cp --abi cp310 --dest $(VENV)/tensorrt-wheel tensorrt==8.6.0
	$(BIN)/python -m zipfile -e $(VENV)/tensorrt-wheel/*.whl $(VENV)/tensorrt-wheel
	mkdir -p $(@D)
	mv $(VENV)/tensorrt-wheel/tensorrt/libnvinfer.so.8 $@
	rm -rf $(VENV)/tensorrt-wheel

$(VENV)/torch-installed:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(PIP_TORCH) "$(TORCH)"
	touch $@

$(VENV)/export-installed: $(VENV)/torch-installed pyproject.toml
	$(PIP) install -e '.[export]'
	touch $@

$(VENV)/dev-installed: $(VENV)/export-installed pyproject.toml
	$(PIP) install -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build
