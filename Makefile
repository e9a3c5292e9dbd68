# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0

# Every target does its own set-up: a virtual environment in .venv, with uv if it is installed and
# with venv and pip if not.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/installed
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -name '*.h' -o -name '*.cc')

.PHONY: demo test lint clean

demo: $(STAMP)
	$(VENV)/bin/python examples/generate.py

test: $(STAMP)
	$(VENV)/bin/pytest

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc -name '*.h' -o -name '*.cc')
	$(VENV)/bin/pyright

clean:
	rm -rf $(VENV) build

# Editable, so that changes of Python files need no new install; changes of native ones do.
$(STAMP): $(SOURCES)
	@if command -v uv >/dev/null; then \
	  set -ex; \
	  test -x $(VENV)/bin/python || uv venv --python $(PYTHON) $(VENV); \
	  uv pip install --python $(VENV)/bin/python --editable '.[dev]'; \
	else \
	  set -ex; \
	  test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV); \
	  $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'; \
	fi
	@touch $@
