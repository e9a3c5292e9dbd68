# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""How the CPU kernels share out the keys and heads of a call: what it costs and what it cannot."""

import jax
import numpy as np
import pytest
import support

import jax_attn
from jax_attn._src import registration

pytestmark = pytest.mark.skipif(
    "cpu" not in jax_attn.platforms(), reason="this build of jax_attn has no kernels for the CPU"
)


def plan(**sizes):
    module = registration.native_module("cpu")
    assert module is not None
    shape = {"query_len": 1, "num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    options = {"v_head_dim": 128, "heads_first": False, "num_splits": 0, "split_size": 0}
    return module.split_kv_plan(**{"batch": 1, "kv_len": 4096} | shape | options | sizes)


def test_contexts_are_split_only_where_they_are_few():
    threads = plan()["num_threads"]
    assert (plan()["num_splits"] > 1) == (threads > 1)
    assert plan(batch=2 * threads)["num_splits"] == 1
    one_thread = plan(kv_len=1)
    # A thread's scratch, and no room for results to be merged.
    assert plan(batch=2 * threads, kv_len=256)["workspace_size"] == one_thread["workspace_size"]


# Lengths with one context that is most of the work, first or last, and of which some are empty.
@pytest.mark.parametrize("lengths", [[3000], [2900, 40, 1, 0, 300], [0, 7, 250, 3000], [800] * 4])
def test_results_are_right_and_the_same_whoever_computes_them(lengths):
    problem = support.dense(
        np.random.default_rng(len(lengths)),
        batch=len(lengths),
        num_q_heads=12,
        num_kv_heads=6,
        head_dim=64,
        v_head_dim=64,
        kv_len=max(lengths),
        lengths=lengths,
    )
    problem.check("native")
    first = problem.run("native")
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, problem.run("native"), first)
