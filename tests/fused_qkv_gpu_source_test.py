# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The sources of the fused QKV pass for GPUs, run on the CPU; see tests/gpu_source_test.py."""

import pytest
from fused_qkv_rope_cache_gpu_test import (  # noqa: F401 - collected here too
    chosen,
    test_donated_pages_and_scales_are_updated_in_place,
    test_extreme_scales,
    test_kernels_of_models,
    test_nan_and_infinity_pass,
    test_nested_vmap_of_different_operands,
    test_numbers_of_tokens,
    test_rows_of_zeros_get_scale_one,
    test_the_last_duplicate_wins_among_threads,
    test_variant_solves_the_covering_array,
    test_variant_takes_every_head_dim,
)
from gpu_source_test import architecture  # noqa: F401


@pytest.fixture
def variant(architecture):  # noqa: F811
    """There is one for all problems."""


@pytest.fixture(autouse=True)
def on_gpu_sources(architecture):  # noqa: F811
    """All tests of this file run the kernels of a GPU."""
