# make train   from nothing to a trained model: an environment in .venv, the install, then the quick start
# make test    every test
# make check   lint, format, types and the import direction
# make bench   race the peers, DeepSpeed too, and bring docs/performance.md up to date: two hours or more
# PYTHON=python3.12 chooses the interpreter (3.11 or newer) of a new environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: train test check bench clean

train: $(VENV)/installed
	$(BIN)/shardwright train recipes/quickstart.toml
	@echo; echo "what it has learnt to say:"
	$(BIN)/shardwright generate "$$(ls -td runs/quickstart-* | head -1)" --prompt "    def " --max-new-tokens 160 --temperature 0.7

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q

check: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/architecture

bench: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks --record

# The stamps are made last, so an interrupted install starts again.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11; try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/check_torch.py
	$(INSTALL) hatchling editables
	$(INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed-dev
	$(INSTALL) --no-build-isolation -e '.[dev,bench]'
	@touch $@

clean:
	rm -rf $(VENV)
