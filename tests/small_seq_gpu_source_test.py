# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The sources of small-sequence attention for GPUs, run on the CPU (tests/gpu_source_test.py)."""

import numpy as np
import pytest
import small_seq_attention_test as values
import small_seq_cases as cases
import support
from gpu_source_test import architecture  # noqa: F401
from small_seq_gpu_test import (  # noqa: F401 - collected here too
    test_gradients_of_logits_beyond_float16,
    test_heads_of_a_tile_keep_apart,
    test_numbers,
    test_packed_arrays_without_tokens,
    test_packed_blocks_with_parts_of_a_sequence_and_with_several,
    test_packed_edges,
    test_tiles_of_packed_sequences,
    test_tiles_with_options,
    tile_problem,
)

# Too many heads for waves whose lanes take turns.
SLOW = ("mqa", "longest")
EDGES = {name: sizes for name, sizes in values.EDGES.items() if name not in SLOW}


@pytest.fixture
def native(architecture):  # noqa: F811
    """The kernels' sources in the place of the CPU's kernels."""


@pytest.mark.parametrize("sizes", EDGES.values(), ids=EDGES)
def test_edges(native, sizes):
    values.test_edges(sizes, "native")


@pytest.mark.parametrize("seed", range(10, 34))
def test_random_problem(native, seed):
    cases.random_problem(seed).check("native")


@pytest.mark.parametrize("dtype", support.FLOATS)
@pytest.mark.parametrize("head_dim", [8, 64, 128, 200, 512])
def test_every_team(native, dtype, head_dim):
    rng = np.random.default_rng(head_dim)
    heads = {"num_q_heads": 1, "num_kv_heads": 1}
    for query_len, kv_len in ((1, 2), (1, 7), (1, 16), (3, 5)):
        x = cases.dense(
            rng,
            batch=2,
            query_len=query_len,
            kv_len=kv_len,
            kv_lengths=[kv_len, kv_len - 1],
            head_dim=head_dim,
            dtype=dtype,
            **heads,
        )
        cases.poison(x).check("native")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [24, 128, 200, 512])
def test_tiles(native, dtype, head_dim):
    for sizes in ((2, 1, 2), (2, 1, 3), (3, 5, 11), (12, 2, 16)):
        tile_problem(sizes, dtype, head_dim).check("native")


def test_weights_that_do_not_fit_in_shared_memory(native):
    sizes = {"batch": 1, "num_kv_heads": 1, "head_dim": 8, "causal": "top_left"}
    x = cases.dense(np.random.default_rng(0), query_len=16, num_q_heads=2, kv_len=63, **sizes)
    x.check("native")
