# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The XLA handler of the CPU kernels, called with buffers that agree and that do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TARGET, struct

import jax_attn

pytestmark = pytest.mark.skipif(
    "cpu" not in jax_attn.platforms(), reason="this build of jax_attn has no kernels for the CPU"
)


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
    "out_rank_0": (
        {"out": struct(), "lse": struct()},
        r"out has shape \[\], expected",
    ),
    "out_rank_12": (
        {"out": struct(*[1] * 8, 2, 3, 4, 16)},
        r"out has shape \[1, 1, 1, 1, 1, 1, 1, 1, 2, 3, 4, 16\], expected",
    ),
    "out_dtype": (
        {"out": struct(2, 3, 4, 16, dtype="bfloat16")},
        "query and out differ in type",
    ),
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
        r"query has shape \[9, 2, 3, 4, 8\], expected 4 dimensions",
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
    "offset_batch": (
        {"rest": {"query_offset": zeros(3, dtype="int32")}},
        r"query_offset has shape \[3\], expected batch dimensions that agree with out: 3 is not 2",
    ),
    "offset_dtype": (
        {"rest": {"query_offset": zeros(2)}},
        "query_offset has an element type that is not expected",
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
        r"key has shape \[7, 5, 4, 2, 8\], expected 4 dimensions",
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
        r"layer has shape \[2\], expected 0 dimensions",
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
