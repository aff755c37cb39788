# Two commands matter: `make run` (train the tiny model, see what it answers) and `make test`.
# Each sets up .venv by itself; the set-up is repeated only when a dependency file changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
# With local wheels (PIP_FIND_LINKS), PyTorch comes from there; else uv picks the build that fits
# this machine: CUDA where the driver is found, the CPU build where it is not.
TORCH_SOURCE := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend auto)
# Bytecode is compiled here: where PYTHONDONTWRITEBYTECODE is set, as in many containers, each process
# would compile all that it imports again, which takes seconds.
INSTALL = VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode $(TORCH_SOURCE) -c constraints.txt
COMPILE = $(BIN)/python -m compileall -q src

.PHONY: help run test test-fast test-long bench-cpu gpu-check gpu-check-inference gpu-tune check format docs docs-serve clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/uv:
	@echo "Setting up $(VENV) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.9

$(VENV)/.train: pyproject.toml constraints.txt | $(BIN)/uv
	@$(INSTALL) -e '.[train,serve]'
	@$(COMPILE)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/uv
	@$(INSTALL) -e '.[dev]'
	@$(COMPILE)
	@touch $@ $(VENV)/.train

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/uv
	@$(INSTALL) -e '.[train,serve,docs]'
	@$(COMPILE)
	@touch $@

# Each stage continues what an interruption left, and shows what it made where it is finished.
STAGE ?= rl
run: $(VENV)/.train  ## pretrain, fine-tune and reward the tiny model (about 19 minutes on 2 cores); STAGE=pretrain or sft stops there
	@case '$(STAGE)' in pretrain|sft|rl) ;; *) echo 'STAGE is "$(STAGE)"; it must be pretrain, sft or rl'; exit 2;; esac
	@$(BIN)/nemotron3 pretrain tiny
	@[ '$(STAGE)' = pretrain ] || $(BIN)/nemotron3 sft tiny-sft
	@[ '$(STAGE)' != rl ] || $(BIN)/nemotron3 rl tiny-rl

test: $(VENV)/.dev  ## every test but the long contracts
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not long'

test-fast: $(VENV)/.dev  ## the tests without those marked slow or long
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not long'

test-long: $(VENV)/.dev  ## the contracts over thousands of steps
	@$(BIN)/python -m pytest -m long --timeout=1200

bench-cpu: $(VENV)/.dev  ## measure speed on this machine, beside transformers, into docs/speed.md
	@$(BIN)/python -m benchmarks.cpu
	@$(BIN)/python -m benchmarks.profile_layers
	@$(BIN)/python -m benchmarks.products
	@$(BIN)/python -m benchmarks.scaling
	@$(BIN)/python -m benchmarks.page

# On a GPU machine there may be no network to set up .venv with. So these two install nothing: they
# take .venv where it is, else the machine's own Python, PyTorch and Triton, and the sources from
# here. OUT, where it is set, is the folder for the results; COMMIT is for copies without git.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
ON_GPU = PYTHONPATH=src$(if $(PYTHONPATH),:$(PYTHONPATH)) $(GPU_PYTHON) -m benchmarks.gpu \
	$(if $(OUT),--out $(OUT)) $(if $(COMMIT),--commit $(COMMIT))
NEEDED = import torch, triton, numpy, safetensors, tokenizers, jaxtyping

gpu-check gpu-check-inference gpu-tune: gpu-python
.PHONY: gpu-python
gpu-python:
	@$(GPU_PYTHON) -c '$(NEEDED)' || { echo '$(GPU_PYTHON) lacks a package; name another: make gpu-check GPU_PYTHON=PATH'; exit 2; }

gpu-check:  ## check and time every kernel, layer and peer on a GPU (under 10 minutes; OUT=FOLDER)
	@$(ON_GPU)

gpu-check-inference:  ## whole models that answer, on a GPU of 80 GB or more (under 10 minutes; ONLY=SECTION; OUT=FOLDER)
	@$(ON_GPU) --inference $(if $(ONLY),--only $(ONLY))

gpu-tune:  ## search launch settings of the kernels on a GPU (under 10 minutes; OUT=FOLDER)
	@$(ON_GPU) --tune

check: $(VENV)/.dev  ## format, lint, types and layers, as CI holds them
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports
	@$(BIN)/pyright

format: $(VENV)/.dev  ## put the code into the house format
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

docs: $(VENV)/.docs  ## build the documentation into site/
	@$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs  ## read the documentation while writing it
	@$(BIN)/mkdocs serve

clean:  ## remove what the build made (not runs/)
	@rm -rf $(VENV) site dist .pytest_cache .ruff_cache .hypothesis
