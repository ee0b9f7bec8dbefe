# make quickstart    everything once, on synthetic radiographs
# make test          all tests but the slow ones
#
# Each of them makes .venv and installs into it what it needs; a second call installs nothing unless pyproject.toml has
# changed. Needed beforehand: make and Python 3.11 or newer with venv (another one: make test PYTHON=python3.12).
#
# A machine whose nvidia-smi answers gets the extra `gpu`, any other `cpu` (choose yourself: make test DEVICE=cpu). The
# extra picks the build of faiss alone. Which torch is installed is pip's choice: on Linux the usual index serves the
# CUDA build, several gigabytes, which also runs on a CPU. To avoid it, let pip find PyTorch's index of CPU builds before
# the first make: export PIP_INDEX_URL, or PIP_EXTRA_INDEX_URL beside the usual index (PyTorch's installation page names
# the address).

PYTHON ?= python3
VENV ?= .venv
DEVICE ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
OUT ?= carina-quickstart
TESTS ?=

RUN := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-all lint clean

help:
	@echo "make quickstart   everything once on synthetic radiographs, into $(OUT)/ (another folder: OUT=...)"
	@echo "make test         the tests, without the slow ones (some of them: TESTS=tests/metrics)"
	@echo "make test-all     every test"
	@echo "make lint         ruff: mistakes and format"
	@echo "make clean        remove the environment, caches and builds"

quickstart: $(VENV)/.carina-user
	$(RUN) -m carina quickstart out=$(OUT)

test: $(VENV)/.carina-dev
	$(RUN) -m pytest -m "not slow" $(TESTS)

test-all: $(VENV)/.carina-dev
	$(RUN) -m pytest $(TESTS)

lint: $(VENV)/.carina-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The stamps hold the time of the last installation; the one of `test` covers what quickstart needs as well.
$(VENV)/.carina-user: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install -e '.[$(DEVICE),codecs]'
	@touch $@

$(VENV)/.carina-dev: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install -e '.[$(DEVICE),codecs,dev]'
	@touch $@ $(VENV)/.carina-user

$(VENV)/bin/python:
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "carina: there is no $(PYTHON) here; install Python 3.11 or newer, or name it: make PYTHON=..." >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "carina: $(PYTHON) is $$("$(PYTHON)" -V 2>&1), 3.11 or newer is needed; name one: make PYTHON=python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "carina: $(PYTHON) cannot make environments; install its venv package (Debian, Ubuntu: python3-venv)" >&2; exit 2; }
	"$(PYTHON)" -m venv "$(VENV)"

clean:
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -type d -name __pycache__ -prune -exec rm -rf {} +
