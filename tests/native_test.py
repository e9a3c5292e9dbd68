# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels in every variant, their handler, and what they read."""

import ctypes
import dataclasses
import functools
import mmap
import resource
import signal
import subprocess
import sys

import fuzz_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_attn
from jax_attn._src import registration
from jax_attn._src.split_kv_attention import primitive

pytestmark = pytest.mark.skipif(
    "cpu" not in jax_attn.platforms(), reason="this build of jax_attn has no kernels for the CPU"
)

VARIANTS = jax_attn.ffi.variants("cpu") if "cpu" in jax_attn.platforms() else []
CAPABILITIES = [
    row
    for row in jax_attn.ffi.capabilities()
    if (row["op"], row["platform"]) == ("split_kv_attention", "cpu")
]
TARGET = "jax_attn_split_kv_attention"
F32_ULP = 2.0**-23


def use_variant(variant, patch):
    """Makes all calls use a variant of the kernel."""
    attend = primitive.attend

    def attend_with(operands, options):
        return attend(operands, dataclasses.replace(options, variant=variant))

    patch.setattr(primitive, "attend", attend_with)


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    use_variant(request.param, monkeypatch)
    return request.param


attend = functools.partial(
    jax_attn.split_kv_attention, return_lse=True, implementation="native", scale=1.0
)


# ---- Variants


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(10_000, 10_030))
def test_variant_solves_random_problem(variant, seed):
    fuzz_test.random_problem(seed).check("native")


@pytest.mark.parametrize("cache_dtype", (*support.FLOATS, *support.QUANTIZED))
@pytest.mark.parametrize("head_dim", [8, 24, 80, 512])
def test_variant_reads_every_dtype(variant, cache_dtype, head_dim):
    problem = support.dense(
        np.random.default_rng(head_dim),
        query_len=3,
        num_q_heads=6,
        head_dim=head_dim,
        v_head_dim=head_dim + 8 if head_dim < 512 else 8,
        kv_len=75,
        cache_dtype=cache_dtype,
        lengths=[75, 38],
        num_splits=2,
    )
    problem.check("native")


def test_the_portable_variant_is_there_and_last():
    assert VARIANTS[-1] == "portable"
    assert len(set(VARIANTS)) == len(VARIANTS)


def test_no_variant_means_the_best(monkeypatch):
    problem = fuzz_test.random_problem(10_001)
    best = problem.run("native")
    use_variant(VARIANTS[0], monkeypatch)
    for expected, actual in zip(best, problem.run("native"), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_unknown_variant(monkeypatch):
    use_variant("sse9", monkeypatch)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*'sse9' cannot"):
        support.dense(np.random.default_rng(0)).run("native")


# ---- Inconsistent buffers


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, jnp.dtype(dtype))


LENGTHS, TABLE, LAYER = zeros(2, dtype="int32"), zeros(2, 3, dtype="int32"), zeros(dtype="int32")
DENSE = {"query": zeros(2, 3, 4, 8), "key": zeros(2, 6, 2, 8), "value": zeros(2, 6, 2, 16)}
PAGED = {
    "query": DENSE["query"],
    "key": zeros(5, 4, 2, 8),
    "value": zeros(5, 4, 2, 16),
    "rest": {"page_table": TABLE},
    "page_layout": np.int32(1),
}
LAYERS = {**PAGED, "key": zeros(7, 5, 4, 2, 8), "value": zeros(7, 5, 4, 2, 16)}
HND = {
    **PAGED,
    "key": zeros(5, 2, 4, 8),
    "value": zeros(5, 2, 4, 16),
    "page_layout": np.int32(2),
}


def call_handler(
    query, key, value, rest=(), operands=None, out=None, lse=None, workspace=None, **attributes
):
    """Calls the handler with consistent results and attributes, except those that are given."""
    rest = dict(rest)
    if out is None:
        out = jax.ShapeDtypeStruct((*query.shape[:-1], 16), query.dtype)
    if lse is None:
        lse = jax.ShapeDtypeStruct(out.shape[:-1], jnp.float32)
    if workspace is None:
        workspace = jax.ShapeDtypeStruct((4096,), jnp.float32)
    attributes = {
        "operands": ",".join(rest) if operands is None else operands,
        "variant": "",
        "scale": np.float32(1),
        "causal": np.int32(0),
        "sliding_window": np.int64(0),
        "logits_soft_cap": np.float32(0),
        "num_splits": np.int64(0),
        "split_size": np.int64(0),
        "lse_includes_sinks": True,
        "page_layout": np.int32(0),
        "k_scale_rank": np.int32(0),
        "v_scale_rank": np.int32(0),
        **attributes,
    }
    attributes = {name: value for name, value in attributes.items() if value is not None}
    jax_attn.ffi.register()
    call = jax.ffi.ffi_call(TARGET, (out, lse, workspace))
    return jax.block_until_ready(call(query, key, value, *rest.values(), **attributes))


