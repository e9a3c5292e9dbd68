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
from jax_attn._src.split_kv_attention import primitive
from jax_attn._src.split_kv_attention.problem import Operands, Options

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
    for variant in ("", *variants_of(problem)):  # the best one may be "stream"
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


# Contexts of every length around tiles of 16 keys and what a block reads at a time.
LENGTHS = [0, 1, 15, 16, 17, 127, 128, 129, 300, 511, 512, 720]


# Small calls have kernels of their own, in which blocks of an entry merge it themselves.
@pytest.mark.parametrize("calls", ["small", "large"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [None, 16, 48])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"query_len": 3, "causal": "bottom_right", "sinks": True},
        {"query_len": 2, "causal": "top_left", "dtype": "float16"},
        {"query_len": 5, "causal": "bottom_right", "sliding_window": 37},
        {"query_len": 20, "sliding_window": 100, "split_size": 100},
        {"num_q_heads": 2, "num_splits": 5},
    ],
    ids=repr,
)
def test_streams(calls, head_dim, page_size, options, monkeypatch):
    rng = np.random.default_rng(head_dim)
    lengths = LENGTHS if calls == "small" else 6 * LENGTHS
    problem = support.dense(
        rng,
        batch=len(lengths),
        head_dim=head_dim,
        kv_len=720,
        lengths=lengths,
        **{"num_q_heads": 8, "dtype": "bfloat16", **options},
    )
    problem = support.poison(problem)
    if page_size is not None:
        layers = 2 if page_size == 48 else None
        layout = "HND" if head_dim == 64 else "NHD"
        problem = support.paged(problem, rng, page_size, layout, layers)
    problem.check("native")
    rows = options.get("query_len", 1) * options.get("num_q_heads", 8) // 2
    if "stream" in jax_attn.ffi.variants(PLATFORM) and (
        head_dim < 256 or rows <= 8
    ):  # else there is no such kernel
        support.use_variant("stream", monkeypatch)
        problem.check("native")


@pytest.mark.parametrize("calls", ["small", "large"])
@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [None, 16, 48, 96])
@pytest.mark.parametrize(
    "options",
    [
        {"k_scale": "head", "v_scale": "head", "dtype": "float16"},
        {"query_len": 3, "causal": "bottom_right", "sinks": True, "v_scale": "head"},
        {"query_len": 5, "causal": "bottom_right", "sliding_window": 37, "num_q_heads": 6},
        {"num_q_heads": 2, "num_splits": 5, "k_scale": "head"},
    ],
    ids=repr,
)
def test_streams_of_8_bits(calls, cache_dtype, head_dim, page_size, options, monkeypatch):
    rng = np.random.default_rng(head_dim)
    lengths = LENGTHS if calls == "small" else 6 * LENGTHS
    problem = support.dense(
        rng,
        batch=len(lengths),
        head_dim=head_dim,
        kv_len=960,
        lengths=lengths,
        cache_dtype=cache_dtype,
        **{"num_q_heads": 8, "dtype": "bfloat16", **options},
    )
    problem = support.poison(problem)
    if page_size is not None:
        layers = 2 if page_size == 48 else None
        layout = "HND" if head_dim == 64 else "NHD"
        problem = support.paged(problem, rng, page_size, layout, layers, scale_per_layer=True)
    problem.check("native")
    rows = options.get("query_len", 1) * options.get("num_q_heads", 8) // 2
    if "stream" in jax_attn.ffi.variants(PLATFORM) and (head_dim < 256 or rows <= 8):
        support.use_variant("stream", monkeypatch)
        problem.check("native")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_queries_of_any_size(dtype, cache_dtype):
    # Beside an 8-bit cache they are multiplied as float16, whatever they are.
    large, small = (60, -60) if dtype == "bfloat16" else (13, -10)
    x = support.dense(
        np.random.default_rng(0),
        num_q_heads=8,
        head_dim=128,
        kv_len=300,
        dtype=dtype,
        cache_dtype=cache_dtype,
        scale=2.0 ** (-large - 3),
    )
    powers = np.where(np.arange(8) % 3 == 0, small, large)[:, None]
    query = x.query.astype(np.float64) * 2.0**powers
    x.replace(query=query.astype(x.query.dtype)).check("native")
    tiny = (x.query.astype(np.float64) * 2.0**small).astype(x.query.dtype)
    x.replace(query=tiny, scale=2.0 ** (-small - 3)).check("native")


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_streams_where_nothing_else_is_asked_for(cache_dtype):
    # Without lengths the host knows where entries are cut; the last two are cut in half.
    sizes = [(1, 5000, 128), (3, 1000, 128), (40, 400, 128), (7, 9, 64), (20, 2048, 64)]
    for batch, kv_len, head_dim in [*sizes, (20, 4096, 256)]:
        x = support.dense(
            np.random.default_rng(batch),
            batch=batch,
            kv_len=kv_len,
            head_dim=head_dim,
            dtype="bfloat16",
            cache_dtype=cache_dtype,
            sinks=True,
        )
        x.check("native")
        for a, b in zip(x.run("native"), x.run("native"), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 40}, {"causal": "top_left"}], ids=repr)
def test_keys_that_are_a_part_of_their_context(dtype, options):
    rng = np.random.default_rng(0)
    x = support.dense(
        rng, batch=4, query_len=3, head_dim=64, kv_len=200, dtype=dtype, lengths=[200, 77, 0, 200]
    )
    arrays = {name: jnp.asarray(array) for name, array in x.arrays.items()}
    offsets = jnp.asarray([150, -1, 5, 230], jnp.int32)  # inside, before, anywhere, past the end
    operands = Operands(**arrays, query_offset=offsets)
    options = {"causal": "bottom_right", **options}
    results = [
        primitive.attend(operands, Options(scale=0.125, implementation=name, **options))
        for name in ("native", "xla")
    ]
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-5
    for a, b in zip(*results, strict=True):
        a, b = (np.asarray(r, np.float32) for r in (a, b))
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        np.testing.assert_allclose(
            np.where(np.isneginf(a), 0, a), np.where(np.isneginf(b), 0, b), atol=tolerance
        )


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


