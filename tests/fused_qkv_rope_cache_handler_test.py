# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The XLA handler of the fused QKV pass, called with buffers that agree and that do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import struct

import jax_attn

pytestmark = pytest.mark.skipif(
    "cpu" not in jax_attn.platforms(), reason="this build of jax_attn has no kernels for the CPU"
)

TARGET = "jax_attn_fused_qkv_rope_cache"
TOKENS = 3


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, jnp.dtype(dtype))


def call_handler(
    rest=(),
    operands=None,
    qkv=None,
    k_pages=None,
    v_pages=None,
    slots=None,
    query=None,
    key=None,
    value=None,
    k_result=None,
    v_result=None,
    more=(),
    aliases=None,
    **attributes,
):
    """Calls the handler for 4 query and 2 kv heads of 8, values of 16, except what is given."""
    rest = dict(rest)
    k_pages = zeros(5, 4, 2, 8) if k_pages is None else k_pages
    v_pages = zeros(5, 4, 2, 16) if v_pages is None else v_pages
    arrays = {
        "qkv": zeros(TOKENS, 4 * 8 + 2 * (8 + 16)) if qkv is None else qkv,
        "k_pages": k_pages,
        "v_pages": v_pages,
        "slots": np.arange(TOKENS, dtype=np.int32) if slots is None else slots,
    }
    results = (
        query or struct(TOKENS, 4, 8),
        key or struct(TOKENS, 2, 8),
        value or struct(TOKENS, 2, 16),
        k_result or jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype),
        v_result or jax.ShapeDtypeStruct(v_pages.shape, v_pages.dtype),
        *more,
    )
    attributes = {
        "operands": ",".join(rest) if operands is None else operands,
        "variant": "",
        **{name: np.int32(0) for name in ("gate", "norm_scope", "k_scale_rank", "v_scale_rank")},
        "page_layout": np.int32(1),
        "rotary_dim": np.int64(0),
        **{f"mrope_{name}": np.int64(0) for name in ("temporal", "height", "width")},
        **{name: False for name in ("interleaved", "nope_first", "full_width_table")},
        **{name: False for name in ("mrope_interleaved", "normalize_v", "dynamic_scales")},
        **{name: np.float32(0) for name in ("epsilon", "weight_offset")},
        **attributes,
    }
    jax_attn.ffi.register()
    call = jax.ffi.ffi_call(TARGET, results, input_output_aliases=aliases)
    return jax.block_until_ready(call(*arrays.values(), *rest.values(), **attributes))


TABLES = {"positions": zeros(3, dtype="int32"), "cos": zeros(9, 4), "sin": zeros(9, 4)}
ROPE = {"rest": TABLES, "rotary_dim": np.int64(8)}
LAYER = zeros(dtype="int32")
LAYERS = {
    "k_pages": zeros(7, 5, 4, 2, 8),
    "v_pages": zeros(7, 5, 4, 2, 16),
    "rest": {"layer": LAYER},
}
GATE = {"gate": np.int32(1), "qkv": zeros(3, 112), "more": (struct(3, 4, 8),)}
NORM = {"norm_scope": np.int32(1), "epsilon": np.float32(1)}
SCALES = {"k_scale": zeros(5, 4, 2), "v_scale": zeros(5, 4, 2)}
DYNAMIC = {
    "dynamic_scales": True,
    "k_pages": zeros(5, 4, 2, 8, dtype="int8"),
    "v_pages": zeros(5, 4, 2, 16, dtype="int8"),
    "rest": SCALES,
    "k_scale_rank": np.int32(3),
    "v_scale_rank": np.int32(3),
    "more": (struct(5, 4, 2), struct(5, 4, 2)),
}
BASES = {
    **{"plain": {}, "rope": ROPE, "layers": LAYERS, "gate": GATE, "norm": NORM},
    "dynamic": DYNAMIC,
    "mrope": {
        **ROPE,
        "rest": TABLES | {"positions": zeros(3, 3, dtype="int32")},
        **{f"mrope_{name}": np.int64(n) for name, n in (("temporal", 2), ("height", 2))},
    },
}
SCALE_SHAPE = r"a scalar, \[num_kv_heads\], or that of the pages without head_dim"


def without(mapping, *names):
    return {name: x for name, x in mapping.items() if name not in names}


