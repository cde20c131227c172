# make demo   set up .venv, then train, compress, export and report (ARGS="--arch mobilenetv2_100 --epochs 8")
# make test   set up .venv with what tests need, then run notebooks and tests
# make check  notebooks, modules and README in sync?
# make slow   the long tests
# make export write modules and README from the notebooks

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
META   := settings.ini setup.py pyproject.toml

.PHONY: demo test notebooks tests slow check export clean

demo: $(VENV)/.installed
	$(BIN)/fastcompress demo $(ARGS)

test: notebooks tests

notebooks: $(VENV)/.installed-dev
	$(BIN)/nbdev-test --n-workers 0 --do-print

tests: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed-dev
	$(BIN)/python tools/check_sync.py

export: $(VENV)/.installed-dev
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tools/readme.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(META) | $(VENV)/bin/python
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/.installed-dev: $(META) | $(VENV)/bin/python
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info
