# make train and make test set everything up by themselves, in .venv, and are safe to run again.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test bench build lint sanitize clean

train: build
	$(BIN)/python -m fastrnn train fit --config fastrnn/training/configs/shakespeare.yaml

test: build lint
	$(BIN)/python -m pytest tests

bench: build
	$(BIN)/python -m fastrnn bench

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

# The extension is built against the torch in .venv: isolation would fetch another one.
build: .venv/ready
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt "$$($(PYTHON) -c 'print(1)' >/dev/null && echo setuptools)" wheel ninja pybind11
	touch $@

clean:
	rm -rf .venv build dist *.egg-info fastrnn/*.so
