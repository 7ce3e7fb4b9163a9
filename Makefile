# make demo: see it work.  make test: everything that CI checks.
# Each sets up what it needs in .venv; a machine needs Python 3.11 or newer with venv and pip, and make.

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

BIN := .venv/bin
INSTALLED := .venv/installed
# Tests at a time: half again as many as there are cores, since half of what they take is waiting for other processes.
WORKERS = $(shell echo $$(( ($$(nproc) * 3 + 1) / 2 )))

.PHONY: demo test bench docs clean

demo: $(INSTALLED)
	$(BIN)/safelight demo

test: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --no-fold-skipped --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal

# JSON on stdout, from every script of bench/ whose figures need no GPU; after the last it fails where one missed a bar,
# and names it. Those called gpu_ and train_ are run by hand on a machine that has one; what has no main, and what begins
# with soak_, are parts of scripts. docs/numbers.md holds what was measured, on what and when.
BENCHES = $(filter-out gpu_% train_% soak_%,$(basename $(notdir $(shell grep -l __main__ bench/*.py))))
bench: $(INSTALLED)
	@missed=; for script in $(BENCHES); do echo "== bench/$$script.py" >&2; \
		$(BIN)/python -m bench.$$script || missed="$$missed $$script"; \
	done; test -z "$$missed" || { echo "Missed a bar, or failed:$$missed" >&2; exit 1; }

# docs/cli.md, from --help, and docs/plans.md, from the planner; `make test` fails when one is old.
docs: $(INSTALLED)
	$(BIN)/python -m safelight.clidoc > docs/cli.md
	$(BIN)/python -m safelight.plandoc > docs/plans.md

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist

# A stamp file: set up again only when what is to be installed has changed. --group needs pip 25.1.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
		echo "There is no Python 3.11 or newer with venv here. On Debian and Ubuntu: apt install python3-venv." >&2; \
		echo "Or name one: make PYTHON=/path/to/python3" >&2; exit 3; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[daemon]' --group dev
	touch $@