def struct(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


RANGE = "1099511627776"
SCALE_SHAPE = r"a scalar, \[num_kv_heads\], or that of key without head_dim"

# What disagrees with DENSE, and the message after the name of the operation.
DENSE_ERRORS = {
    "causal_high": ({"causal": np.int32(7)}, "causal is 7, expected 0 to 2"),
    "causal_low": ({"causal": np.int32(-1)}, "causal is -1, expected 0 to 2"),
    "window": (
        {"sliding_window": np.int64(-1)},
        f"sliding_window is -1, expected 0 to {RANGE}",
    ),
    "num_splits": ({"num_splits": np.int64(-2)}, f"num_splits is -2, expected 0 to {RANGE}"),
    "split_size": ({"split_size": np.int64(-2)}, f"split_size is -2, expected 0 to {RANGE}"),
    "page_layout": ({"page_layout": np.int32(3)}, "page_layout is 3, expected 0 to 2"),
    "k_scale_rank": ({"k_scale_rank": np.int32(5)}, "k_scale_rank is 5, expected 0 to 4"),
    "v_scale_rank": ({"v_scale_rank": np.int32(-1)}, "v_scale_rank is -1, expected 0 to 4"),
    "variant": ({"variant": "mmx"}, "variant 'mmx' cannot run here"),
    "out_rank": (
        {"out": struct(3, 4, 16), "lse": struct(3, 4)},
        r"out has shape \[3, 4, 16\], expected \[batch..., query_len, num_q_heads, v_head_dim\]",
    ),
    "out_rank_0": ({"out": struct(), "lse": struct()}, r"out has shape \[\], expected"),
    "out_rank_12": (
        {"out": struct(*[1] * 8, 2, 3, 4, 16)},
        r"out has shape \[1, 1, 1, 1, 1, 1, 1, 1, 2, 3, 4, 16\], expected",
    ),
    "out_dtype": ({"out": struct(2, 3, 4, 16, dtype="bfloat16")}, "query and out differ in type"),
    "lse_shape": (
        {"lse": struct(2, 3, 5)},
        r"lse has shape \[2, 3, 5\], expected that of out without v_head_dim",
    ),
    "lse_rank": ({"lse": struct(2, 12)}, r"lse has shape \[2, 12\], expected that of out"),
    "lse_dtype": (
        {"lse": struct(2, 3, 4, dtype="bfloat16")},
        "lse has an element type that is not expected",
    ),
    "workspace": (
        {"workspace": struct(7)},
        "workspace has 7 floats, expected at least [0-9]+",
    ),
    "no_workspace": ({"workspace": struct(0)}, "workspace has 0 floats, expected at least"),
    "query_rank": (
        {"query": zeros(3, 4, 8), "out": struct(2, 3, 4, 16)},
        r"query has shape \[3, 4, 8\], expected \[batch, query_len, num_q_heads, head_dim\]",
    ),
    "query_len": (
        {"query": zeros(2, 5, 4, 8), "out": struct(2, 3, 4, 16)},
        r"query has shape \[2, 5, 4, 8\], expected query_len and num_q_heads of out",
    ),
    "query_heads": (
        {"query": zeros(2, 3, 2, 8), "out": struct(2, 3, 4, 16)},
        r"query has shape \[2, 3, 2, 8\], expected query_len and num_q_heads of out",
    ),
    "query_batch": (
        {"query": zeros(1, 3, 4, 8), "out": struct(2, 3, 4, 16)},
        r"query has shape \[1, 3, 4, 8\], expected batch dimensions that agree with out",
    ),
    "query_vmap": (
        {"query": zeros(9, 2, 3, 4, 8), "out": struct(2, 3, 4, 16)},
        r"query has shape \[9, 2, 3, 4, 8\], expected at most 4 dimensions",
    ),
    "query_dtype": (
        {"query": zeros(2, 3, 4, 8, dtype="int32")},
        "out has an element type that is not supported",
    ),
    "query_quantized": (
        {"query": zeros(2, 3, 4, 8, dtype="int8")},
        "query dtype int8 is not one of float32, bfloat16, float16",
    ),
    "query_complex": (
        {"query": zeros(2, 3, 4, 8, dtype="complex64")},
        "out has an element type that is not supported",
    ),
    "head_dim": (
        {"query": zeros(2, 3, 4, 16)},
        r"key has shape \[2, 6, 2, 8\], expected head_dim of query",
    ),
    "odd_head_dim": (
        {"query": zeros(2, 3, 4, 12), "key": zeros(2, 6, 2, 12)},
        "head_dim 12 is not a multiple of 8 up to 512",
    ),
    "key_rank": (
        {"key": zeros(6, 2, 8)},
        r"key has shape \[6, 2, 8\], expected at least 4 dimensions",
    ),
    "key_rank_0": ({"key": zeros()}, r"key has shape \[\], expected at least 4 dimensions"),
    "key_heads": (
        {"key": zeros(2, 6, 3, 8)},
        r"key has shape \[2, 6, 3, 8\], expected num_kv_heads that divides num_q_heads=4",
    ),
    "key_no_heads": (
        {"key": zeros(2, 6, 0, 8), "value": zeros(2, 6, 0, 16)},
        r"key has shape \[2, 6, 0, 8\], expected num_kv_heads that divides num_q_heads=4",
    ),
    "key_batch": (
        {"key": zeros(3, 6, 2, 8), "value": zeros(3, 6, 2, 16)},
        r"key has shape \[3, 6, 2, 8\], expected batch dimensions that agree with out: 3 is not 2",
    ),
    "key_dtype": (
        {"key": zeros(2, 6, 2, 8, dtype="int32")},
        "key has an element type that is not supported",
    ),
    "value_rank": (
        {"value": zeros(6, 2, 16)},
        r"value has shape \[6, 2, 16\], expected",
    ),
    "value_len": (
        {"value": zeros(2, 7, 2, 16)},
        r"value has shape \[2, 7, 2, 16\], expected that of key, with v_head_dim of out",
    ),
    "value_head_dim": (
        {"value": zeros(2, 6, 2, 8)},
        r"value has shape \[2, 6, 2, 8\], expected that of key, with v_head_dim of out",
    ),
    "value_batch": (
        {"value": zeros(1, 6, 2, 16)},
        r"value has shape \[1, 6, 2, 16\], expected batch dimensions",
    ),
    "value_dtype": (
        {"value": zeros(2, 6, 2, 16, dtype="float16")},
        "key and value differ in type",
    ),
    "missing": ({"operands": "kv_lengths"}, "kv_lengths is missing"),
    "one_missing": (
        {"rest": {"kv_lengths": LENGTHS}, "operands": "kv_lengths,sinks"},
        "sinks is missing",
    ),
    "extra": (
        {"rest": {"kv_lengths": LENGTHS}, "operands": ""},
        "there are more arguments than names in `operands`",
    ),
    "unknown": ({"rest": {"lengths": LENGTHS}}, "there is no operand called lengths"),
    "not_optional": ({"rest": {"query": LENGTHS}}, "there is no operand called query"),
    "comma": (
        {"rest": {"kv_lengths": LENGTHS}, "operands": ",kv_lengths"},
        "there is no operand called |kv_lengths is missing",
    ),
    "lengths_shape": (
        {"rest": {"kv_lengths": zeros(3, dtype="int32")}},
        r"kv_lengths has shape \[3\], expected batch dimensions that agree with out: 3 is not 2",
    ),
    "lengths_rank": (
        {"rest": {"kv_lengths": LAYER}},
        r"kv_lengths has shape \[\], expected",
    ),
    "lengths_dtype": (
        {"rest": {"kv_lengths": zeros(2)}},
        "kv_lengths has an element type that is not expected",
    ),
    "bias_shape": (
        {"rest": {"bias": zeros(2, 4, 2, 6)}},
        r"bias has shape \[2, 4, 2, 6\], expected \[batch, 4, 3, 6\], or 1 for the first three",
    ),
    "bias_keys": (
        {"rest": {"bias": zeros(2, 4, 3, 1)}},
        r"bias has shape \[2, 4, 3, 1\], expected \[batch, 4, 3, 6\]",
    ),
    "bias_batch": (
        {"rest": {"bias": zeros(3, 4, 3, 6)}},
        r"bias has shape \[3, 4, 3, 6\], expected batch dimensions",
    ),
    "bias_rank": ({"rest": {"bias": zeros(6)}}, r"bias has shape \[6\], expected \[batch, 4"),
    "bias_dtype": (
        {"rest": {"bias": zeros(2, 4, 3, 6, dtype="int8")}},
        "bias has an element type that is not supported",
    ),
    "mask_dtype": (
        {"rest": {"mask": zeros(2, 4, 3, 6)}},
        "mask has an element type that is not expected",
    ),
    "mask_shape": (
        {"rest": {"mask": zeros(2, 3, 3, 6, dtype="bool")}},
        r"mask has shape \[2, 3, 3, 6\], expected \[batch, 4, 3, 6\]",
    ),
    "sinks": (
        {"rest": {"sinks": zeros(2)}},
        r"sinks has shape \[2\], expected num_q_heads=4",
    ),
    "sinks_rank": ({"rest": {"sinks": zeros()}}, r"sinks has shape \[\], expected num_q_heads=4"),
    "alibi_dtype": (
        {"rest": {"alibi_slopes": zeros(4, dtype="bfloat16")}},
        "alibi_slopes has an element type that is not expected",
    ),
    "k_scale_heads": (
        {"rest": {"k_scale": zeros(4)}, "k_scale_rank": np.int32(1)},
        rf"k_scale has shape \[4\], expected {SCALE_SHAPE}",
    ),
    "k_scale_rank_2": (
        {"rest": {"k_scale": zeros(7, 2)}, "k_scale_rank": np.int32(2)},
        rf"k_scale has shape \[7, 2\], expected {SCALE_SHAPE}",
    ),
    "k_scale_lacks_rank": (
        {"rest": {"k_scale": zeros(2)}, "k_scale_rank": np.int32(3)},
        rf"k_scale has shape \[2\], expected {SCALE_SHAPE}",
    ),
    "v_scale_tokens": (
        {"rest": {"v_scale": zeros(2, 5, 2)}, "v_scale_rank": np.int32(3)},
        rf"v_scale has shape \[2, 5, 2\], expected {SCALE_SHAPE}",
    ),
    "v_scale_batch": (
        {"rest": {"v_scale": zeros(3, 6, 2)}, "v_scale_rank": np.int32(3)},
        r"v_scale has shape \[3, 6, 2\], expected batch dimensions",
    ),
    "v_scale_dtype": (
        {"rest": {"v_scale": zeros(dtype="float16")}},
        "v_scale has an element type that is not expected",
    ),
    "table_without_layout": (
        {"rest": {"page_table": TABLE}},
        "page_table is given, but page_layout is 0",
    ),
}

# The same for PAGED.
PAGED_ERRORS = {
    "no_table": ({"rest": {}}, "page_table is missing"),
    "table_rank": (
        {"rest": {"page_table": LENGTHS}},
        r"page_table has shape \[2\], expected \[batch, max_pages\]",
    ),
    "table_batch": (
        {"rest": {"page_table": zeros(3, 3, dtype="int32")}},
        r"page_table has shape \[3, 3\], expected batch dimensions",
    ),
    "table_dtype": (
        {"rest": {"page_table": zeros(2, 3)}},
        "page_table has an element type that is not expected",
    ),
    "no_pages": (
        {"key": zeros(0, 4, 2, 8), "value": zeros(0, 4, 2, 16)},
        "there are no pages, but page_table lists some",
    ),
    "no_page_size": (
        {"key": zeros(5, 0, 2, 8), "value": zeros(5, 0, 2, 16)},
        r"key has shape \[5, 0, 2, 8\], expected a page_size of at least 1",
    ),
    "layout": (
        # The heads are where page_size was.
        {"page_layout": np.int32(2), "key": zeros(5, 3, 2, 8), "value": zeros(5, 3, 2, 16)},
        r"key has shape \[5, 3, 2, 8\], expected num_kv_heads that divides num_q_heads=4",
    ),
    "value_pages": (
        {"value": zeros(6, 4, 2, 16)},
        r"value has shape \[6, 4, 2, 16\], expected that of key",
    ),
    "pages_vmap": (
        {"key": zeros(7, 5, 4, 2, 8), "value": zeros(7, 5, 4, 2, 16)},
        r"key has shape \[7, 5, 4, 2, 8\], expected at most 4 dimensions",
    ),
    "layer_without_axis": (
        {"rest": {"page_table": TABLE, "layer": LAYER}},
        r"key has shape \[5, 4, 2, 8\], expected a layer axis",
    ),
    "layer_is_missing": (
        {**LAYERS, "operands": "page_table,layer"},
        "layer is missing",
    ),
    "no_layers": (
        {
            "key": zeros(0, 5, 4, 2, 8),
            "value": zeros(0, 5, 4, 2, 16),
            "rest": {"page_table": TABLE, "layer": LAYER},
        },
        r"key has shape \[0, 5, 4, 2, 8\], expected at least one layer",
    ),
    "layer_rank": (
        {**LAYERS, "rest": {"page_table": TABLE, "layer": LENGTHS}},
        r"layer has shape \[2\], expected at most 0 dimensions",
    ),
    "layer_dtype": (
        {**LAYERS, "rest": {"page_table": TABLE, "layer": zeros()}},
        "layer has an element type that is not expected",
    ),
    "scale_layers": (
        {
            **LAYERS,
            "rest": {"page_table": TABLE, "layer": LAYER, "k_scale": zeros(6, 2)},
            "k_scale_rank": np.int32(2),
        },
        rf"k_scale has shape \[6, 2\], expected {SCALE_SHAPE}",
    ),
    "scale_tokens": (
        {
            "rest": {"page_table": TABLE, "v_scale": zeros(5, 2, 4)},
            "v_scale_rank": np.int32(3),
        },
        rf"v_scale has shape \[5, 2, 4\], expected {SCALE_SHAPE}",
    ),
    "bias_len": (
        {"rest": {"page_table": TABLE, "bias": zeros(1, 1, 1, 11)}},
        r"bias has shape \[1, 1, 1, 11\], expected \[batch, 4, 3, 12\]",
    ),
}


@pytest.mark.parametrize(
    "base, changes, message",
    [
        pytest.param(base, *case, id=f"{kind}-{name}")
        for kind, base, cases in (("dense", DENSE, DENSE_ERRORS), ("paged", PAGED, PAGED_ERRORS))
        for name, case in cases.items()
    ],
)
def test_handler_refuses(base, changes, message):
    text = f"^INVALID_ARGUMENT: split_kv_attention: ({message})"
    with pytest.raises(jax.errors.JaxRuntimeError, match=text):
        call_handler(**{**base, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": None},
        # Programs are cached by attributes, for which 0 and 0.0 are equal.
        {"scale": np.int32(3)},
        {"causal": np.float32(0.5)},
        {"operands": np.int32(0)},
        {"another": np.int32(0)},
        {"workspace": struct(64, 64)},
        {"workspace": struct(4096, dtype="int32")},
    ],
    ids=repr,
)
def test_xla_refuses(changes):
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"^INVALID_ARGUMENT"):
        call_handler(**{**DENSE, **changes})


