# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The full text of every error of the attention operations, the cache and the allocator."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_attn

F32, I32 = jnp.float32, jnp.int32

OPERANDS = {
    "query": jnp.zeros((2, 3, 4, 8)),
    "key": jnp.zeros((2, 6, 2, 8)),
    "value": jnp.zeros((2, 6, 2, 16)),
}
CACHE = {
    "k_pages": jnp.zeros((5, 4, 2, 8)),
    "v_pages": jnp.zeros((5, 4, 2, 16)),
}
LAYERS = {name: jnp.stack([pages] * 3) for name, pages in CACHE.items()}
PAGED = {
    "query": jnp.zeros((2, 3, 4, 8)),
    "page_table": jnp.zeros((2, 3), I32),
    "kv_lengths": jnp.zeros(2, I32),
}
PARTS = {"outs": jnp.zeros((3, 2, 1, 4, 8)), "lses": jnp.zeros((3, 2, 1, 4))}

FLOATS = "float32, bfloat16 or float16"
STORED = "float32, bfloat16, float16, int8, float8_e4m3fn, float8_e4m3fnuz or float8_e5m2"


def dense(**changes):
    return jax_attn.split_kv_attention(**{**OPERANDS, **changes})


def paged(cache=CACHE, layout="NHD", **changes):
    scales = {name: changes.pop(name, None) for name in ("k_scale", "v_scale")}
    cache = jax_attn.PagedKVCache(**{**CACHE, **cache}, **scales, layout=layout)
    return jax_attn.paged_attention(cache=cache, **{**PAGED, **changes})


def merge(**changes):
    return jax_attn.merge_attention(**{**PARTS, **changes})


def zeros(*shape, dtype=F32):
    return jnp.zeros(shape, dtype)


