# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0

# Every target does its own set-up: a virtual environment in .venv, with uv if it is installed and
# with venv and pip if not.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/installed
NATIVE := $(shell find csrc tests/native -name '*.h' -o -name '*.cc')

.PHONY: demo test lint clean

demo: $(STAMP)
	$(VENV)/bin/python examples/generate.py

test: $(STAMP)
	$(VENV)/bin/pytest --numprocesses=auto

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(NATIVE)
	$(VENV)/bin/pyright

clean:
	rm -rf $(VENV) build

# Editable, so that changes of Python files need no new install; changes of native ones do.
$(STAMP): pyproject.toml CMakeLists.txt $(filter csrc/%,$(NATIVE))
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