@pytest.mark.parametrize("base", [DENSE, PAGED, HND], ids=["dense", "nhd", "hnd"])
def test_handler_takes_consistent_buffers(base):
    out, lse, _ = call_handler(**base)
    keys = 6 if base is DENSE else 12
    np.testing.assert_array_equal(out, np.zeros((2, 3, 4, 16)))
    np.testing.assert_allclose(lse, np.full((2, 3, 4), np.log(keys)), rtol=1e-6)


@pytest.mark.parametrize(
    "base, changes, lse",
    [
        (DENSE, {"query": zeros(0, 3, 4, 8), "key": zeros(0, 6, 2, 8)}, None),
        (DENSE, {"query": zeros(2, 0, 4, 8)}, None),
        (DENSE, {"query": zeros(2, 3, 0, 8)}, None),
        (DENSE, {"key": zeros(2, 0, 2, 8), "value": zeros(2, 0, 2, 16)}, -np.inf),
        (PAGED, {"rest": {"page_table": TABLE[:, :0]}}, -np.inf),
        (
            PAGED,
            {
                "rest": {"page_table": TABLE[:, :0]},
                "key": zeros(0, 4, 2, 8),
                "value": zeros(0, 4, 2, 16),
            },
            -np.inf,
        ),
        (PAGED, {"query": zeros(0, 3, 4, 8), "rest": {"page_table": TABLE[:0]}}, None),
    ],
    ids=["batch", "query_len", "q_heads", "kv_len", "max_pages", "pages", "paged_batch"],
)
def test_handler_takes_empty_buffers(base, changes, lse):
    base = {**base, **changes}
    if base["key"].shape[0] == 0 and base["query"].shape[0] == 0:
        base["value"] = zeros(0, 6, 2, 16)
    out, actual, _ = call_handler(**base)
    np.testing.assert_array_equal(out, np.zeros(out.shape))
    if lse is None:
        assert actual.size == 0
    else:
        np.testing.assert_array_equal(actual, np.full(actual.shape, lse, np.float32))


