# make demo: train from configs/small.yaml, ask the model in its three modes, show the report.  make test: the whole test suite.
# Both create $(VENV) and install into it first; nothing is reinstalled until pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
MODEL  := runs/small

export PYTHONUTF8 = 1

# Hard problems of the test split: no run is trained on them. The answers are 23, and 鸡50只，兔84只.
DEMO_PROMPTS = "Lily buys 7 shirts at 24 dollars each and 7 melons at 87 dollars each and pays 800 dollars. What is the change?" \
               "鸡兔同笼，共134个头，436条腿。鸡和兔各有多少只？"

.PHONY: help demo test parity aot lint bench teacher install clean

help:
	@echo "make demo      train from configs/small.yaml (resumes), ask in the three modes, show the report"
	@echo "make test      run the test suite; ARGS='-k cache -x' goes to pytest"
	@echo "make parity    hold the Triton kernels equal to the reference on 2,100 drawn shapes (interpreter; six minutes)"
	@echo "make aot       compile every Triton kernel for sm_80 and sm_90 without a GPU; fails if registers spill"
	@echo "make lint      ruff"
	@echo "make bench     speed, memory and quality beside llama.cpp and transformers, where installed (pip install -e '.[bench]')"
	@echo "make teacher   train the shipped teacher again (7 minutes on an H100, a day on two cores)"
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

parity: $(STAMP)
	HYPOTHESIS_PROFILE=many $(PY) -m pytest tests/test_*triton*.py $(ARGS)

aot: $(STAMP)
	env -u TRITON_INTERPRET $(PY) -m kernels.aot --target sm_80 sm_90 $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .

bench: $(STAMP)
	$(PY) benchmarks/peers.py $(ARGS)

teacher: $(STAMP)
	$(PY) train.py configs/small-teacher.yaml --resume
	$(PY) train.py configs/small-teacher-final.yaml --resume
	$(PY) -m dualbranch.distill.publish runs/small-teacher-final/teacher pretrained/small-teacher

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
