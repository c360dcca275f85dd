# Every target works from a bare checkout: what it needs goes into .venv, which nothing outside the checkout sees.
# Set on the command line:  PYTHON=python3.12 (makes .venv)   PAPER=rlcr   SCALE=full   WORKERS=4   PORT=8000
PYTHON  ?= python3
PAPER   ?=
SCALE   ?= quick
WORKERS ?= 2
PORT    ?= 8000

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install browser test notebooks pytest site serve bench reproduce clean

BIN   := .venv/bin
STAMP := .venv/installed
# Modules are compiled when they are first imported, and kept: without that, every process of the tests would compile the libraries again, half a minute each time.
unexport PYTHONDONTWRITEBYTECODE
CHECKED_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch goes first and alone, so that a local CPU build is found before anything asks for CUDA's libraries. The package is
# built with the pinned setuptools: an isolated build would fetch whichever is newest. Python compiles what is imported when it is imported:
# compiling all of every library takes longer than unpacking it. galore-torch, a peer in paper 9's tests, comes without bitsandbytes, which
# only its 8-bit optimizer needs and which every import of transformers would import.
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt
$(STAMP): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (some minutes the first time)"
	@$(PIP) 'pip>=24' setuptools wheel
	@$(PIP) torch
	@$(PIP) --no-build-isolation -e '.[all]'
	@$(PIP) --no-deps galore-torch
	@touch $@

install: $(STAMP) ## .venv with the package, editable, and all its extras

browser: ## Chromium for the tests of the site, where the system's package manager may be used
	@if [ -n "$${CHROMIUM:-}" ] || command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } >/dev/null \
			|| echo "chromium could not be installed: the tests of the site in a browser will be skipped"; \
	else echo "no chromium on the PATH: the tests of the site in a browser will be skipped"; fi

# One after the other: each of the two keeps every core busy by itself.
test: install browser ## every notebook, then every test
	@$(MAKE) --no-print-directory notebooks
	@$(MAKE) --no-print-directory pytest

notebooks: install ## run every notebook
	$(CHECKED_ENV) $(BIN)/python tests/notebooks.py --workers $(WORKERS)

# One file stays in one process: its servers and its built site are made once. tests/conftest.py puts the slowest files first.
pytest: install ## the tests that notebooks cannot hold
	$(CHECKED_ENV) $(BIN)/python -m pytest -q tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15

site: install ## the site in _docs/, links checked
	$(BIN)/python docs/build.py

serve: ## the site that was built, at http://127.0.0.1:8000 (PORT=...): its search needs a server
	@test -e _docs/index.html || { echo "there is no site in _docs/ yet: make site"; exit 1; }
	@echo "http://127.0.0.1:$(PORT)/ (interrupt to stop)"
	@$(PYTHON) -m http.server --bind 127.0.0.1 -d _docs $(PORT)

bench: install ## speed on this machine, into benchmarks/results/
	@for script in benchmarks/[a-z]*.py; do echo "$$script"; $(BIN)/python "$$script"; done

reproduce: install ## train, measure, write records/, build the site: PAPER=rlcr for one paper, SCALE=full for more seeds
	$(BIN)/rlcr-suite reproduce $(PAPER) --scale $(SCALE)
	@$(MAKE) --no-print-directory site
	@$(BIN)/rlcr-suite claims

clean: ## remove what is built; .venv and runs/ stay
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