# The base of a call, what disagrees with it, and the message after the name of the operation.
ERRORS = {
    "gate": ("plain", {"gate": np.int32(3)}, "gate is 3, expected 0 to 2"),
    "page_layout": ("plain", {"page_layout": np.int32(0)}, "page_layout is 0, expected 1 to 2"),
    "rotary_dim": ("plain", {"rotary_dim": np.int64(-2)}, "rotary_dim is -2, expected 0 to 65536"),
    "odd_rotary_dim": ("rope", {"rotary_dim": np.int64(7)}, "rotary_dim modulo 2 is 1"),
    "long_rotary_dim": ("rope", {"rotary_dim": np.int64(10)}, "rotary_dim is 10, expected 0 to 8"),
    "norm_scope": ("plain", {"norm_scope": np.int32(3)}, "norm_scope is 3, expected 0 to 2"),
    "k_scale_rank": ("plain", {"k_scale_rank": np.int32(5)}, "k_scale_rank is 5, expected 0 to 4"),
    "v_scale_rank": ("plain", {"v_scale_rank": np.int32(-1)}, "v_scale_rank is -1"),
    "section": ("mrope", {"mrope_width": np.int64(-1)}, "an M-RoPE section is -1, expected 0 to 8"),
    "sections": ("mrope", {"mrope_width": np.int64(1)}, "the sum of M-RoPE sections is 5, exp"),
    "variant": ("plain", {"variant": "mmx"}, "variant 'mmx' cannot run here"),
    "query_rank": (
        "plain",
        {"query": struct(4, 8)},
        r"query has shape \[4, 8\], expected \[batch..., tokens, num_q_heads, head_dim\]",
    ),
    "query_dtype": (
        "plain",
        {"query": struct(3, 4, 8, dtype="int8")},
        "query has an element type that is not supported",
    ),
    "query_and_key": (
        "plain",
        {"query": struct(3, 4, 8, dtype="bfloat16")},
        "query, key and value differ in type",
    ),
    "query_and_qkv": (
        "plain",
        {"qkv": zeros(3, 80, dtype="float16")},
        "qkv and query differ in type",
    ),
    "key_tokens": (
        "plain",
        {"key": struct(4, 2, 8)},
        r"key has shape \[4, 2, 8\], expected dimensions and tokens of query",
    ),
    "key_head_dim": ("plain", {"key": struct(3, 2, 16)}, r"key .*, expected head_dim of query"),
    "value_heads": ("plain", {"value": struct(3, 3, 16)}, "value .*, expected num_kv_heads of key"),
    "value_rank": (
        "plain",
        {"value": struct(1, 3, 2, 16)},
        "value .*, expected dimensions and tokens of query",
    ),
    "columns": (
        "plain",
        {"qkv": zeros(3, 81)},
        r"qkv has shape \[3, 81\], expected \[3, 80\]",
    ),
    "qkv_rank": ("plain", {"qkv": zeros(80)}, r"qkv has shape \[80\], expected \[tokens, columns"),
    "qkv_vmap": (
        "plain",
        {"qkv": zeros(2, 3, 80)},
        r"qkv has shape \[2, 3, 80\], expected 2 to 2 dimensions",
    ),
    "pages_shape": (
        "plain",
        {"k_result": struct(6, 4, 2, 8)},
        r"k_pages has shape \[5, 4, 2, 8\], expected that of the result, \[6, 4, 2, 8\]",
    ),
    "pages_dtype": (
        "plain",
        {"k_result": struct(5, 4, 2, 8, dtype="int8")},
        "k_pages and its result differ in type",
    ),
    "pages_differ": (
        "plain",
        {"v_pages": zeros(5, 4, 2, 16, dtype="int8")},
        "k_pages and v_pages differ in type",
    ),
    "pages_type": (
        "plain",
        {"k_pages": zeros(5, 4, 2, 8, dtype="int32")},
        "k_pages has an element type that is not supported",
    ),
    "pages_number": (
        "plain",
        {"v_pages": zeros(6, 4, 2, 16)},
        r"v_pages has shape \[6, 4, 2, 16\], expected the pages of k_pages",
    ),
    "pages_head_dim": (
        "plain",
        {"v_pages": zeros(5, 4, 2, 8)},
        r"v_pages has shape \[5, 4, 2, 8\], expected a last dimension of 16",
    ),
    "pages_heads": (
        "plain",
        {"k_pages": zeros(5, 4, 3, 8)},
        r"k_pages has shape \[5, 4, 3, 8\], expected num_kv_heads of key",
    ),
    "page_size": (
        "plain",
        {"k_pages": zeros(5, 0, 2, 8), "v_pages": zeros(5, 0, 2, 16)},
        "k_pages .*, expected a page_size of at least 1",
    ),
    "pages_rank": (
        "plain",
        {"k_pages": zeros(1, 5, 4, 2, 8)},
        r"k_pages .*, expected 4 dimensions behind all dimensions of vmap",
    ),
    "no_layers": (
        "layers",
        {"k_pages": zeros(0, 5, 4, 2, 8), "v_pages": zeros(0, 5, 4, 2, 16)},
        "k_pages .*, expected at least one layer",
    ),
    "layer_dtype": (
        "layers",
        {"rest": {"layer": zeros()}},
        "layer has an element type that is not expected",
    ),
    "layer_rank": (
        "layers",
        {"rest": {"layer": zeros(2, dtype="int32")}},
        r"layer has shape \[2\], expected 0 to 0 dimensions",
    ),
    "layer_is_missing": ("layers", {"rest": {}, "operands": "layer"}, "layer is missing"),
    "slots_dtype": (
        "plain",
        {"slots": zeros(3)},
        "slot_mapping has an element type that is not expected",
    ),
    "slots_shape": (
        "plain",
        {"slots": zeros(4, dtype="int32")},
        r"slot_mapping has shape \[4\], expected tokens=3",
    ),
    "positions": ("rope", {"rest": without(TABLES, "positions")}, "positions are missing"),
    "cos": ("rope", {"rest": without(TABLES, "cos")}, "cos or sin is missing"),
    "positions_shape": (
        "rope",
        {"rest": TABLES | {"positions": zeros(2, dtype="int32")}},
        r"positions has shape \[2\], expected tokens=3",
    ),
    "three_positions": (
        "mrope",
        {"rest": TABLES},
        r"positions has shape \[3\], expected \[3, 3\]",
    ),
    "table_width": (
        "rope",
        {"full_width_table": True},
        r"cos has shape \[9, 4\], expected the same for cos and sin: \[max_positions, 8\]",
    ),
    "table_rows": (
        "rope",
        {"rest": TABLES | {"sin": zeros(8, 4)}},
        r"sin has shape \[8, 4\], expected the same for cos and sin: \[max_positions, 4\]",
    ),
    "no_table_rows": (
        "rope",
        {"rest": TABLES | {"cos": zeros(0, 4), "sin": zeros(0, 4)}},
        r"cos has shape \[0, 4\], expected the same",
    ),
    "table_dtype": (
        "rope",
        {"rest": TABLES | {"cos": zeros(9, 4, dtype="int8")}},
        "cos has an element type that is not supported",
    ),
    "weight": (
        "norm",
        {"rest": {"q_weight": zeros(32)}},
        r"q_weight has shape \[32\], expected \[8\]",
    ),
    "weight_without_norm": (
        "plain",
        {"rest": {"k_weight": zeros(8)}},
        "k_weight is given without a norm",
    ),
    "weight_of_all_heads": (
        "norm",
        {"rest": {"k_weight": zeros(8)}, "norm_scope": np.int32(2)},
        r"k_weight has shape \[8\], expected \[16\]",
    ),
    "scale_shape": (
        "plain",
        {"rest": {"k_scale": zeros(3)}, "k_scale_rank": np.int32(1)},
        rf"k_scale has shape \[3\], expected {SCALE_SHAPE}",
    ),
    "scale_layout": (
        "plain",
        {"rest": {"v_scale": zeros(5, 2, 4)}, "v_scale_rank": np.int32(3)},
        rf"v_scale has shape \[5, 2, 4\], expected {SCALE_SHAPE}",
    ),
    "scale_rank": (
        "plain",
        {"rest": {"v_scale": zeros(7, 2)}, "v_scale_rank": np.int32(2)},
        rf"v_scale has shape \[7, 2\], expected {SCALE_SHAPE}",
    ),
    "scale_dtype": (
        "plain",
        {"rest": {"k_scale": zeros(dtype="float16")}},
        "k_scale has an element type that is not expected",
    ),
    "unknown": ("plain", {"rest": {"bias": zeros(3)}}, "there is no operand called bias"),
    "missing": ("plain", {"operands": "layer"}, "k_pages .*, expected 5 dimensions"),
    "missing_scale": ("plain", {"operands": "k_scale"}, "k_scale is missing"),
    "too_many": (
        "rope",
        {"operands": "positions,cos"},
        "there are more arguments than names in `operands`",
    ),
    "no_gate": ("gate", {"more": ()}, "there are 0 results after v_pages, expected 1"),
    "gate_rank": ("gate", {"more": (struct(12, 8),)}, r"gate has shape \[12, 8\], expected that"),
    "gate_shape": (
        "gate",
        {"more": (struct(3, 4, 9),)},
        r"gate has shape \[3, 4, 9\], expected that of query",
    ),
    "gate_dtype": (
        "gate",
        {"more": (struct(3, 4, 8, dtype="float16"),)},
        "gate and query differ in type",
    ),
    "dynamic_results": ("dynamic", {"more": ()}, "there are 0 results after v_pages, expected 2"),
    "dynamic_scale": (
        "dynamic",
        {"rest": without(SCALES, "v_scale")},
        "dynamic_scales need k_scale and v_scale",
    ),
    "dynamic_rank": (
        "dynamic",
        {"rest": SCALES | {"k_scale": zeros()}, "k_scale_rank": np.int32(0)},
        "k_scale must have an entry per token to be written",
    ),
    "dynamic_pages": (
        "dynamic",
        {"k_pages": zeros(5, 4, 2, 8), "v_pages": zeros(5, 4, 2, 16)},
        "dynamic_scales need quantised pages",
    ),
    "dynamic_shape": (
        "dynamic",
        {"more": (struct(5, 4, 2), struct(40))},
        r"v_scale has shape \[5, 4, 2\], expected that of the result, \[40\]",
    ),
    "head_dim": (
        "plain",
        {
            "qkv": zeros(3, 4 * 12 + 2 * 28),
            "query": struct(3, 4, 12),
            "key": struct(3, 2, 12),
            "k_pages": zeros(5, 4, 2, 12),
        },
        "head_dim 12 is not a multiple of 8 up to 512",
    ),
}


