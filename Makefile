# Commands on a fresh machine, each setting up .venv by itself:
#   make quickstart   the main job on the embedded lab; prints where its page is
#   make test         the tests
#   make bench        the table of this CPU (docs/performance.md), under 20 minutes; bench.json beside it
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test bench check clean

quickstart: .venv/installed
	@begin=$$(date +%s); $(BIN)/taskvec run quickstart && echo "seconds: $$(( $$(date +%s) - begin ))"

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

bench: .venv/installed-dev
	$(BIN)/python benchmarks/cpu.py --json bench.json

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "taskvec needs Python 3.11 or newer; say which: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "setting up .venv (torch is large: some minutes)"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	@echo "setting up .venv (torch is large: some minutes)"
	$(BIN)/python -m pip install --quiet --editable '.[dev,hf,clip,lora]'
	@touch .venv/installed $@

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