# Arguments of both operations, and the message after the name of the operation.
SHARED = [
    ({"query": [1.0]}, TypeError, "`query` must be an array, got list."),
    (
        {"query": zeros(2, 3, 4, 8, dtype=I32)},
        TypeError,
        f"`query` must be {FLOATS}, got int32.",
    ),
    (
        {"query": zeros(2, 4, 8)},
        ValueError,
        "`query` must have shape [batch, query_len, num_q_heads, head_dim], got shape (2, 4, 8).",
    ),
    (
        {"query": zeros(2, 3, 5, 8)},
        ValueError,
        "num_q_heads=5 is not a multiple of num_kv_heads=2.",
    ),
    ({"bias": 0.5}, TypeError, "`bias` must be an array, got float."),
    ({"bias": zeros(1, dtype=I32)}, TypeError, f"`bias` must be {FLOATS}, got int32."),
    ({"mask": zeros(1)}, TypeError, "`mask` must be bool, got float32."),
    (
        {"mask": zeros(2, 6, dtype=bool)},
        ValueError,
        "`mask` must have shape [#batch, #num_q_heads, #query_len, kv_len], got shape (2, 6).",
    ),
    (
        {"bias": zeros(2, 3, 1, 6)},
        ValueError,
        "`bias` has num_q_heads=3 (shape (2, 3, 1, 6)), expected 4 or 1 from `query` "
        "(shape (2, 3, 4, 8)).",
    ),
    ({"kv_lengths": [6, 6]}, TypeError, "`kv_lengths` must be an array, got list."),
    ({"kv_lengths": zeros(2)}, TypeError, "`kv_lengths` must be int32, got float32."),
    (
        {"kv_lengths": zeros(3, dtype=I32)},
        ValueError,
        "`kv_lengths` has batch=3 (shape (3,)), expected 2 from `query` (shape (2, 3, 4, 8)).",
    ),
    (
        {"alibi_slopes": zeros(4, dtype=jnp.bfloat16)},
        TypeError,
        "`alibi_slopes` must be float32, got bfloat16.",
    ),
    (
        {"alibi_slopes": zeros(2)},
        ValueError,
        "`alibi_slopes` has num_q_heads=2 (shape (2,)), expected 4 from `query` "
        "(shape (2, 3, 4, 8)).",
    ),
    ({"sinks": zeros(4, dtype=I32)}, TypeError, f"`sinks` must be {FLOATS}, got int32."),
    (
        {"sinks": zeros(4, 1)},
        ValueError,
        "`sinks` must have shape [num_q_heads], got shape (4, 1).",
    ),
    ({"scale": "1"}, TypeError, "scale must be float, got str."),
    ({"scale": True}, TypeError, "scale must be float, got bool."),
    ({"scale": float("nan")}, ValueError, "scale must be finite, got nan."),
    (
        {"causal": True},
        ValueError,
        "causal must be 'bottom_right', 'top_left' or None, got True.",
    ),
    (
        {"implementation": "cuda"},
        ValueError,
        "implementation must be 'native', 'xla' or None, got 'cuda'.",
    ),
    (
        {"sliding_window": 0},
        ValueError,
        "sliding_window must be positive, got 0. Use None for no window.",
    ),
    ({"sliding_window": 2.0}, TypeError, "sliding_window must be int, got float."),
    (
        {"logits_soft_cap": 0.0},
        ValueError,
        "logits_soft_cap must be positive, got 0.0. Use None for no cap.",
    ),
    (
        {"logits_soft_cap": float("inf")},
        ValueError,
        "logits_soft_cap must be positive, got inf. Use None for no cap.",
    ),
    ({"logits_soft_cap": "5"}, TypeError, "logits_soft_cap must be float, got str."),
    (
        {"num_splits": 0},
        ValueError,
        "num_splits must be positive, got 0. Use None for a planned number.",
    ),
    ({"num_splits": True}, TypeError, "num_splits must be int, got bool."),
    (
        {"split_size": -1},
        ValueError,
        "split_size must be positive, got -1. Use None for planned splits.",
    ),
    (
        {"num_splits": 2, "split_size": 2},
        ValueError,
        "num_splits and split_size exclude each other; give one of them.",
    ),
    ({"k_scale": 2.0}, TypeError, "`{cache}k_scale` must be an array, got float."),
    (
        {"v_scale": zeros(2, dtype=jnp.bfloat16)},
        TypeError,
        "`{cache}v_scale` must be float32, got bfloat16.",
    ),
    (
        {"v_scale": zeros(3)},
        ValueError,
        "`{cache}v_scale` has num_kv_heads=3 (shape (3,)), expected 2 from {keys}.",
    ),
]

DENSE = [
    (
        {"query": zeros(2, 3, 0, 8), "key": zeros(2, 6, 0, 8), "value": zeros(2, 6, 0, 8)},
        ValueError,
        "num_q_heads=0 is not a multiple of num_kv_heads=0.",
    ),
    ({"key": zeros(2, 6, 2, 8, dtype=I32)}, TypeError, f"`key` must be {STORED}, got int32."),
    (
        {"value": zeros(2, 6, 2, 16, dtype=jnp.int8)},
        TypeError,
        "`value` must be float32, got int8.",
    ),
    (
        {"key": zeros(6, 2, 8)},
        ValueError,
        "`key` must have shape [batch, kv_len, num_kv_heads, head_dim], got shape (6, 2, 8).",
    ),
    (
        {"key": zeros(2, 6, 2, 4)},
        ValueError,
        "`key` has head_dim=4 (shape (2, 6, 2, 4)), expected 8 from `query` (shape (2, 3, 4, 8)).",
    ),
    (
        {"value": zeros(2, 7, 2, 8)},
        ValueError,
        "`value` has kv_len=7 (shape (2, 7, 2, 8)), expected 6 from `key` (shape (2, 6, 2, 8)).",
    ),
    (
        {"mask": zeros(1, 1, 1, 1, dtype=bool)},
        ValueError,
        "`mask` has kv_len=1 (shape (1, 1, 1, 1)), expected 6 from `key` (shape (2, 6, 2, 8)).",
    ),
    (
        {"k_scale": zeros(2, 2)},
        ValueError,
        "`k_scale` must have shape [], [num_kv_heads] or [batch, kv_len, num_kv_heads], "
        "got (2, 2).",
    ),
    (
        {"k_scale": zeros(2, 6, 1)},
        ValueError,
        "`k_scale` has num_kv_heads=1 (shape (2, 6, 1)), expected 2 from `key` "
        "(shape (2, 6, 2, 8)).",
    ),
]