@pytest.mark.parametrize(("base", "changes", "message"), ERRORS.values(), ids=ERRORS)
def test_handler_refuses(base, changes, message):
    text = f"^INVALID_ARGUMENT: fused_qkv_rope_cache: ({message})"
    with pytest.raises(jax.errors.JaxRuntimeError, match=text):
        call_handler(**{**BASES[base], **changes})


@pytest.mark.parametrize("base", BASES)
def test_handler_takes_consistent_buffers(base):
    for result in call_handler(**BASES[base]):
        # Rows of zeros have scale 1.
        written = base == "dynamic" and result.shape == (5, 4, 2)
        assert np.array_equal(np.unique(result), [0, 1] if written else [0])


def test_results_that_are_not_aliased_start_as_copies():
    # The copy is cut into pieces of 2^20 bytes.
    rng = np.random.default_rng(0)
    pages = rng.integers(-128, 128, (700, 64, 2, 16), np.int8)
    k_pages = pages[..., :8].copy()
    scales = {name: rng.uniform(1, 2, pages.shape[:3]).astype(np.float32) for name in SCALES}
    qkv = rng.normal(size=(3, 80)).astype(np.float32)
    shapes = [jax.ShapeDtypeStruct(pages.shape[:3], jnp.float32)] * 2
    arguments = DYNAMIC | {
        **{"qkv": qkv, "k_pages": k_pages, "v_pages": pages, "rest": scales, "more": shapes},
        "slots": np.int32([5, -1, 5]),
    }
    aliased = call_handler(**arguments, aliases={1: 3, 2: 4, 4: 5, 5: 6})
    for a, b in zip(call_handler(**arguments), aliased, strict=True):
        np.testing.assert_array_equal(a, b)
    kept = np.asarray(aliased[4]).reshape(-1, 2, 16)
    np.testing.assert_array_equal(np.delete(kept, 5, 0), np.delete(pages.reshape(-1, 2, 16), 5, 0))
    stored = kept[5] * np.asarray(aliased[6]).reshape(-1, 2)[5][:, None]
    np.testing.assert_allclose(stored, qkv[2, 48:].reshape(2, 16), atol=0.02)
