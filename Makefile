# make train and make test set everything up by themselves, in .venv, and are safe to run again.
PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(shell find csrc -path csrc/testing -prune -o -type f -print)
CPP := $(shell find csrc -name '*.h' -o -name '*.inc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: train test avx2 bench build cuda docs models lint format sanitize sanitize-cpu sanitize-cuda mutants wheel wheels \
        clean

train: build
	$(BIN)/python -m fastrnn train fit --config shakespeare

# Several processes: most tests use one core, and many wait for a process of their own.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test: lint build cuda docs
	$(PYTEST) tests
	$(MAKE) avx2
	$(MAKE) sanitize
	$(MAKE) mutants

# What a processor with AVX-512 runs otherwise, and so does torch: the core once more on AVX2 kernels.
AVX2 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 FASTRNN_CPU_ISA=avx2
avx2: build
	@if $(BIN)/python -c 'import sys, torch; sys.exit(torch.backends.cpu.get_cpu_capability() != "AVX512")'; \
	then $(AVX2) $(PYTEST) -k "not (peephole or coupled or norm or slstm or indrnn or relu)" $(addprefix tests/test_,modules.py scan.py sequences.py products.py autograd.py prepack.py); \
	else echo "There is no AVX-512: the suite has run on AVX2 or less."; fi

bench: build
	$(BIN)/python -m fastrnn bench

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: .venv/ready
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

sanitize: build
	$(MAKE) -j2 sanitize-cpu sanitize-cuda

sanitize-cpu:
	PYTHON=$(BIN)/python tests/sanitize.sh

sanitize-cuda:
	PYTHON=$(BIN)/python tests/sanitize_cuda.sh

mutants: build
	$(BIN)/python tests/cuda_mutations.py

# Without a GPU too: to see that they compile, and what ptxas says of them. One architecture takes half the time.
cuda: export TORCH_CUDA_ARCH_LIST ?= 9.0
cuda: build
	@if [ -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] || command -v nvcc >/dev/null; then \
	  FASTRNN_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace; \
	else echo "There is no nvcc: the CUDA kernels are not compiled."; fi

# The documentation as a site, build/site/index.html; a warning is an error (not with --quiet).
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Public models, tested and measured; their packages stand in a place of their own, on .venv's torch. BeatNet and
# kokoro come without the front ends that they depend on, and webrtcvad without pkg_resources.
MODELS := build/models
models: build
	$(BIN)/python -m venv $(MODELS)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > $$(echo $(MODELS)/lib/python*/site-packages)/shared.pth
	$(MODELS)/bin/pip install --quiet --constraint constraints.txt --requirement tests/models.txt
	$(MODELS)/bin/pip install --quiet --no-deps BeatNet==1.1.3 kokoro==0.9.4 webrtcvad-wheels
	$(MODELS)/bin/python -m pytest tests/test_models.py
	PYTHONPATH=. $(MODELS)/bin/python tests/models.py

wheel: .venv/ready
	$(BIN)/python -m build --no-isolation

# What a release ships, without CUDA: auditwheel says from which system on the wheel runs (manylinux_2_28 where it is built
# on one) and abi3audit that it keeps to Python's limited API; then it works where there is no compiler.
FRESH := build/fresh
wheels: .venv/ready
	rm -rf dist $(FRESH)
	FASTRNN_CUDA=0 $(BIN)/python -m build --no-isolation
	PATH=$(CURDIR)/$(BIN):$$PATH auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist/checked dist/*.whl
	$(BIN)/abi3audit --strict dist/checked/*.whl
	$(PYTHON) -m venv $(FRESH)
	$(FRESH)/bin/pip install --quiet --constraint constraints.txt dist/checked/*.whl
	cd $(FRESH) && CC=none CXX=none bin/python -m fastrnn doctor

build: fastrnn/_C.abi3.so

fastrnn/_C.abi3.so: .venv/ready setup.py $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# torch comes first: the extension is built against it, and isolation would fetch another one.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastrnn needs Python 3.10: make PYTHON=...")'
	@echo "Setting up .venv: torch, the tools and the extension, some minutes the first time."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools wheel ninja
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info fastrnn/*.so
