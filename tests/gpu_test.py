# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels: variants, types and sizes, capture in graphs. Skipped where there is no GPU."""

import functools

import fuzz_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_attn

PLATFORM = support.PLATFORM
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        PLATFORM == "cpu" or PLATFORM not in jax_attn.platforms(),
        reason="no GPU that this build of jax_attn has kernels for",
    ),
]


def variants_of(problem):
    """The variants that can do a problem: matrix instructions take 16-bit queries."""
    query, key = problem.query.dtype.name, problem.key.dtype.name
    wide = max(problem.query.shape[-1], problem.value.shape[-1]) > 256
    per_token = problem.v_scale is not None and problem.v_scale.ndim >= 3
    matrix = query != "float32" and (
        query == key or (query == "bfloat16" and key in support.QUANTIZED and not wide)
    )
    if query == "float16" and per_token:
        matrix = False
    return ("matrix", "vector") if matrix else ("vector",)


def check(problem, monkeypatch):
    for variant in variants_of(problem):
        with monkeypatch.context() as patch:
            support.use_variant(variant, patch)
            problem.check("native")


@pytest.mark.parametrize("dtype", support.FLOATS)
@pytest.mark.parametrize("cache_dtype", (*support.FLOATS, *support.QUANTIZED))
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 128, 192, 256, 512])
def test_types_and_sizes(dtype, cache_dtype, head_dim, monkeypatch):
    problem = support.dense(
        np.random.default_rng(head_dim),
        query_len=3,
        num_q_heads=6,
        head_dim=head_dim,
        v_head_dim=head_dim + 8 if head_dim < 512 else 8,
        kv_len=211,
        dtype=dtype,
        cache_dtype=cache_dtype,
        lengths=[211, 38],
        causal="bottom_right",
    )
    check(problem, monkeypatch)


@pytest.mark.parametrize("group", [1, 2, 4, 5, 8, 16, 33])
@pytest.mark.parametrize("dtype", support.FLOATS)
def test_groups(group, dtype, monkeypatch):
    problem = support.dense(
        np.random.default_rng(group),
        batch=3,
        num_q_heads=2 * group,
        head_dim=128,
        kv_len=1000,
        dtype=dtype,
        lengths=[1000, 0, 513],
    )
    check(problem, monkeypatch)
    check(support.paged(problem, np.random.default_rng(0), 8, "HND"), monkeypatch)


@pytest.mark.parametrize("batch", [1, 33, 150])
@pytest.mark.parametrize("lengths", [None, "ragged"])
def test_balanced_batches(batch, lengths, monkeypatch):
    rng = np.random.default_rng(batch)
    problem = support.dense(
        rng,
        batch=batch,
        query_len=2,
        num_q_heads=4,
        head_dim=64,
        kv_len=700,
        dtype="bfloat16",
        lengths=None
        if lengths is None
        else rng.integers(0, 701, batch) * (rng.random(batch) < 0.7),
    )
    check(problem, monkeypatch)


def decode(step, query, key, value, lengths):
    def body(query, _):
        out, lse = jax_attn.split_kv_attention(
            query, key, value, kv_lengths=lengths, return_lse=True, implementation="native"
        )
        return query + 0.5 * out, lse

    return jax.lax.scan(body, query, None, length=step)


@pytest.mark.parametrize("size", [64, 4096])
def test_captured_and_replayed(size):
    # From the second call on the loop's body is a graph that XLA replays; from the third nothing
    # but the graph runs.
    rng = np.random.default_rng(0)
    x = support.dense(rng, num_q_heads=8, kv_len=size, dtype="bfloat16", lengths=[size, size // 2])
    query, key, value, lengths = (jnp.asarray(a) for a in (x.query, x.key, x.value, x.kv_lengths))
    jitted = jax.jit(
        functools.partial(decode, 8), compiler_options={"xla_gpu_graph_min_graph_size": 1}
    )
    first = jax.tree.map(np.asarray, jitted(query, key, value, lengths))
    for i in range(6):
        again = jax.tree.map(np.asarray, jitted(query, key, value, lengths))
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)
        # Lengths are read by the kernels, so a replay sees new ones.
        shorter = jnp.asarray([size - i - 1, 1], jnp.int32)
        out = jitted(query, key, value, shorter)[0]
        assert not np.array_equal(np.asarray(out), first[0])
    expected = x.check("native")
    one = jax.jit(functools.partial(decode, 1))(query, key, value, lengths)
    np.testing.assert_array_equal(np.asarray(one[1][0]), expected[1])


def test_same_bits_again():
    x = fuzz_test.random_problem(7)
    first = x.run("native")
    for a, b in zip(first, x.run("native"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_fixed_split_size_is_independent_of_the_batch():
    rng = np.random.default_rng(0)
    x = support.dense(
        rng,
        batch=3,
        head_dim=128,
        kv_len=900,
        dtype="bfloat16",
        lengths=[900, 333, 70],
        split_size=64,
    )
    together = x.run("native")
    for b in range(3):
        alone = x.replace(
            **{n: x.arrays[n][b : b + 1] for n in ("query", "key", "value", "kv_lengths")}
        )
        for a, c in zip(alone.run("native"), together, strict=True):
            np.testing.assert_array_equal(a, c[b : b + 1])


def test_explain():
    x = support.dense(
        np.random.default_rng(0),
        batch=1,
        num_q_heads=8,
        head_dim=128,
        kv_len=8192,
        dtype="bfloat16",
    )
    arrays = {k: jnp.asarray(v) for k, v in x.arrays.items()}
    (call,) = jax_attn.explain(jax_attn.split_kv_attention)(**arrays)
    assert (call.platform, call.implementation, call.variant) == (PLATFORM, "native", "matrix")
    assert call.num_splits is not None and call.num_splits > 1
    assert call.scratch_bytes is not None
    assert call.scratch_bytes >= call.num_splits * 8 * 130 * 4


def test_unknown_variant(monkeypatch):
    support.use_variant("sse9", monkeypatch)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*'sse9' cannot"):
        support.dense(np.random.default_rng(0)).run("native")