PAGES = [
    (
        {"layout": "NDH"},
        ValueError,
        "cache.layout must be 'NHD' or 'HND', got 'NDH'.",
    ),
    (
        {"cache": {"k_pages": zeros(5, 4, 2, 8, dtype=jnp.uint8)}},
        TypeError,
        f"`cache.k_pages` must be {STORED}, got uint8.",
    ),
    (
        {"cache": {"v_pages": zeros(5, 4, 2, 8, dtype=jnp.float8_e5m2)}},
        TypeError,
        "`cache.v_pages` must be float32, got float8_e5m2.",
    ),
    (
        {"cache": {"k_pages": None}},
        TypeError,
        "`cache.k_pages` must be an array, got NoneType.",
    ),
    (
        {"cache": {"k_pages": zeros(4, 2, 8)}},
        ValueError,
        "`cache.k_pages` must have shape [num_pages, page_size, num_kv_heads, head_dim], "
        "got shape (4, 2, 8).",
    ),
    (
        {"layout": "HND", "cache": {"v_pages": zeros(5, 3, 2, 8)}},
        ValueError,
        "`cache.v_pages` has num_kv_heads=3 (shape (5, 3, 2, 8)), expected 4 from "
        "`cache.k_pages` (shape (5, 4, 2, 8)).",
    ),
    (
        {"page_table": zeros(2, 3)},
        TypeError,
        "`page_table` must be int32, got float32.",
    ),
    (
        {"page_table": zeros(3, 3, dtype=I32)},
        ValueError,
        "`page_table` has batch=3 (shape (3, 3)), expected 2 from `query` (shape (2, 3, 4, 8)).",
    ),
    (
        {"cache": {"k_pages": zeros(0, 4, 2, 8), "v_pages": zeros(0, 4, 2, 8)}},
        ValueError,
        "`cache` has no pages, but `page_table` has max_pages > 0.",
    ),
    (
        {"bias": zeros(1, 1, 1, 6)},
        ValueError,
        "`bias` has kv_len=6 (shape (1, 1, 1, 6)), expected 12 from `page_table` times page_size.",
    ),
    (
        {"cache": LAYERS},
        ValueError,
        "`cache.k_pages` has a layer axis (shape (3, 5, 4, 2, 8)); give `layer`.",
    ),
    (
        {"layer": 0},
        ValueError,
        "`layer` is given, but `cache.k_pages` has no layer axis (shape (5, 4, 2, 8)).",
    ),
    ({"cache": LAYERS, "layer": 3}, ValueError, "layer=3 is outside the cache's 3 layers."),
    ({"cache": LAYERS, "layer": -1}, ValueError, "layer=-1 is outside the cache's 3 layers."),
    ({"cache": LAYERS, "layer": True}, TypeError, "`layer` must be an array, got bool."),
    ({"cache": LAYERS, "layer": zeros()}, TypeError, "`layer` must be int32, got float32."),
    (
        {"cache": LAYERS, "layer": zeros(1, dtype=I32)},
        ValueError,
        "`layer` must be a scalar, got shape (1,).",
    ),
    (
        {"cache": {"v_pages": LAYERS["v_pages"]}},
        ValueError,
        "`cache.v_pages` must have shape [num_pages, page_size, num_kv_heads, v_head_dim], "
        "got shape (3, 5, 4, 2, 16).",
    ),
    (
        {"k_scale": zeros(3, 2)},
        ValueError,
        "`cache.k_scale` must have shape [], [num_kv_heads] or "
        "[num_pages, page_size, num_kv_heads], got (3, 2).",
    ),
    (
        {"cache": LAYERS, "layer": 1, "k_scale": zeros(5, 4, 2)},
        ValueError,
        "`cache.k_scale` must have shape [], [num_kv_heads], [num_layers, num_kv_heads] or "
        "[num_layers, num_pages, page_size, num_kv_heads], got (5, 4, 2).",
    ),
    (
        {"layout": "HND", "k_scale": zeros(5, 2, 4)},
        ValueError,
        "`cache.k_scale` has num_kv_heads=2 (shape (5, 2, 4)), expected 4 from "
        "`cache.k_pages` (shape (5, 4, 2, 8)).",
    ),
]

