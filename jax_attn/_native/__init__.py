# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Compiled modules land here: `_cpu`, and `_cuda` and `_rocm` where they were built."""
