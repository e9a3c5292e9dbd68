# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Provisional."""

from jax_attn._src.split_kv_attention.reference import reference


def attend(x, options):
    """Provisional."""
    return reference(x, options)
