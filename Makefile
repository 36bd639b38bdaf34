# Every target needs python3 (3.11 or later) and make, nothing else; `setup` installs the rest into
# .venv, in the releases that constraints.txt pins. Variables: PYTHON=python3.12,
# TORCH="torch==2.13.0 --index-url ...", ARGS="-k recipe", SEED=7, MINUTES=30.
PYTHON ?= python3
# Installed before all else, since its build may come from an index of its own.
PINNED_TORCH := $(shell grep '^torch==' constraints.txt)
TORCH ?= $(PINNED_TORCH)
SEED ?= 7
MINUTES ?= 30
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

export PIP_DISABLE_PIP_VERSION_CHECK := 1
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-contract test-every-class test-families test-oldest test-newest test-torch test-wheel constraints pythons lint docs fuzz conformance conformance-checkpoints conformance-gpu conformance-servers bench bench-accuracy bench-cost-model bench-cpu-target bench-large-mixture bench-large-model bench-load bench-model-cost bench-peers bench-runtime-peers clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-24s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## install panguq and all that it needs into .venv

# The file is made last: a .venv without it was left half made, and is made anew.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("panguq needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	@test -e $@ || rm -rf $(VENV)
	@rm -f $@
	@test -d $(VENV) || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing $(TORCH)"
	@$(RUN) -m pip install -qq $(TORCH)
	@echo "installing panguq and what it needs"
	@$(RUN) -m pip install -qq -c constraints.txt -e '.[demo,test,lint,docs]'
	@touch $@

demo: setup  ## compile a real model and show what it gives
	$(RUN) -m demo.run $(ARGS)

# A process for each core: the tests compute on one thread. The model is fetched before, by one.
test: setup  ## run the tests, but those of a real model, which `make conformance` has
	$(RUN) -m demo.fetch
	$(RUN) -m pytest -n auto --dist loadfile -m 'not real_model' $(ARGS)

test-contract: setup  ## run what panguq promises: load, generate, save, compile for each target
	$(RUN) -m pytest -n auto --dist loadfile tests/contract $(ARGS)

test-families: setup  ## try every model family; ARGS=--update rewrites docs/models.md
	$(RUN) -m tests.families.sweep $(ARGS)

test-every-class: setup  ## try every class of transformers; ARGS='--mapping masked-lm --quick'
	$(RUN) -m tests.families.every_class $(ARGS)

test-oldest: setup  ## the same with the lowest releases that pyproject.toml allows
	$(RUN) -m conformance.versions oldest --torch '$(TORCH)' $(ARGS)

test-newest: setup  ## the same with the newest releases there are; says what breaks
	$(RUN) -m conformance.versions newest --torch '$(TORCH)' $(ARGS)

test-torch:  ## the same with another torch: TORCH=torch==2.14.1 (several GB)
	@$(MAKE) --no-print-directory setup TORCH='$(PINNED_TORCH)'
	$(RUN) -m conformance.versions torch --torch '$(TORCH)' $(ARGS)

test-wheel: setup  ## build the wheel, install it alone outside this folder, and use it
	$(RUN) -m conformance.versions wheel --torch '$(TORCH)'

constraints: setup  ## pin the newest releases within the bounds: writes constraints.txt
	$(RUN) -m conformance.versions constraints --torch '$(TORCH)'

# mypy reads the source as the Python that is named would; tests are not run there.
pythons: setup  ## check that Pythons 3.12 and 3.13 have every pinned release, and the types there
	$(RUN) -m conformance.versions pythons
	$(RUN) -m mypy --python-version 3.12
	$(RUN) -m mypy --python-version 3.13

lint: setup  ## check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: setup  ## build the manual into build/site
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

# A fault ends it with status 1 and the command that repeats it. ARGS="recipes modules --go-on".
fuzz: setup  ## attack panguq with random input: SEED=7 MINUTES=30
	$(RUN) -m fuzz --seed $(SEED) --minutes $(MINUTES) $(ARGS)

conformance: setup  ## check with a real model, and against real parts of the Ascend stack
	$(RUN) -m demo.fetch
	$(RUN) -m pytest -n auto --dist loadfile -m real_model tests
	$(RUN) -m conformance --environment .venv-npu --torch '$(TORCH)'
	$(RUN) -m conformance.triton --environment .venv-triton --torch '$(TORCH)'

conformance-gpu: setup  ## run the Triton kernels on a CUDA GPU, if there is one (5 minutes)
	$(RUN) -m conformance.gpu $(ARGS)

conformance-checkpoints: setup  ## check saved checkpoints with other releases and tools (3 GB)
	$(RUN) -m conformance.compressed_tensors --environment .venv-ct13
	$(RUN) -m conformance.msmodelslim --environment .venv-msmodelslim
	$(RUN) -m conformance.gptqmodel --environment .venv-gptqmodel

conformance-servers: setup  ## have vllm-ascend and vLLM load what panguq saves (3 GB, no NPU)
	$(RUN) -m conformance.servers --update $(ARGS)

bench: setup  ## measure speed on this machine
	$(RUN) -m bench.run $(ARGS)

bench-accuracy: setup  ## measure the quality of every method and scheme; continues where it stopped
	$(RUN) -m bench.accuracy --json .cache/accuracy.json $(ARGS)

bench-load: setup  ## serve a compiled SmolLM2: 500 calls, 8 threads, a fork; nothing may grow
	$(RUN) -m bench.load $(ARGS)

bench-peers: setup  ## compare with other quantizers, each in an environment of its own (5 GB)
	$(RUN) -m bench.peers $(ARGS)

bench-runtime-peers: setup  ## compare speed with llama.cpp (compiled: minutes) and OpenVINO
	$(RUN) -m bench.runtime_peers $(ARGS)

bench-cost-model: setup  ## compare the cost model with published timings
	$(RUN) -m bench.cost_model $(ARGS)

bench-model-cost: setup  ## compare forecasts of whole models with published latencies
	$(RUN) -m bench.model_cost $(ARGS)

bench-large-model: setup  ## compile a model larger than the memory it may use (30 GB of disk)
	$(RUN) -m bench.large_model $(ARGS)

bench-large-mixture: setup  ## the same for four layers of a mixture of experts, killed and resumed (20 GB)
	$(RUN) -m bench.large_mixture $(ARGS)

bench-cpu-target: setup  ## check the CPU target's choices on this machine
	$(RUN) -m bench.cpu_target $(ARGS)

clean:  ## remove .venv and what was built
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
