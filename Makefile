# Every target sets up what it needs: a .venv with the pinned versions, made once and reused.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread a test process: the tests start processes of their own, and more threads than cores only wait for each other.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(RUN)/python -m pytest

.PHONY: help install quickstart test test-full lint format bench bench-data bench-convert bench-train clean
help:
	@echo "make quickstart   the whole chain on this machine: text -> tokens -> pretrain -> tune -> chat (about 10 minutes)"
	@echo "make test         the tests (some minutes)        make test-full   with the slow ones"
	@echo "make lint         formatter, linter, type checker make format      apply the formatter"
	@echo "make bench        measure, and write what docs/benchmarks.md records"

install: $(INSTALLED)
$(INSTALLED): pyproject.toml requirements/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, $(PYTHON) is %d.%d; set PYTHON=/path/to/python3.11" % sys.version_info[:2] or 0)'
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt -e '.[test,lint]'
	@touch $@

quickstart: $(INSTALLED)
	$(RUN)/crystalcoder quickstart

test: $(INSTALLED)
	$(PYTEST) -n 2 --dist worksteal

test-full: $(INSTALLED)
	$(PYTEST) -n 2 --dist worksteal -m ''

lint: $(INSTALLED)
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

format: $(INSTALLED)
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

bench: $(INSTALLED)
	$(RUN)/python -m tools.bench $(BENCH)

bench-data: $(INSTALLED)
	$(RUN)/python -m tools.bench data

# FULL=--full: the whole 7B model, 54 GB of disk
bench-convert: $(INSTALLED)
	$(RUN)/python -m tools.bench.convert $(FULL)

# This trainer, a plain loop and transformers.Trainer side by side on this CPU; the last one needs an extra package.
bench-train: $(INSTALLED)
	@$(RUN)/python -c 'import accelerate' 2>/dev/null || \
		$(RUN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt -e '.[bench]'
	$(RUN)/python -m tools.bench train

clean:
	rm -rf $(VENV) runs logs .mypy_cache .ruff_cache .pytest_cache .hypothesis