def test_workspace_of_the_stated_size_is_enough_and_less_is_not():
    sizes = {"query_len": 3, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 16}
    size = jax_attn.ffi.split_kv_workspace_size("cpu", batch=2, kv_len=6, num_splits=1, **sizes)
    call_handler(**DENSE, num_splits=np.int64(1), workspace=struct(size))
    # A smaller one is used with fewer threads, down to one.
    with pytest.raises(jax.errors.JaxRuntimeError, match="expected at least"):
        call_handler(**DENSE, num_splits=np.int64(1), workspace=struct(size // 64))


# ---- The capability table


def dtypes_of(row):
    for query_dtype in row["query_dtypes"]:
        for cache_dtype in row["cache_dtypes"]:
            yield query_dtype, cache_dtype


def head_dims_of(row):
    """Head sizes at the edges of the table, and the neighbours that it does not have."""
    step, top = row["head_dim_multiple"], row["max_head_dim"]
    accepted = (step, 2 * step, top - step, top)
    refused = (step - 1, step + 1, top - 1, top + 1, top + step)
    return accepted, refused


TABLE_DTYPES = [
    pytest.param(row, *pair, id="-".join((row["op"], *pair)))
    for row in CAPABILITIES
    for pair in dtypes_of(row)
]
TABLE_HEAD_DIMS = [
    pytest.param(row, size, accepted, id=f"{row['op']}-{size}")
    for row in CAPABILITIES
    for accepted, sizes in zip((True, False), head_dims_of(row), strict=True)
    for size in sizes
]


def lower(implementation, query_dtype="float32", cache_dtype="float32", **sizes):
    """The program of a call."""
    head_dim, v_head_dim = sizes.get("head_dim", 64), sizes.get("v_head_dim", 64)
    query = struct(1, 1, 2, head_dim, dtype=query_dtype)
    key = struct(1, 4, 1, head_dim, dtype=cache_dtype)
    value = struct(1, 4, 1, v_head_dim, dtype=cache_dtype)
    call = functools.partial(jax_attn.split_kv_attention, implementation=implementation)
    return jax.jit(call).lower(query, key, value).as_text()


@pytest.mark.parametrize("row, query_dtype, cache_dtype", TABLE_DTYPES)
def test_table_accepts_dtypes(row, query_dtype, cache_dtype):
    assert TARGET in lower("native", query_dtype, cache_dtype)


def test_table_names_all_dtypes_that_the_op_takes():
    for row in CAPABILITIES:
        assert sorted(row["query_dtypes"]) == sorted(support.FLOATS)
        assert sorted(row["cache_dtypes"]) == sorted(support.FLOATS + support.QUANTIZED)


@pytest.mark.parametrize("which", ["head_dim", "v_head_dim"])
@pytest.mark.parametrize("row, size, accepted", TABLE_HEAD_DIMS)
def test_table_head_dims(row, size, accepted, which):
    if accepted:
        assert TARGET in lower("native", **{which: size})
        return
    reason = (
        f"head_dim {size} is not a multiple of {row['head_dim_multiple']} "
        f"up to {row['max_head_dim']}"
    )
    with pytest.raises(NotImplementedError, match=f'implementation="native".*: {reason}\\. Use'):
        lower("native", **{which: size})
    assert TARGET not in lower(None, **{which: size})


@pytest.mark.parametrize("row", CAPABILITIES, ids=lambda row: row["op"])
def test_refused_dtypes_have_reasons(row):
    # The public function refuses these first, with errors of its own.
    module = registration.native_module(row["platform"])

    def refusal(query_dtype, cache_dtype, depth=1):
        return module.refusal(
            row["op"],
            query_dtype=query_dtype,
            cache_dtype=cache_dtype,
            head_dim=64,
            v_head_dim=64,
            num_batch_dims=depth,
        )

    accepted = ", ".join(row["query_dtypes"])
    for dtype in set(row["cache_dtypes"]) - set(row["query_dtypes"]):
        assert refusal(dtype, dtype) == f"query dtype {dtype} is not one of {accepted}"
    for pair in dtypes_of(row):
        assert refusal(*pair) == ""
    with pytest.raises(ValueError, match="no such dtype: float64"):
        refusal("float64", "float32")
    depth = next(d for d in range(1, 100) if refusal("float32", "float32", d))
    assert refusal("float32", "float32", depth) == (
        f"vmap is nested {depth - 1} deep, at most {depth - 2} is supported"
    )


def test_a_refused_case_falls_back_to_the_reference():
    problem = support.dense(np.random.default_rng(0), head_dim=12, kv_len=9)
    problem.check(None)


# ---- Functions inside the kernels


def test_exp_is_accurate_over_its_range(variant):
    # Against a key with logit 0, one with logit x has the probability 1 / (1 + e^-x).
    x = np.concatenate(
        [
            np.linspace(-200, 200, 20_001),
            np.linspace(-1, 1, 10_001),
            np.linspace(-88, -86, 2_001),
            np.array([0.0, -0.0, 1e-30, -1e-30, -103.9, -104.1]),
        ]
    ).astype(np.float32)
    query = np.zeros((1, len(x), 1, 8), np.float32)
    query[0, :, 0, 0] = x
    key = np.zeros((1, 2, 1, 8), np.float32)
    key[0, 1, 0, 0] = 1
    value = np.zeros((1, 2, 1, 8), np.float32)
    value[0, np.arange(2), 0, np.arange(2)] = 1
    out, lse = attend(*map(jnp.asarray, (query, key, value)))
    out = np.asarray(out, np.float64)[0, :, 0]
    wide = x.astype(np.float64)
    for probability, exponent in ((out[:, 1], wide), (out[:, 0], -wide)):
        expected = np.exp(-np.logaddexp(0, -exponent))
        # 2 ulp of exp, and one each of the sum, the quotient and the product with it; the
        # exponent in base 2 is rounded, which costs more the larger it is.
        bound = expected * F32_ULP * (5 + np.abs(wide))
        normal = exponent > -87.2
        assert np.all(np.abs(probability - expected)[normal] <= bound[normal])
        # Below the normal range of float32 it is 0.
        assert np.all(probability[exponent < -87.4] == 0)
        assert np.all((probability >= 0) & (probability <= 1))
    np.testing.assert_allclose(
        np.asarray(lse, np.float64)[0, :, 0], np.logaddexp(0, wide), rtol=4 * F32_ULP, atol=1e-7
    )


@pytest.mark.parametrize("cap", [2.0**-10, 0.5, 1.0, 30.0, 2.0**20])
def test_tanh_is_accurate_over_its_range(variant, cap):
    # With one key, the log-sum-exp is its logit.
    size = np.concatenate([np.geomspace(1e-30, 100, 20_000), np.linspace(0.6, 0.65, 5_000)])
    x = np.concatenate([-size, [-0.0, 0.0], size]).astype(np.float32)
    query = np.zeros((1, len(x), 1, 8), np.float32)
    query[0, :, 0, 3] = x * np.float32(cap)
    key = np.zeros((1, 1, 1, 8), np.float32)
    key[..., 3] = 1
    _, lse = attend(*map(jnp.asarray, (query, key, key)), logits_soft_cap=cap)
    actual = np.asarray(lse, np.float64)[0, :, 0]
    expected = cap * np.tanh(query[0, :, 0, 3].astype(np.float64) / cap)
    # 3e-7 of tanh itself; its argument, the cap and the change of base and back round 5 times.
    bound = (3e-7 + 5 * F32_ULP / 2) * np.abs(expected) + 1e-37
    assert np.all(np.abs(actual - expected) <= bound)
    assert np.all(np.abs(actual) <= cap * (1 + 2 * F32_ULP))


@pytest.mark.parametrize("cap", [1.0, 50.0])
def test_tanh_of_huge_logits(variant, cap):
    x = np.array([1e30, -1e30, 3e38, -3e38], np.float32)
    query = np.zeros((1, 4, 1, 8), np.float32)
    query[0, :, 0, 0] = x
    key = np.zeros((1, 1, 1, 8), np.float32)
    key[..., 0] = 1
    _, lse = attend(*map(jnp.asarray, (query, key, key)), logits_soft_cap=cap)
    np.testing.assert_allclose(lse[0, :, 0], np.sign(x) * cap, rtol=3 * F32_ULP)


# ---- Stored formats

CODES = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("dtype", support.QUANTIZED)
def test_every_code_of_a_value(variant, dtype):
    # One key has weight 1, so the output is the value. Three orders put codes in other lanes.
    rng = np.random.default_rng(0)
    codes = np.stack([CODES, CODES[::-1], rng.permutation(CODES)])
    values = codes.view(jnp.dtype(dtype))[:, None, None, :]
    key = np.zeros((3, 1, 1, 8), values.dtype)
    query = np.zeros((3, 1, 1, 8), np.float32)
    for factor in (1.0, 0.375):
        out, _ = attend(*map(jnp.asarray, (query, key, values)), v_scale=jnp.float32(factor))
        expected = values.astype(np.float32) * np.float32(factor)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", support.QUANTIZED)
def test_every_code_of_a_key(variant, dtype):
    # One key, and a query that picks one of its elements: the log-sum-exp is that element.
    position = (CODES * 7) % 24
    key = np.zeros((256, 1, 1, 24), jnp.dtype(dtype))
    key[CODES, 0, 0, position] = CODES.view(key.dtype)
    query = np.zeros((256, 1, 1, 24), np.float32)
    query[CODES, 0, 0, position] = 1
    value = np.zeros((256, 1, 1, 8), key.dtype)
    _, lse = attend(*map(jnp.asarray, (query, key, value)))
    expected = CODES.view(key.dtype).astype(np.float32)
    actual = np.asarray(lse)[:, 0, 0]
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    # To base 2 and back: at most two roundings, where neighbours are 2**-4 apart.
    np.testing.assert_allclose(actual, expected, rtol=2 * F32_ULP)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_code_of_16_bits(variant, dtype):
    codes = np.arange(2**16, dtype=np.uint16).reshape(128, 1, 1, 512)
    values = codes.view(jnp.dtype(dtype))
    # XLA's threads flush subnormal float32 numbers, and bfloat16 has the same range.
    values = np.where(np.abs(values.astype(np.float32)) < 2.0**-126, 0, values).astype(dtype)
    key, query = np.zeros((128, 1, 1, 8), values.dtype), np.zeros((128, 1, 1, 8), np.float32)
    out, _ = attend(*map(jnp.asarray, (query, key, values)))
    np.testing.assert_array_equal(out, values.astype(np.float32))
    # The same numbers as queries and as outputs, which are rounded.
    out, _ = attend(*map(jnp.asarray, (query.astype(values.dtype), key, values)))
    assert out.dtype == values.dtype
    np.testing.assert_array_equal(out.astype(jnp.float32), values.astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_outputs_round_to_nearest_even(variant, dtype):
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(dtype)
    grid = np.arange(2**15, dtype=np.uint16).view(dtype).astype(np.float32)
    grid = grid[np.isfinite(grid)]
    halves = ((grid[1:].astype(np.float64) + grid[:-1]) / 2).astype(np.float32)
    near = [halves, np.nextafter(halves, np.float32(np.inf)), np.nextafter(halves, np.float32(0))]
    overflow = np.array([65519, 65520, 65536, 1e38, 3.4e38, 1e-8, 2e-8, 4e-8], np.float32)
    x = np.concatenate([*near, overflow, rng.standard_normal(512).astype(np.float32)])
    x = x[(np.abs(x) >= 2.0**-126) | (x == 0)]  # weights times subnormals may be flushed
    x = np.resize(np.concatenate([x, -x]), (-(-2 * len(x) // 512), 1, 1, 512))
    key, query = np.zeros((len(x), 1, 1, 8), np.float32), np.zeros((len(x), 1, 1, 8), dtype)
    out, _ = attend(*map(jnp.asarray, (query, key, x)))
    with np.errstate(over="ignore"):
        expected = x.astype(dtype)
    np.testing.assert_array_equal(np.asarray(out).view(np.uint16), expected.view(np.uint16))


# ---- What is read


def lazy_memory(nbytes):
    """Bytes at the start of a page of memory, which become resident where they are touched."""
    no_reserve = 0x4000  # MAP_NORESERVE, which Python 3.11 does not name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=flags), np.uint8)


def without_copy(array):
    """The same memory as a JAX array."""
    shared = jax.dlpack.from_dlpack(array)
    assert shared.unsafe_buffer_pointer() == array.ctypes.data
    return shared


def forbid(array, where):
    """Makes every read of an array's bytes from `where[0]` to `where[1]` crash the process."""
    begin, end = where
    assert begin % mmap.PAGESIZE == 0 and end % mmap.PAGESIZE == 0
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    address = ctypes.c_void_p(array.ctypes.data + begin)
    assert protect(address, ctypes.c_size_t(end - begin), 0) == 0, ctypes.get_errno()


def attend_guarded(unread, **options):
    """Attends to 2 contexts of 64 tokens, a page of memory each.

    Args:
      unread: `(sequence, first token, last token + 1)` of each part that must not be read.
      **options: Of the operation.
    """
    head_dim = 64
    heads = mmap.PAGESIZE // 4 // head_dim
    shape = (2, 64, heads, head_dim)
    arrays = []
    for fill in (0.0, 1.0):
        array = lazy_memory(4 * int(np.prod(shape))).view(np.float32).reshape(shape)
        array[...] = fill
        arrays.append(without_copy(array))
        for sequence, begin, end in unread:
            start = sequence * 64 * mmap.PAGESIZE
            forbid(array, (start + begin * mmap.PAGESIZE, start + end * mmap.PAGESIZE))
    query = jnp.ones((2, 2, heads, head_dim))
    out, _ = attend(query, *arrays, **options)
    out = np.asarray(out)
    assert np.all((np.abs(out - 1) < 1e-6) | (out == 0)), options


def guards():
    """Cases of `attend_guarded`: lengths, causal, window and mask."""
    mask = np.zeros((2, 1, 1, 64), bool)
    mask[0, ..., 7:9] = mask[1, ..., 50] = True
    per_head = np.zeros((2, 16, 2, 64), bool)
    per_head[0, 3, 1, 7:9] = per_head[1, 9, 0, 50] = True
    lengths = jnp.array([33, 1], jnp.int32)
    return [
        ([(0, 33, 64), (1, 1, 64)], {"kv_lengths": lengths}),
        ([(0, 33, 64), (1, 1, 64)], {"kv_lengths": lengths, "num_splits": 3}),
        ([(0, 33, 64), (1, 1, 64)], {"kv_lengths": lengths, "split_size": 16}),
        ([(1, 0, 64)], {"kv_lengths": jnp.array([64, 0], jnp.int32)}),
        ([(0, 2, 64), (1, 2, 64)], {"causal": "top_left"}),
        ([(0, 0, 57), (1, 0, 57)], {"causal": "bottom_right", "sliding_window": 6}),
        ([(0, 0, 57), (1, 0, 57)], {"sliding_window": 6}),
        (
            [(0, 0, 28), (0, 33, 64), (1, 1, 64)],
            {"kv_lengths": lengths, "sliding_window": 4, "num_splits": 2},
        ),
        ([(0, 0, 7), (0, 9, 64), (1, 0, 50), (1, 51, 64)], {"mask": jnp.asarray(mask)}),
        ([(0, 0, 7), (0, 9, 64), (1, 0, 50), (1, 51, 64)], {"mask": jnp.asarray(per_head)}),
        (
            [(0, 0, 7), (0, 9, 64), (1, 0, 64)],
            {"mask": jnp.asarray(per_head), "kv_lengths": lengths},
        ),
    ]


def attend_guarded_pages(layout):
    """Attends to pages of a pool of layers, all others of which must not be read."""
    layers, pages, page_size, heads, head_dim = 3, 8, 4, 4, 64
    assert page_size * heads * head_dim * 4 == mmap.PAGESIZE
    inner = (page_size, heads) if layout == "NHD" else (heads, page_size)
    shape = (layers, pages, *inner, head_dim)
    used = {(2, 1), (2, 4), (2, 5)}
    arrays = []
    for fill in (0.0, 1.0):
        array = lazy_memory(4 * int(np.prod(shape))).view(np.float32).reshape(shape)
        array[...] = fill
        arrays.append(without_copy(array))
        for layer in range(layers):
            for page in range(pages):
                if (layer, page) not in used:
                    start = (layer * pages + page) * mmap.PAGESIZE
                    forbid(array, (start, start + mmap.PAGESIZE))
    cache = jax_attn.PagedKVCache(*arrays, layout=layout)
    # The first sequence has two pages, the second one page; before its window and after its
    # length the table lists pages that must not be read.
    table = jnp.array([[4, 1, 0], [6, 5, -1]], jnp.int32)
    out = jax_attn.paged_attention(
        jnp.ones((2, 1, heads, head_dim)),
        cache,
        table,
        jnp.array([8, 6], jnp.int32),
        layer=jnp.int32(2),
        sliding_window=2 if layout == "NHD" else None,
        mask=None
        if layout == "NHD"
        else jnp.array([[[[True] * 12]], [[[False] * 4 + [True] * 8]]]),
        implementation="native",
    )
    np.testing.assert_array_equal(out, np.ones(out.shape))


def main():
    """Runs the cases that a read of too much would crash."""
    with pytest.MonkeyPatch.context() as patch:
        use_variant(sys.argv[1], patch)
        if sys.argv[2:] == ["everything"]:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            attend_guarded(guards()[0][0])
        for unread, options in guards():
            attend_guarded(unread, **options)
        for layout in ("NHD", "HND"):
            attend_guarded_pages(layout)
    print("nothing else was read")


def run_guarded(*arguments):
    return subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=120
    )


needs_mprotect = pytest.mark.skipif(
    not sys.platform.startswith("linux") or mmap.PAGESIZE != 4096,
    reason="needs mprotect and memory pages of 4096 bytes",
)


@needs_mprotect
@pytest.mark.parametrize("name", VARIANTS)
def test_reads_only_what_is_seen(name):
    done = run_guarded(name)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "nothing else was read\n"


@needs_mprotect
def test_the_guard_works():
    assert run_guarded("portable", "everything").returncode == -signal.SIGSEGV


# ---- Addresses of more than 32 bits


def huge(shape, dtype):
    """Zeros that take memory only where they are written; skips where that is not possible."""
    dtype = jnp.dtype(dtype)
    try:
        memory = lazy_memory(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
    except OSError as error:
        pytest.skip(f"no address space for an array of shape {shape}: {error}")
    return memory.view(dtype).reshape(shape)


def near_one(rng, shape, dtype):
    return rng.integers(-3, 4, shape).astype(jnp.dtype(dtype))


needs_lazy_memory = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs memory that is allocated when it is touched"
)


@needs_lazy_memory
@pytest.mark.parametrize("dtype", ["int8", "float32"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("layers", [None, 5])
def test_pool_of_more_than_2_31_elements(variant, dtype, layout, layers):
    rng = np.random.default_rng(0)
    page_size, heads, head_dim = 64, 2, 512
    pages = 2**31 // (page_size * heads * head_dim) + 6
    shape = (pages, page_size, heads) if layout == "NHD" else (pages, heads, page_size)
    if layers:
        shape = (layers, -(-pages // layers), *shape[1:])
    key, value = huge((*shape, head_dim), dtype), huge((*shape, 8), dtype)
    for array in (key, value):
        pool = array if layers is None else array[-1]
        pool[-4:] = near_one(rng, pool[-4:].shape, dtype)
    table = key.shape[-4] - 1 - np.array([[0, 2], [3, 1]], np.int32)
    assert key.size > 2**31
    query = near_one(rng, (2, 1, 4, head_dim), "float32") / np.float32(64)
    lengths = np.array([128, 70], np.int32)
    cache = jax_attn.PagedKVCache(without_copy(key), without_copy(value), layout=layout)
    out, lse = jax_attn.paged_attention(
        jnp.asarray(query),
        cache,
        jnp.asarray(table),
        jnp.asarray(lengths),
        layer=None if layers is None else layers - 1,
        return_lse=True,
        implementation="native",
    )
    arrays = {"query": query, "key": key, "value": value, "page_table": table}
    arrays["kv_lengths"] = lengths
    if layers:
        arrays["layer"] = np.int32(layers - 1)
    expected = support.Problem(arrays, {}, layout).solve()
    support.assert_close(np.asarray(out), np.asarray(lse), expected, np.float32)


@needs_lazy_memory
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_context_of_more_than_2_31_elements(variant, dtype):
    rng = np.random.default_rng(0)
    kv_len, heads, head_dim = 2**19 + 3, 8, 512
    key, value = huge((2, kv_len, heads, head_dim), dtype), huge((2, kv_len, heads, 8), dtype)
    for array in (key, value):
        array[:, -40:] = near_one(rng, array[:, -40:].shape, dtype)
    assert key[0].size > 2**31
    query = near_one(rng, (2, 1, heads, head_dim), "float32") / np.float32(64)
    lengths = np.array([kv_len, kv_len - 1], np.int32)
    out, lse = jax_attn.split_kv_attention(
        jnp.asarray(query),
        without_copy(key),
        without_copy(value),
        kv_lengths=jnp.asarray(lengths),
        sliding_window=39,
        return_lse=True,
        implementation="native",
    )
    problem = support.Problem(
        {"query": query, "key": key, "value": value, "kv_lengths": lengths},
        {"sliding_window": 39},
    )
    support.assert_close(np.asarray(out), np.asarray(lse), problem.solve(), np.float32)


if __name__ == "__main__":
    main()