@pytest.mark.parametrize("length", [None, 12288, 7001, 300, 0])
def test_many_kv_heads(length):
    # There are so few groups of so many blocks that Hopper's kernels have late groups too.
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (1, 1, 64, 128), jnp.bfloat16)
    key, value = (jax.random.normal(k, (1, 12288, 64, 128), jnp.bfloat16) for k in keys[1:])
    lengths = None if length is None else jnp.asarray([length], jnp.int32)
    attend = functools.partial(
        jax_attn.split_kv_attention, query, key, value, kv_lengths=lengths, return_lse=True
    )
    expected, first, again = (
        [np.asarray(x, np.float32) for x in attend(implementation=name)]
        for name in ("xla", "native", "native")
    )
    for a, b, c in zip(expected, first, again, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-2)
        np.testing.assert_array_equal(b, c)
    # Of so many keys results are about as small as that tolerance.
    out, native_out = expected[0], first[0]
    assert np.linalg.norm(native_out - out) <= 1e-2 * np.linalg.norm(out)


@pytest.mark.parametrize("kv_len, scratch", [(512, False), (16384, True)])
def test_short_contexts_are_balanced_only_if_that_pays(kv_len, scratch):
    # Otherwise an entry's blocks have all of it, whatever its length, and nothing is merged.
    x = support.dense(
        np.random.default_rng(0),
        batch=4,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        kv_len=kv_len,
        dtype="bfloat16",
        lengths=[kv_len, 1, 0, kv_len // 2 + 3],
    )
    x.check("native")
    arrays = {k: jnp.asarray(v) for k, v in x.arrays.items()}
    (call,) = jax_attn.explain(jax_attn.split_kv_attention)(**arrays)
    assert (call.scratch_bytes > 0) == scratch


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


@pytest.mark.parametrize("batch, kv_len", [(1, 9000), (3, 3000), (16, 3000), (1, 300), (4, 512)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn"])
def test_calls_that_follow_each_other(batch, kv_len, head_dim, ragged, cache_dtype):
    # With nothing between them each starts before the one ends whose results it reads.
    rng = np.random.default_rng(batch)
    x = support.dense(
        rng,
        batch=batch,
        num_q_heads=8,
        head_dim=head_dim,
        kv_len=kv_len,
        dtype="bfloat16",
        cache_dtype=cache_dtype,
        lengths=rng.integers(1, kv_len + 1, batch) if ragged else None,
    )
    arrays = {name: jnp.asarray(array) for name, array in x.arrays.items()}
    query = arrays.pop("query")
    attend = functools.partial(jax_attn.split_kv_attention, implementation="native", **arrays)

    def repeat(query, times):
        for _ in range(times):
            query = attend(query)
        return query

    one = query
    for _ in range(8):
        one = jax.jit(functools.partial(repeat, times=1))(one).block_until_ready()
    eight = jax.jit(functools.partial(repeat, times=8))
    for _ in range(3):
        np.testing.assert_array_equal(np.asarray(eight(query)), np.asarray(one))


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


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8", "float8_e5m2"])
def test_explain(cache_dtype):
    x = support.dense(
        np.random.default_rng(0),
        batch=1,
        num_q_heads=8,
        head_dim=128,
        kv_len=16384,
        dtype="bfloat16",
        cache_dtype=cache_dtype,
    )
    arrays = {k: jnp.asarray(v) for k, v in x.arrays.items()}
    best = jax_attn.ffi.variants(PLATFORM)[0]
    (call,) = jax_attn.explain(jax_attn.split_kv_attention)(**arrays)
    assert (call.platform, call.implementation, call.variant) == (PLATFORM, "native", best)
    assert call.num_splits is not None and call.num_splits > 1
    assert call.scratch_bytes is not None
    assert call.scratch_bytes >= call.num_splits * 8 * 130 * 4


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("head_dim, kv_len", [(64, 896), (128, 512), (128, 896), (256, 512)])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("options", [{}, {"query_len": 2, "sinks": True, "sliding_window": 300}])
def test_small_calls_merge_without_scratch(page_size, head_dim, kv_len, ragged, options):
    x = support.dense(
        np.random.default_rng(0),
        batch=4,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=head_dim,
        kv_len=kv_len,
        dtype="bfloat16",
        lengths=[kv_len, 0, 1, 333] if ragged else [kv_len] * 4,
        causal="bottom_right",
        **options,
    )
    x = support.poison(x)
    if page_size is not None:
        x = support.paged(x, np.random.default_rng(1), page_size, "NHD", 2)
    x.check("native")
    for a, b in zip(x.run("native"), x.run("native"), strict=True):
        np.testing.assert_array_equal(a, b)
    if jax_attn.ffi.variants(PLATFORM)[0] != "stream" or page_size is not None:
        return
    arrays = {k: jnp.asarray(v) for k, v in x.arrays.items()}
    attend = functools.partial(jax_attn.split_kv_attention, **x.options)
    (call,) = jax_attn.explain(attend)(**arrays)
    assert call.num_splits is not None and call.num_splits > 1
    assert call.scratch_bytes == 0


def test_unknown_variant(monkeypatch):
    support.use_variant("sse9", monkeypatch)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*'sse9' cannot"):
        support.dense(np.random.default_rng(0)).run("native")
