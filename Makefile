# make demo: train from configs/small.yaml, ask the model in its three modes, show the report.  make test: the whole test suite.
# Both create $(VENV) and install into it first; nothing is reinstalled until pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
MODEL  := runs/small

export PYTHONUTF8 = 1

DEMO_PROMPTS = "A farm has chickens and rabbits: 137 heads and 422 legs. How many of each?" \
               "小红买8支笔，每支73元，又买7个蛋糕，每个56元，付了1000元，找回多少元？"

.PHONY: help demo test lint teacher install clean

help:
	@echo "make demo      train from configs/small.yaml (resumes), ask in the three modes, show the report"
	@echo "make test      run the test suite; ARGS='-k cache -x' goes to pytest"
	@echo "make lint      ruff"
	@echo "make teacher   train the shipped teacher again from configs/small-teacher.yaml (hours)"
	@echo "make install   only create $(VENV) and install; PYTHON=python3.12 chooses the interpreter"
	@echo "make clean     remove caches and build leftovers; $(VENV) and runs/ stay"

demo: $(STAMP)
	$(PY) train.py configs/small.yaml --resume
	@set -e; for prompt in $(DEMO_PROMPTS); do for mode in fast think auto; do \
	    echo; echo "--- $$mode: $$prompt"; \
	    $(PY) infer.py --model $(MODEL) --mode $$mode --prompt "$$prompt"; \
	done; done
	@echo; echo "--- report: $(MODEL)/report.md"
	@sed '/^## /,$$d' $(MODEL)/report.md

test: $(STAMP)
	$(PY) -m pytest $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .

teacher: $(STAMP)
	$(PY) train.py configs/small-teacher.yaml --resume

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "dualbranch needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "Name another interpreter: make $(or $(firstword $(MAKECMDGOALS)),test) PYTHON=python3.12" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
