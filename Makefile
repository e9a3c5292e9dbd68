# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0

# Every target does its own set-up: a virtual environment in .venv, with uv if it is installed and
# with venv and pip if not.

PYTHON ?= python3
VENV := .venv
CXX_FILES := $(shell find csrc tests/native tests/gpu_on_cpu -name '*.h' -o -name '*.cc')
SOURCES := pyproject.toml CMakeLists.txt $(filter csrc/%,$(CXX_FILES))

.PHONY: demo test lint clean

demo: $(VENV)/with-examples
	$(VENV)/bin/python examples/generate.py

test: $(VENV)/with-dev
	$(VENV)/bin/pytest --numprocesses=auto

lint: $(VENV)/with-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(VENV)/bin/pyright

clean:
	rm -rf $(VENV) build

# Installs the package with one of its extras. Editable, so that changes of Python files need no
# new install; changes of native ones do.
$(VENV)/with-%: $(SOURCES)
	@if command -v uv >/dev/null; then \
	  set -ex; \
	  test -x $(VENV)/bin/python || uv venv --python $(PYTHON) $(VENV); \
	  uv pip install --python $(VENV)/bin/python --editable '.[$*]'; \
	else \
	  set -ex; \
	  test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV); \
	  $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[$*]'; \
	fi
	@touch $@
