PYTHON ?= python
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build test test-emulated bench lint format demo

build:
	$(PYTHON) setup.py build_ext --inplace

test:
	pytest

# The CUDA kernels without a GPU, every access checked; ARGS="--race 0,1,2" for races as well.
test-emulated:
	$(PYTHON) tests/emulated.py $(ARGS)

bench:
	$(PYTHON) benchmarks/attention.py
	$(PYTHON) benchmarks/module.py
	$(PYTHON) benchmarks/model.py

lint:
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(CXX_FILES)

format:
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

demo:
	dat-cuda demo