MERGE = [
    (
        {"outs": [], "lses": []},
        ValueError,
        "`outs` and `lses` must list the same parts, at least one; got 0 and 0.",
    ),
    (
        {"lses": zeros(2, 2, 1, 4)},
        ValueError,
        "`outs` and `lses` must list the same parts, at least one; got 3 and 2.",
    ),
    (
        {"outs": zeros(3, 2, 1, 4, 8, dtype=I32)},
        TypeError,
        f"`outs[0]` must be {FLOATS}, got int32.",
    ),
    (
        {
            "outs": [zeros(2, 1, 4, 8), zeros(2, 1, 4, 8, dtype=jnp.bfloat16)],
            "lses": zeros(2, 2, 1, 4),
        },
        TypeError,
        "`outs[1]` must be float32, got bfloat16.",
    ),
    ({"outs": [1.0, 2.0, 3.0]}, TypeError, "`outs[0]` must be an array, got float."),
    (
        {"lses": zeros(3, 2, 1, 4, dtype=jnp.bfloat16)},
        TypeError,
        "`lses[0]` must be float32, got bfloat16.",
    ),
    (
        {"outs": zeros(3, 2, 4, 8)},
        ValueError,
        "`outs[0]` must have shape [batch, query_len, num_q_heads, v_head_dim], "
        "got shape (2, 4, 8).",
    ),
    (
        {"lses": zeros(3, 2, 4, 1)},
        ValueError,
        "`lses[0]` has query_len=4 (shape (2, 4, 1)), expected 1 from `outs[0]` "
        "(shape (2, 1, 4, 8)).",
    ),
    ({"sinks": zeros(4, dtype=I32)}, TypeError, f"`sinks` must be {FLOATS}, got int32."),
    (
        {"sinks": zeros(2)},
        ValueError,
        "`sinks` has num_q_heads=2 (shape (2,)), expected 4 from `outs[0]` (shape (2, 1, 4, 8)).",
    ),
]


