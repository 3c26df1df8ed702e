# Everything rests on `make install`, which leaves a complete environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
PROTOS := $(shell find protos -name '*.proto')
CPU := services/worker/engine/cpu
NATIVE := services/batcher/built

.PHONY: help install proto kernels native lint test demo bench-peers wire lock clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## everything into .venv, downloads cached in the user's cache folder

# torch first and alone: its CPU and CUDA builds share a version and differ in hash, and pip checks
# hashes for all or for none.
$(VENV)/.locked: requirements.lock
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON): install Python 3.11 or newer, or set PYTHON="; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: set PYTHON="; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@touch $@

gen/.built: $(PROTOS) tools/proto.py tools/tools.lock $(VENV)/.locked
	$(BIN)/python -m tools.proto
	@touch $@

proto: gen/.built  ## generate gen/ from protos/ and the pinned Envoy contracts

# One library for each instruction set; without a C++ compiler there is none, and it is said.
$(CPU)/built/.built: $(wildcard $(CPU)/*.h $(CPU)/*.cpp $(CPU)/build.py) $(VENV)/.locked
	$(BIN)/python -m services.worker.engine.cpu.build
	@mkdir -p $(@D) && touch $@

kernels: $(CPU)/built/.built  ## compile the engine's CPU kernels (a C++ compiler, or CXX=)

# The decisions of the batcher; without a C compiler they run as Python, and it is said.
$(NATIVE)/.built: $(wildcard services/batcher/core/*.py) tools/native.py tokenloom/native.py $(VENV)/.locked
	$(BIN)/python -m tools.native
	@mkdir -p $(@D) && touch $@

native: $(NATIVE)/.built  ## compile the batcher's core as it stands, with mypyc (a C compiler)

$(VENV)/.installed: $(VENV)/.locked gen/.built $(CPU)/built/.built $(NATIVE)/.built pyproject.toml tools/tools.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -m tools.fetch envoy
	$(BIN)/python -m tools.fetch model
	@touch $@

lint: install  ## ruff, mypy, buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint

test: install  ## all tests, the real Envoy and the real model included
	$(BIN)/pytest -q

demo: install  ## start a mesh, ask it a question, draw the trace, stop it
	$(BIN)/python -m tools.demo

bench-peers: install  ## ours and a peer in turn: ARGS="--vllm-venv DIR" or ARGS=--transformers
	$(BIN)/python -m tools.bench_peers $(ARGS)

wire: install  ## show how the protos differ from protos/wire.lock, then take them as agreed
	@$(BIN)/python -m tools.wire | diff protos/wire.lock - || true
	@$(BIN)/python -m tools.wire > protos/wire.lock

lock:  ## resolve requirements.lock anew (needs uv)
	uv pip compile --quiet --universal --python-version 3.11 --extra dev --generate-hashes \
	  --no-emit-package torch --no-emit-index-url --no-emit-find-links --no-header \
	  -o requirements.lock pyproject.toml

clean:  ## remove what make built
	rm -rf $(VENV) gen .tools build $(CPU)/built $(NATIVE) *.egg-info
