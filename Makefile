# Developer commands; `make help` lists them. Each target sets up what it needs.

PYTHON ?= python3
MODEL ?= smollm2
PYTEST_ARGS ?= -n 2 --dist worksteal
VENV := .venv
BIN := $(VENV)/bin
comma := ,

# Optional dependencies to install. On Linux they name MLX's backend; on macOS MLX brings Metal itself.
ifeq ($(shell uname -s),Darwin)
  EXTRAS ?= dev
else
  CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')
  EXTRAS ?= $(if $(CUDA),$(if $(filter 12,$(CUDA)),cuda12,cuda13),cpu),dev
endif
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

# MLX's CPU wheel for Linux links a reference BLAS; OpenBLAS makes float32 matrix products 25 to 70 times faster.
ifeq ($(shell uname -s),Linux)
  OPENBLAS := $(firstword $(wildcard /usr/lib/*/openblas-pthread/libopenblas.so.0))
  ifdef OPENBLAS
    PRELOAD := LD_PRELOAD=$(OPENBLAS)
  else
    BLAS_HINT := @echo 'OpenBLAS not found: CPU runs will be slow; install it with: apt-get install libopenblas0-pthread'
  endif
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format wheel bench docs docs-serve clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo '  variables: PYTHON=$(PYTHON) EXTRAS=$(EXTRAS) MODEL=$(MODEL) PYTEST_ARGS=$(PYTEST_ARGS)'

setup: $(STAMP) ## create .venv with the package and its developer tools

# The stamp is the last thing written, so an interrupted installation is done again.
$(STAMP): pyproject.toml
	@$(PYTHON) -m venv $(VENV) || { \
	  echo 'No virtual environment could be made with $(PYTHON); on Debian: apt-get install python3-venv' >&2; \
	  exit 1; }
	@echo 'Installing mlx-kvq-plugin[$(EXTRAS)] into $(VENV) (log: $(VENV)/pip.log)'
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[$(EXTRAS)]' >$(VENV)/pip.log 2>&1 || { \
	  cat $(VENV)/pip.log >&2; exit 1; }
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: setup ## run examples/demo.py (MODEL=smollm2 or gemma3)
	$(BLAS_HINT)
	$(PRELOAD) $(BIN)/python examples/demo.py --model $(MODEL)

test: setup ## make the demo models once, then run all tests
	$(BLAS_HINT)
	$(BIN)/kvq demo-model smollm2 gemma3
	$(PRELOAD) OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## fix what ruff can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: setup ## build the distributions, and use the wheel outside of the source tree
	$(PRELOAD) $(BIN)/python .ci/wheel.py

bench: setup ## decoding speed, quality and memory
	$(BLAS_HINT)
	$(PRELOAD) $(BIN)/python benchmarks/decode.py
	$(PRELOAD) $(BIN)/python benchmarks/quality.py
	$(PRELOAD) $(BIN)/python benchmarks/memory.py

# Material for MkDocs says at every build that its support ends in May 2027 (see `docs` in pyproject.toml).
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs
DOCS_STAMP := $(VENV)/.docs-installed

$(DOCS_STAMP): $(STAMP)
	@echo 'Installing mkdocs into $(VENV) (log: $(VENV)/pip-docs.log)'
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[docs]' >$(VENV)/pip-docs.log 2>&1 || { \
	  cat $(VENV)/pip-docs.log >&2; exit 1; }
	@touch $@

docs: $(DOCS_STAMP) ## build the documentation into site/; a warning fails
	$(MKDOCS) build --strict

docs-serve: $(DOCS_STAMP) ## show the documentation while pages are written
	$(MKDOCS) serve --strict

clean: ## remove .venv, caches and build outputs; demo models stay
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
