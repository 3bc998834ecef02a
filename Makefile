# An active virtual environment is used as it is; without one, .venv is made and used.
PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),.venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.lit-routing

.PHONY: demo test check help preflight

help:  ## What can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

demo: $(STAMP)-demo preflight  ## Train p-MoD to read handwritten digits: two CPU cores, five minutes
	$(BIN)/python -m lit fit --config configs/quickstart.yaml

test: $(STAMP)-test preflight  ## Run the tests that need neither an accelerator nor minutes
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 -m "not gpu and not slow"

check: $(STAMP)-dev  ## Lint, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# `python -m lit` below is ours, because it runs here; the command lit-routing is not, where LLVM's `lit` is installed.
preflight:
	@$(BIN)/python -P -c 'import lit_routing; lit_routing.preflight()'

$(STAMP)-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
