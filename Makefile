# Everything a fresh clone needs: python3 (3.11 or newer) and make.
#   make demo     install into .venv, run a small benchmark, print its table
#   make test     install into .venv, run the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test lint bench report clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "clbench needs Python 3.11 or newer; this is %d.%d (make PYTHON=python3.12 ...)" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Seven baselines, three seeds, real 8x8 digits (embedded: nothing is downloaded). About a minute on two cores.
demo: install
	$(BIN)/clbench run --task digits_split_class --baseline finetune joint frozen ewc er lwf si --seeds 3 --out demo/runs
	$(BIN)/clbench report --runs demo/runs --out demo

test: lint
	$(BIN)/python -m pytest -n auto

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clbench check
	$(BIN)/clbench report --check --readme README.md

# Ratios, measured side by side in one process: against stock Avalanche and a bare training loop; of shared weights;
# of generated weights.
bench: install
	$(BIN)/python -m benchmarks.loading
	$(BIN)/python -m benchmarks.sharing
	$(BIN)/python -m benchmarks.hypernet

report: install
	$(BIN)/clbench report --readme README.md

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache
