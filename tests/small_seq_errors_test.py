# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Every error of `small_seq_attention`: of its arguments, and of its handlers' buffers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_seq_cases as cases
from support import struct

import jax_attn

needs_native = pytest.mark.skipif(
    "cpu" not in jax_attn.platforms(), reason="this build of jax_attn has no kernels for the CPU"
)


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, jnp.dtype(dtype))


def ints(*values):
    return jnp.asarray(values, jnp.int32)


DENSE = {"query": zeros(2, 3, 4, 8), "key": zeros(2, 6, 2, 8), "value": zeros(2, 6, 2, 16)}
PACKED = {
    "query": zeros(7, 4, 8),
    "key": zeros(9, 2, 8),
    "value": zeros(9, 2, 16),
    "query_cu_seqlens": ints(0, 3, 7),
    "kv_cu_seqlens": ints(0, 4, 9),
    "max_q_len": 4,
    "max_kv_len": 5,
}
FLOATS = "float32, bfloat16 or float16"
PACKING = "packed sequences need query_cu_seqlens, kv_cu_seqlens, max_q_len, max_kv_len"

DENSE_ERRORS = [
    ({"query": [1.0]}, TypeError, "`query` must be an array, got list."),
    (
        {"query": zeros(2, 3, 4, 8, dtype="int8")},
        TypeError,
        f"`query` must be {FLOATS}, got int8.",
    ),
    (
        {"key": zeros(2, 6, 2, 8, dtype="bfloat16")},
        TypeError,
        "`key` must be float32, got bfloat16.",
    ),
    (
        {"value": zeros(2, 6, 2, 16, dtype="float16")},
        TypeError,
        "`value` must be float32, got float16.",
    ),
    (
        {"query": zeros(2, 4, 8)},
        ValueError,
        "`query` must have shape [batch, query_len, num_q_heads, head_dim], got shape (2, 4, 8).",
    ),
    (
        {"key": zeros(2, 6, 2, 16)},
        ValueError,
        "`key` has head_dim=16 (shape (2, 6, 2, 16)), expected 8 from `query` "
        "(shape (2, 3, 4, 8)).",
    ),
    (
        {"value": zeros(2, 5, 2, 16)},
        ValueError,
        "`value` has kv_len=5 (shape (2, 5, 2, 16)), expected 6 from `key` (shape (2, 6, 2, 8)).",
    ),
    (
        {"key": zeros(2, 6, 3, 8), "value": zeros(2, 6, 3, 8)},
        ValueError,
        "num_q_heads=4 is not a multiple of num_kv_heads=3.",
    ),
    (
        {"key": zeros(2, 6, 0, 8), "value": zeros(2, 6, 0, 8)},
        ValueError,
        "num_q_heads=4 is not a multiple of num_kv_heads=0.",
    ),
    (
        {"bias": zeros(2, 4, 3, 1)},
        ValueError,
        "`bias` has kv_len=1 (shape (2, 4, 3, 1)), expected 6 from `key` (shape (2, 6, 2, 8)).",
    ),
    (
        {"bias": zeros(3, 4, 3, 6)},
        ValueError,
        "`bias` has batch=3 (shape (3, 4, 3, 6)), expected 2 or 1 from `query` "
        "(shape (2, 3, 4, 8)).",
    ),
    (
        {"bias": zeros(2, 4, 3, 6, dtype="int32")},
        TypeError,
        f"`bias` must be {FLOATS}, got int32.",
    ),
    (
        {"query_lengths": zeros(2)},
        TypeError,
        "`query_lengths` must be int32, got float32.",
    ),
    (
        {"kv_lengths": ints(1, 2, 3)},
        ValueError,
        "`kv_lengths` has batch=3 (shape (3,)), expected 2 from `query` (shape (2, 3, 4, 8)).",
    ),
    ({"scale": float("inf")}, ValueError, "scale must be finite, got inf."),
    ({"scale": "1"}, TypeError, "scale must be float, got str."),
    (
        {"causal": True},
        ValueError,
        "causal must be 'bottom_right', 'top_left' or None, got True.",
    ),
    (
        {"logits_soft_cap": 0.0},
        ValueError,
        "logits_soft_cap must be positive, got 0.0. Use None for no cap.",
    ),
    (
        {"implementation": "cuda"},
        ValueError,
        "implementation must be 'native', 'xla' or None, got 'cuda'.",
    ),
    (
        {"dropout_rate": 0.1},
        NotImplementedError,
        "dropout is not supported, got dropout_rate=0.1. Drop out the inputs or the output "
        "instead, or use attention that stores its probabilities.",
    ),
    (
        {"max_q_len": 4},
        ValueError,
        f"{PACKING}; missing query_cu_seqlens, kv_cu_seqlens, max_kv_len.",
    ),
]
PACKED_ERRORS = [
    ({"kv_cu_seqlens": None}, ValueError, f"{PACKING}; missing kv_cu_seqlens."),
    ({"max_q_len": None}, ValueError, f"{PACKING}; missing max_q_len."),
    ({"max_q_len": 0}, ValueError, "max_q_len must be at least 1, got 0."),
    ({"max_kv_len": 2.0}, TypeError, "max_kv_len must be int, got float."),
    (
        {"query": zeros(2, 7, 4, 8)},
        ValueError,
        "`query` must have shape [query_tokens, num_q_heads, head_dim], got shape (2, 7, 4, 8).",
    ),
    (
        {"value": zeros(8, 2, 16)},
        ValueError,
        "`value` has kv_tokens=8 (shape (8, 2, 16)), expected 9 from `key` (shape (9, 2, 8)).",
    ),
    (
        {"query_cu_seqlens": zeros(3)},
        TypeError,
        "`query_cu_seqlens` must be int32, got float32.",
    ),
    (
        {"kv_cu_seqlens": zeros(0, dtype="int32")},
        ValueError,
        "`kv_cu_seqlens` must have shape [batch + 1], got (0,).",
    ),
    (
        {"kv_cu_seqlens": ints(0, 9)},
        ValueError,
        "`query_cu_seqlens` and `kv_cu_seqlens` must have one length, batch + 1; got shapes (3,) "
        "and (2,).",
    ),
    (
        {"kv_lengths": ints(1, 2, 3)},
        ValueError,
        "`kv_lengths` has batch=3 (shape (3,)), expected 2 from `query_cu_seqlens` "
        "(its length less 1).",
    ),
    (
        {"bias": zeros(2, 4, 4, 6)},
        ValueError,
        "`bias` has kv_len=6 (shape (2, 4, 4, 6)), expected 5 from max_kv_len.",
    ),
]


@pytest.mark.parametrize(
    "base, change, kind, message",
    [(DENSE, *case) for case in DENSE_ERRORS] + [(PACKED, *case) for case in PACKED_ERRORS],
    ids=lambda x: ",".join(x) if isinstance(x, dict) and len(x) < 3 else "",
)
def test_arguments(base, change, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(f'small_seq_attention: {message}')}$"):
        jax_attn.small_seq_attention(**{**base, **change})


REFUSED = {
    "head_dim 12 is not a multiple of 8 up to 512": {
        "query": zeros(2, 3, 4, 12),
        "key": zeros(2, 6, 2, 12),
    },
    "head_dim 520 is not a multiple of 8 up to 512": {"value": zeros(2, 6, 2, 520)},
    "the query length 33 is more than 32": {"query": zeros(2, 33, 4, 8)},
    "the key length 65 is more than 64": {
        "key": zeros(2, 65, 2, 8),
        "value": zeros(2, 65, 2, 16),
    },
}


@needs_native
@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_kernel_refuses_falls_back(reason):
    arrays = {**DENSE, **REFUSED[reason]}
    message = (
        f'small_seq_attention: implementation="native" cannot be used on cpu: {reason}. '
        "Use implementation=None to fall back to jax.numpy."
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
        jax_attn.small_seq_attention(**arrays, implementation="native")
    text = jax.jit(lambda x: jax_attn.small_seq_attention(**x)).lower(arrays).as_text()
    assert cases.TARGET not in text


# ---- Handlers

ROWS = {"lse": zeros(2, 3, 4), "dout": zeros(2, 3, 4, 16)}
PACKED_ARRAYS = {name: PACKED[name] for name in ("query", "key", "value")}
PACKED_REST = {name: PACKED[name] for name in ("query_cu_seqlens", "kv_cu_seqlens")}
PACKED_HINTS = {"max_q_len": np.int64(4), "max_kv_len": np.int64(5)}
PACKED_CALL = {**PACKED_ARRAYS, "rest": PACKED_REST, **PACKED_HINTS, "out": struct(7, 4, 16)}


def call_handler(query, key, value, rest=(), operands=None, out=None, lse=None, **attributes):
    """Calls the forward handler with consistent results, except those that are given."""
    out = struct(*query.shape[:-1], 16) if out is None else out
    results = [out, struct(*out.shape[:-1]) if lse is None else lse]
    return call(cases.TARGET, results, query, key, value, rest, operands, **attributes)


def call_backward(query, key, value, rest=(), operands=None, results=(), **attributes):
    """Calls the backward handler likewise; `results` replaces some of its results, by index."""
    found = [struct(*x.shape, dtype=x.dtype) for x in (query, key, value)]
    for i, result in dict(results).items():
        found[i:] = [result, *found[i + 1 :]]
    return call(cases.GRADIENT_TARGET, found, query, key, value, rest, operands, **attributes)


def call(target, results, query, key, value, rest, operands, **attributes):
    rest = dict(rest)
    attributes = {
        "operands": ",".join(rest) if operands is None else operands,
        "variant": "",
        "scale": np.float32(1),
        "causal": np.int32(0),
        "logits_soft_cap": np.float32(0),
        "max_q_len": np.int64(0),
        "max_kv_len": np.int64(0),
        **attributes,
    }
    jax_attn.ffi.register()
    function = jax.ffi.ffi_call(target, results)
    return function(query, key, value, *rest.values(), **attributes)


FORWARD_ERRORS = [
    ({"causal": np.int32(3)}, "causal is 3, expected 0 to 2"),
    ({"max_q_len": np.int64(1)}, "max_q_len is 1, expected 0 to 0"),
    ({"max_kv_len": np.int64(-1)}, "max_kv_len is -1, expected 0 to 0"),
    ({"variant": "mmx"}, "variant 'mmx' cannot run here"),
    (
        {"out": struct(2, 3, 4, 8), "lse": struct(2, 3, 4)},
        r"out has shape \[2, 3, 4, 8\], expected that of query, with v_head_dim of value",
    ),
    ({"lse": struct(2, 3, 5)}, r"lse has shape \[2, 3, 5\], expected that of out without"),
    (
        {"lse": struct(2, 3, 4, dtype="bfloat16")},
        "lse has an element type that is not expected",
    ),
    (
        {"out": struct(3, 4, 16)},
        r"out has shape \[3, 4, 16\], expected \[batch, length, heads, head_dim\] with all batch",
    ),
    ({"out": struct(2, 3, 4, 16, dtype="bfloat16")}, "out and query differ in type"),
    ({"query": zeros(4, 8), "out": struct(2, 3, 4, 16)}, r"query has shape \[4, 8\], expected"),
    ({"key": zeros(6, 2, 8)}, r"key has shape \[6, 2, 8\], expected \[batch, length, heads"),
    ({"key": zeros(2, 6, 2, 16)}, r"key has shape \[2, 6, 2, 16\], expected \[..., 6, 2, 8\]"),
    ({"key": zeros(2, 6, 3, 8)}, r"key has shape \[2, 6, 3, 8\], expected num_kv_heads that"),
    (
        {"key": zeros(3, 6, 2, 8)},
        r"key has shape \[3, 6, 2, 8\], expected batch dimensions that agree with out: 3 is not 2",
    ),
    ({"value": zeros(2, 7, 2, 16)}, r"value has shape \[2, 7, 2, 16\], expected \[..., 6, 2, 16\]"),
    ({"value": zeros(2, 6, 2, 16, dtype="float16")}, "value and query differ in type"),
    (
        {"query": zeros(2, 3, 4, 8, dtype="int32"), "out": struct(2, 3, 4, 16, dtype="int32")},
        "query has an element type that is not supported",
    ),
    ({"query": zeros(2, 3, 4, 12), "key": zeros(2, 6, 2, 12)}, "head_dim 12 is not a multiple"),
    ({"operands": "bias"}, "bias is missing"),
    ({"rest": {"bias": zeros(1, 1, 1, 6)}, "operands": ""}, "there are more arguments than"),
    ({"rest": {"mask": zeros(1, 1, 1, 6)}}, "there is no operand called mask"),
    ({"rest": {"lse": zeros(2, 3, 4)}}, "there is no operand called lse"),
    ({"rest": {"bias": zeros(1, 1, 1, 5)}}, r"bias has shape \[1, 1, 1, 5\], expected \[batch, 4"),
    (
        {"rest": {"bias": zeros(1, 1, 1, 6, dtype="int8")}},
        "bias has an element type that is not supported",
    ),
    ({"rest": {"kv_lengths": ints(1)}}, r"kv_lengths has shape \[1\], expected \[..., 2\]"),
    ({"rest": {"query_lengths": zeros(2)}}, "query_lengths has an element type that is not exp"),
    (
        {"rest": {"kv_cu_seqlens": ints(0, 1, 2)}},
        "kv_cu_seqlens is given without query_cu_seqlens",
    ),
]
PACKED_HANDLER_ERRORS = [
    ({"max_q_len": np.int64(0)}, "max_q_len is 0, expected 1 to"),
    (
        {"rest": {"query_cu_seqlens": ints(0, 3, 7)}},
        "kv_cu_seqlens is missing",
    ),
    (
        {"rest": PACKED_REST | {"query_cu_seqlens": zeros(0, dtype="int32")}},
        r"query_cu_seqlens has shape \[0\], expected \[batch \+ 1\]",
    ),
    (
        {"rest": PACKED_REST | {"kv_cu_seqlens": ints(0, 3)}},
        r"kv_cu_seqlens has shape \[2\], expected \[..., 3\]",
    ),
    ({"max_q_len": np.int64(40)}, "the query length 40 is more than 32"),
]
DBIAS = r"\[batch..., num_q_heads, query_len, kv_len\]"
WITH_BIAS = {"bias": zeros(1, 4, 1, 6), **ROWS}
BACKWARD_ERRORS = [
    ({"rest": {"lse": ROWS["lse"]}}, "dout is missing"),
    ({"rest": {"dout": ROWS["dout"]}}, "lse is missing"),
    ({"rest": ROWS | {"lse": zeros(2, 3, 5)}}, r"lse has shape \[2, 3, 5\], expected \[..., 3, 4"),
    ({"rest": ROWS | {"dlse": ROWS["lse"][:, :2]}}, r"dlse has shape \[2, 2, 4\], expected"),
    ({"rest": ROWS | {"lse": ints(0)}}, r"lse has shape \[1\], expected"),
    (
        {"rest": ROWS | {"dlse": zeros(2, 3, 4, dtype="bfloat16")}},
        "dlse has an element type that is not expected",
    ),
    (
        {"rest": ROWS | {"dout": zeros(2, 3, 4, 8)}},
        r"dout has shape \[2, 3, 4, 8\], expected \[..., 3, 4, 16\]",
    ),
    (
        {"rest": ROWS | {"dout": zeros(2, 3, 4, 16, dtype="float16")}},
        "dout and query differ in type",
    ),
    (
        {"rest": ROWS, "results": {0: struct(2, 3, 4, 16)}},
        r"dquery has shape \[2, 3, 4, 16\], expected that of query with all batch dimensions",
    ),
    (
        {"rest": ROWS, "results": {1: struct(1, 6, 2, 8)}},
        r"dkey has shape \[1, 6, 2, 8\], expected that of key with all batch dimensions",
    ),
    (
        {"rest": ROWS, "results": {2: struct(2, 6, 2, 16, dtype="bfloat16")}},
        "dvalue and query differ in type",
    ),
    ({"rest": WITH_BIAS}, "there are 3 results, expected 4 with a bias"),
    (
        {"rest": ROWS, "results": {3: struct(2, 4, 3, 6)}},
        "there are 4 results, expected 3 without a bias",
    ),
    (
        {"rest": WITH_BIAS, "results": {3: struct(1, 4, 3, 6)}},
        rf"dbias has shape \[1, 4, 3, 6\], expected {DBIAS}",
    ),
    (
        {"rest": WITH_BIAS, "results": {3: struct(2, 4, 3, 6, dtype="bfloat16")}},
        "dbias has an element type that is not expected",
    ),
    ({"rest": ROWS, "variant": "mmx"}, "variant 'mmx' cannot run here"),
]


@needs_native
@pytest.mark.parametrize(
    "function, base, changes, message",
    [(call_handler, DENSE, *case) for case in FORWARD_ERRORS]
    + [(call_handler, PACKED_CALL, *case) for case in PACKED_HANDLER_ERRORS]
    + [(call_backward, DENSE, *case) for case in BACKWARD_ERRORS],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)
def test_handler_refuses(function, base, changes, message):
    op = "small_seq_attention" + ("_backward" if function is call_backward else "")
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"^INVALID_ARGUMENT: {op}: ({message})"):
        jax.block_until_ready(function(**{**base, **changes}))


@needs_native
def test_handlers_take_consistent_buffers():
    out, lse = call_handler(**DENSE)
    np.testing.assert_array_equal(out, np.zeros((2, 3, 4, 16)))
    np.testing.assert_allclose(lse, np.full((2, 3, 4), np.log(6)), rtol=1e-6)
    out, lse = call_handler(**PACKED_CALL)
    np.testing.assert_array_equal(out, np.zeros((7, 4, 16)))
    np.testing.assert_allclose(lse, np.log(np.repeat([4, 5], [3, 4]))[:, None] * np.ones(4))
    dbias = struct(2, 4, 3, 6)
    for gradient in call_backward(**DENSE, rest=WITH_BIAS, results={3: dbias}):
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


# ---- Memory


@needs_native
@pytest.mark.parametrize("with_lse", [False, True])
def test_forward_and_backward_hold_only_the_lse_besides_inputs_and_outputs(with_lse):
    shapes = [struct(64, 1, 16, 128, dtype="bfloat16")] + [
        struct(64, 8, 16, 128, dtype="bfloat16")
    ] * 2

    def forward_and_backward(query, key, value, dout):
        def attend(*args):
            return jax_attn.small_seq_attention(*args, return_lse=with_lse)

        found, pull = jax.vjp(attend, query, key, value)
        return found, pull((dout, found[1]) if with_lse else dout)

    compiled = jax.jit(forward_and_backward).lower(*shapes, shapes[0]).compile()
    analysis = compiled.memory_analysis()
    arguments = sum(x.size * 2 for x in (*shapes, shapes[0]))
    lse = 64 * 16 * 4
    outputs = sum(x.size * 2 for x in (shapes[0], *shapes)) + lse * with_lse
    used = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    used += analysis.temp_size_in_bytes
    assert used <= 1.05 * (arguments + outputs + lse)
    assert analysis.temp_size_in_bytes <= lse * 1.05 + 256