def check(call, changes, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(**changes)


@pytest.mark.parametrize("call", [dense, paged])
@pytest.mark.parametrize("changes, error, message", SHARED, ids=lambda x: None)
def test_shared_arguments(call, changes, error, message):
    op, cache, keys = "split_kv_attention", "", "`key` (shape (2, 6, 2, 8))"
    if call is paged:
        op, cache, keys = "paged_attention", "cache.", "`cache.k_pages` (shape (5, 4, 2, 8))"
    check(
        call, changes, error, f"{op}: " + message.replace("{cache}", cache).replace("{keys}", keys)
    )


@pytest.mark.parametrize(
    "op, call, changes, error, message",
    [
        *(("split_kv_attention", dense, *case) for case in DENSE),
        *(("paged_attention", paged, *case) for case in PAGES),
        *(("merge_attention", merge, *case) for case in MERGE),
    ],
    ids=lambda x: None,
)
def test_arguments_of_one_operation(op, call, changes, error, message):
    check(call, changes, error, f"{op}: {message}")


def test_cache_of_another_type():
    message = "paged_attention: `cache` must be a PagedKVCache, got tuple."
    changes = {"cache": (CACHE["k_pages"], CACHE["v_pages"]), **PAGED}
    check(jax_attn.paged_attention, changes, TypeError, message)


def test_errors_come_at_trace_time():
    message = "split_kv_attention: `query` must have shape "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        jax.eval_shape(lambda x: dense(query=x), jax.ShapeDtypeStruct((2, 4, 8), F32))


def test_unmodified_arguments_are_accepted():
    # Otherwise a test above could fail for another reason than the one it names.
    assert dense().shape == paged().shape == paged(LAYERS, layer=2).shape == (2, 3, 4, 16)
    assert merge()[0].shape == (2, 1, 4, 8)
    assert paged(LAYERS, layer=np.int32(0)).shape == (2, 3, 4, 16)


ZEROS = [
    ({"num_pages": -1}, ValueError, "num_pages must be at least 0, got -1."),
    ({"page_size": 0}, ValueError, "page_size must be at least 1, got 0."),
    ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0."),
    ({"head_dim": 8.0}, TypeError, "head_dim must be int, got float."),
    ({"v_head_dim": 0}, ValueError, "v_head_dim must be at least 1, got 0."),
    ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0."),
    ({"num_layers": True}, TypeError, "num_layers must be int, got bool."),
    ({"layout": "DNH"}, ValueError, "layout must be 'NHD' or 'HND', got 'DNH'."),
    (
        {"dtype": jnp.int4},
        TypeError,
        "dtype must be one of float32, bfloat16, float16, int8, float8_e4m3fn, float8_e4m3fnuz, "
        "float8_e5m2, got int4.",
    ),
]

SLOTS = [
    ({"positions": [[0]]}, TypeError, "`positions` must be an array, got list."),
    ({"positions": zeros(2, 3)}, TypeError, "`positions` must be int32, got float32."),
    ({"page_table": zeros(2, 3)}, TypeError, "`page_table` must be int32, got float32."),
    (
        {"positions": zeros(2, dtype=I32)},
        ValueError,
        "`positions` must have shape [batch, num_tokens], got shape (2,).",
    ),
    (
        {"positions": zeros(3, 1, dtype=I32)},
        ValueError,
        "`positions` has batch=3 (shape (3, 1)), expected 2 from `page_table` (shape (2, 3)).",
    ),
]


@pytest.mark.parametrize("changes, error, message", ZEROS, ids=lambda x: None)
def test_cache_of_zeros(changes, error, message):
    sizes = {"num_pages": 2, "page_size": 4, "num_kv_heads": 1, "head_dim": 8}
    check(
        jax_attn.PagedKVCache.zeros, {**sizes, **changes}, error, f"PagedKVCache.zeros: {message}"
    )


@pytest.mark.parametrize("changes, error, message", SLOTS, ids=lambda x: None)
def test_slots(changes, error, message):
    valid = {"page_table": zeros(2, 3, dtype=I32), "positions": zeros(2, 1, dtype=I32)}
    slots = jax_attn.PagedKVCache.zeros(2, 4, 1, 8).slots
    check(slots, {**valid, **changes}, error, f"PagedKVCache.slots: {message}")


def test_allocator():
    pages = jax_attn.PageAllocator(4)
    pages.alloc(2)
    pages.share([1])
    for call, argument, error, message in [
        (jax_attn.PageAllocator, -1, ValueError, ": num_pages must be at least 0, got -1."),
        (jax_attn.PageAllocator, 2.0, TypeError, ": num_pages must be int, got float."),
        (pages.alloc, -1, ValueError, ".alloc: num_pages must be at least 0, got -1."),
        (pages.alloc, 3, MemoryError, ".alloc: 3 pages wanted, 2 of 4 are free."),
        (pages.share, [0, 3], ValueError, ".share: page 3 is not in use."),
        (pages.share, [4], ValueError, ".share: page 4 is outside the pool of 4 pages."),
        (pages.share, [0.5], TypeError, ".share: `pages` must be integers, got float64."),
        (pages.free, [-1], ValueError, ".free: page -1 is outside the pool of 4 pages."),
        (pages.free, [2], ValueError, ".free: page 2 is not in use."),
        (
            pages.free,
            [0, 1, 1, 0],
            ValueError,
            ".free: page 0 is freed more often than it is used.",
        ),
        (pages.free, [0.5], TypeError, ".free: `pages` must be integers, got float64."),
    ]:
        with pytest.raises(error, match=f"^PageAllocator{re.escape(message)}$"):
            call(argument)
