# All from a fresh clone: `make test` and `make demo` make the environment first. `make help` lists
# the targets.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# python3 when it is new enough, else 3.12 or 3.13 by name; `make PYTHON=...` overrides. Each is
# run, not only found: a pyenv shim exists also for versions that are not installed.
PYTHON ?= $(shell for python in python3 python3.12 python3.13; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then echo $$python; break; fi; done)

# For `make gpu`, which makes no environment: a GPU machine often has no network, and torch and
# TransformerEngine are its container's. Wheels and archives beside it: make gpu PACKAGES=/folder
# What a machine with torch, transformers, sentencepiece, tensorboard and matplotlib may lack.
GPU_PACKAGES = annotated-types braceexpand docstring-parser megatron-core psutil pydantic pydantic-core \
	tenacity typeguard typing-inspection tyro webdataset
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

# Files of tests at a time; those that start several processes come first (tests/conftest.py).
TEST_WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# Beside .venv, and not in it: without its library TransformerEngine ends the import of megatron-core.
TE_BIN := .venv-te/bin
TE_STAMP := .venv-te/.installed
SITE_PACKAGES = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

# lmms-eval wants earlier versions of four packages than constraints.txt; the rest is .venv's.
EVAL_BIN := .venv-eval/bin
EVAL_STAMP := .venv-eval/.installed

.PHONY: help venv test gpu gpu-packages test-quick test-large test-plan test-slurm test-te test-eval test-readme lint docs demo demo-quick clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## make .venv and install the tested versions

$(STAMP): setup.py constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "megatron_vico needs Python 3.12 or newer: found none as python3, python3.12 or python3.13;" \
			"install one, or name it: make PYTHON=/path/to/python3.12 venv" >&2; exit 1; fi
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test,demo]'
	touch $(STAMP)

test: $(STAMP)  ## every test that needs no GPU
	$(PYTEST)

test-quick: $(STAMP)  ## the quick ones of tests/unit and tests/policy: for the work in between
	$(PYTEST) tests/unit tests/policy -m 'not slow'

test-large: $(STAMP)  ## convert 8 GB both ways: memory, and speed against a copy (needs 40 GB of disk)
	OMP_NUM_THREADS=1 VICO_TEST_GB=8 $(BIN)/python -m pytest tests/test_large_conversion.py

test-plan: $(STAMP)  ## every recipe fits on the GPUs that it names, by the dry run of its ranks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/planned_recipes.py

test-slurm: $(STAMP)  ## the SLURM launcher's chain, with faults, on two virtual nodes (needs root, slurm-wlm, munge)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.slurm

$(TE_STAMP): $(STAMP)
	test -x $(TE_BIN)/python || $(BIN)/python -m venv .venv-te
	$(BIN)/python $(SITE_PACKAGES) > "$$($(TE_BIN)/python $(SITE_PACKAGES))/project.pth"
	$(TE_BIN)/python -m pip install --constraint constraints.txt --no-deps \
		transformer-engine einops onnxscript onnx onnx-ir ml_dtypes
	touch $(TE_STAMP)

test-te: $(TE_STAMP)  ## TransformerEngine's Python against our own layers, plain torch for its kernels (5 minutes)
	OMP_NUM_THREADS=1 $(TE_BIN)/python -m pytest -p tests.te.preloaded tests/te

$(EVAL_STAMP): $(STAMP) setup.py
	test -x $(EVAL_BIN)/python || $(BIN)/python -m venv .venv-eval
	$(BIN)/python $(SITE_PACKAGES) > "$$($(EVAL_BIN)/python $(SITE_PACKAGES))/project.pth"
	grep -vE '^(av|protobuf|python-dateutil|wandb)==' constraints.txt > .venv-eval/constraints.txt
	$(EVAL_BIN)/python -m pip install --constraint .venv-eval/constraints.txt --editable '.[eval]'
	touch $(EVAL_STAMP)

test-eval: $(EVAL_STAMP)  ## the real lmms-eval, offline, scores 20 samples of a served toy (5 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/lmms_eval_run.py

test-readme: $(STAMP)  ## README from top to bottom in a fresh clone of the last commit, by copy and paste
	$(BIN)/python -m pytest tests/readme_run.py

gpu:  ## the checks for one GPU that are left, for MINUTES=8 (without one: small forms, as in `make test`)
	$(GPU_PYTHON) -m tests.gpu --minutes $(or $(MINUTES),8) $(if $(PACKAGES),--packages $(PACKAGES)) $(CHECKS)

gpu-packages: $(STAMP)  ## wheels for `make gpu` on a machine without a network, into PACKAGES=build/gpu
	$(BIN)/python -m pip download --no-deps --constraint constraints.txt \
		--dest $(or $(PACKAGES),build/gpu) $(GPU_PACKAGES)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## the site of docs/ in build/docs (mkdocs; a warning ends it)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python tools/options_page.py > docs/options.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

demo: $(STAMP)  ## the whole method at toy size on the CPU, with a table and pictures (at most 20 minutes on 2 cores)
	$(BIN)/python examples/quickstart/run.py

demo-quick: $(STAMP)  ## the same with few steps (2 minutes; mechanics, not quality)
	$(BIN)/python examples/quickstart/run.py --quick

clean:  ## remove the environment, caches and build files; runs/ stays
	rm -rf $(VENV) .venv-te .venv-eval build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
