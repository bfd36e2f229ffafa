PYTHON ?= python
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build test bench lint format demo

build:
	$(PYTHON) setup.py build_ext --inplace

test:
	pytest

bench:
	$(PYTHON) benchmarks/attention.py
	$(PYTHON) benchmarks/module.py

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
