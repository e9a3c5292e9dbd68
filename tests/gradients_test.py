# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Gradients of split-KV and paged attention, against JAX's own of a plain attention in float64."""

import re

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import support
from jax import lax

# Gradients of float32 problems, relative to the largest of each operand: sums of some 100
# products, each of factors with some ulp of error.
FLOAT32 = 3e-5
# Cotangents and gradients are rounded to bfloat16, and so is the output, whose product with its
# cotangent is subtracted.
BFLOAT16 = 2.0**-6


def plain_attention(x, layout, scale=None, **options):
    """The output and the lse of operands by name, in their dtype; no options for speed."""
    causal = options.get("causal")
    query, key, value = x["query"], context(x, "key", layout), context(x, "value", layout)
    (_, t, n, h), s = query.shape, key.shape[1]
    key, value = (jnp.repeat(a, n // a.shape[2], axis=2) for a in (key, value))
    lengths = jnp.clip(x.get("kv_lengths", s), 0, s).reshape(-1, 1, 1)

    steps, keys = jnp.arange(t)[None, :, None], jnp.arange(s)[None, None, :]
    distance = steps - keys if causal == "top_left" else lengths - t + steps - keys
    visible = jnp.broadcast_to(keys < lengths, (query.shape[0], t, s))
    if causal is not None:
        visible &= distance >= 0
    if (window := options.get("sliding_window")) is not None:
        visible &= distance < window
    visible = jnp.broadcast_to(visible[:, None], (query.shape[0], n, t, s))
    visible &= x.get("mask", True)

    logits = jnp.einsum("btnh,bsnh->bnts", query, key) * (h**-0.5 if scale is None else scale)
    if (cap := options.get("logits_soft_cap")) is not None:
        logits = cap * jnp.tanh(logits / cap)
    if "bias" in x:
        logits = logits + x["bias"]
    if "alibi_slopes" in x:
        slopes = x["alibi_slopes"][None, :, None, None]
        logits = logits - slopes * jnp.abs(distance)[:, None].astype(query.dtype)

    def softmax(sink):
        top = jnp.max(jnp.where(visible, logits, -1e30), axis=-1, keepdims=True)
        top = lax.stop_gradient(top if sink is None else jnp.maximum(top, sink))
        # The inner choice keeps infinities out of the gradient of exp.
        weight = jnp.where(visible, jnp.exp(jnp.where(visible, logits - top, 0)), 0)
        total = weight.sum(-1, keepdims=True) + (0 if sink is None else jnp.exp(sink - top))
        nonzero = jnp.where(total > 0, total, 1)
        return weight / nonzero, jnp.where(total > 0, top + jnp.log(nonzero), -jnp.inf)[..., 0]

    sinks = x["sinks"][None, :, None, None] if "sinks" in x else None
    weight, lse = softmax(sinks)
    if not options.get("lse_includes_sinks", True):
        _, lse = softmax(None)
    return jnp.einsum("bnts,bsnh->btnh", weight, value), jnp.swapaxes(lse, 1, 2)


def context(x, name, layout):
    """Dequantised keys or values, `[B, S, K, H]`."""
    stored, scale = x[name], x.get(f"{name[0]}_scale")
    is_per_token = scale is not None and scale.ndim == stored.ndim - 1
    if "layer" in x:
        stored = stored[x["layer"]]
        scale = (
            scale[x["layer"]] if is_per_token or (scale is not None and scale.ndim == 2) else scale
        )
    if is_per_token:
        scale = scale[..., None]
    elif scale is not None and scale.ndim == 1:
        scale = scale.reshape(-1, 1, 1) if layout == "HND" else scale[:, None]
    pages = stored if scale is None else stored.astype(scale.dtype) * scale
    if layout is None:
        return pages
    gathered = pages[x["page_table"]]  # [B, pages, page_size, K, H], or with K first
    if layout == "HND":
        gathered = gathered.swapaxes(2, 3)
    return gathered.reshape(gathered.shape[0], -1, *gathered.shape[3:])


def clean(problem):
    """Operands in float64 without NaN, and page ids within the pool."""
    arrays = {}
    for name, array in problem.arrays.items():
        if jnp.issubdtype(array.dtype, jnp.floating):
            array = np.nan_to_num(array.astype(np.float64))
        if name == "page_table":
            array = array.clip(0, problem.key.shape[-4] - 1)
        arrays[name] = array
    return arrays


def losses(problem):
    """Differentiable operands, and their loss: by the package, and by plain attention."""
    floating = [n for n, a in problem.arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)]
    rng = np.random.default_rng(7)
    query, v_head_dim = problem.query, problem.value.shape[-1]
    weights = rng.standard_normal((*query.shape[:3], v_head_dim + 1)).astype(query.dtype)

    def loss(attention, differentiable, others, weights):
        out, lse = attention({**others, **differentiable})
        finite = jnp.where(jnp.isneginf(lse), 0, lse)
        weights = weights.astype(lse.dtype)
        return jnp.sum(out.astype(lse.dtype) * weights[..., :-1]) + jnp.sum(
            finite * weights[..., -1]
        )

    def ours(x):
        return support.call(x, problem.layout, return_lse=True, **problem.options)

    def plain(x):
        return plain_attention(x, problem.layout, **problem.options)

    def of(attention, arrays):
        arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
        differentiable = {name: arrays.pop(name) for name in floating}
        return differentiable, lambda d: loss(
            attention, d, arrays, jnp.asarray(weights, differentiable["query"].dtype)
        )

    return of(ours, problem.arrays), lambda: of(plain, clean(problem))


def compiled(function, argument):
    # A third of the time to compile; a test runs a program once.
    options = {"xla_backend_optimization_level": 0}
    return jax.tree.map(np.asarray, jax.jit(function, compiler_options=options)(argument))


def assert_gradients_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        largest = np.abs(expected[name]).max()
        assert largest > 0, f"{name} does not matter"
        error = np.abs(gradient.astype(np.float64) - expected[name]).max()
        assert error <= tolerance * max(largest, 1), f"{name}: {error:.3g} of {largest:.3g}"
        # What no query sees, or an empty row, has a gradient of exactly 0.
        assert not gradient[expected[name] == 0].any(), name


def check_gradients(problem, transform=jax.grad, tolerance=FLOAT32):
    (operands, loss), plain = losses(problem)
    actual = compiled(transform(loss), operands)
    assert {n: g.dtype for n, g in actual.items()} == {n: a.dtype for n, a in operands.items()}
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        operands, loss = plain()
        expected = compiled(transform(loss), operands)
    assert_gradients_close(actual, expected, tolerance)


BASE = {"batch": 3, "query_len": 3, "head_dim": 8, "kv_len": 24, "lengths": [24, 11, 4]}

DENSE = {
    "no-options": {"lengths": None, "v_head_dim": 5},
    "everything": {
        **{"bias": "bnt", "mask": "b", "alibi": True, "sinks": True, "logits_soft_cap": 2.0},
        **{"sliding_window": 7, "causal": "bottom_right", "k_scale": "token", "v_scale": "head"},
    },
    "top-left": {"bias": "", "mask": "nt", "sinks": True, "causal": "top_left", "query_len": 6},
    "window-without-causal": {"bias": "n", "alibi": True, "sliding_window": 5},
    "lse-without-sinks": {"sinks": True, "lse_includes_sinks": False, "bias": "t"},
    "empty-rows": {"lengths": [0, 2, 24], "causal": "bottom_right", "bias": "bn", "query_len": 4},
    "empty-rows-with-sinks": {"lengths": [0, 0, 9], "sinks": True},
    "empty-rows-lse-without-sinks": {
        **{"lengths": [0, 1, 9], "sinks": True, "lse_includes_sinks": False, "mask": "nt"},
    },
    "scalar-scales": {"k_scale": "scalar", "v_scale": "scalar", "scale": 0.7},
    "mqa": {"num_kv_heads": 1, "k_scale": "head", "v_scale": "token", "alibi": True},
    "mha": {"num_kv_heads": 4, "mask": "bnt", "causal": "bottom_right"},
    "int8": {"cache_dtype": "int8", "k_scale": "token", "v_scale": "head"},
    # More than one chunk of keys, and not a multiple.
    "long": {"kv_len": 1100, "lengths": [1100, 700, 512], "bias": "b", "query_len": 1},
}


@pytest.mark.parametrize("name", DENSE)
def test_gradients_dense(name):
    problem = support.dense(np.random.default_rng(0), **{**BASE, **DENSE[name]})
    check_gradients(support.poison(problem))


PAGED = {
    "plain": {},
    "options": {
        **{"sinks": True, "bias": "n", "mask": "bt", "alibi": True, "logits_soft_cap": 3.0},
        **{"causal": "bottom_right", "sliding_window": 9, "lse_includes_sinks": False},
    },
    "token-scales": {"k_scale": "token", "v_scale": "token"},
    "head-and-scalar-scales": {"k_scale": "head", "v_scale": "scalar"},
    "empty": {"lengths": [0, 2, 24], "causal": "bottom_right"},
    "long": {"kv_len": 608, "lengths": [600, 0, 513], "query_len": 1},
}


@pytest.mark.parametrize("layers", [None, 3], ids=["one-layer", "layers"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("name", PAGED)
def test_gradients_paged(name, layout, layers):
    if name in ("plain", "empty", "long") and (layout == "HND") == (layers is None):
        pytest.skip("the other two of four say as much")
    rng = np.random.default_rng(1)
    problem = support.dense(rng, **{**BASE, **PAGED[name]})
    per_layer = layers is not None
    page_size = 8 if name == "long" else 4
    paged = support.paged(problem, rng, page_size, layout, layers, scale_per_layer=per_layer)
    if name in ("plain", "token-scales"):
        # Two sequences and two positions of one share a page, whose gradients add up.
        table = paged.page_table.copy()
        table[1, 0] = table[0, 0]
        table[0, 4] = table[0, 2]
        paged = paged.replace(page_table=table)
    check_gradients(paged)


@pytest.mark.parametrize("layout", [None, "HND"], ids=["dense", "HND"])
def test_gradients_bfloat16(layout):
    rng = np.random.default_rng(2)
    options = {"bias": "n", "sinks": True, "causal": "bottom_right", "dtype": "bfloat16"}
    problem = support.poison(support.dense(rng, **BASE, **options))
    if layout is not None:
        problem = support.paged(problem, rng, 4, layout, 2)
    check_gradients(problem, tolerance=BFLOAT16)


def second_derivative(loss):
    """Gradient of a function of the gradients that is not linear in them."""
    return jax.grad(lambda x: sum(jnp.sum(jnp.sin(g)) for g in jax.grad(loss)(x).values()))


@pytest.mark.parametrize("layout", [None, "NHD"], ids=["dense", "NHD"])
def test_second_derivatives(layout):
    rng = np.random.default_rng(3)
    options = {"bias": "n", "sinks": True, "alibi": True, "logits_soft_cap": 2.0, "k_scale": "head"}
    problem = support.dense(rng, **{**BASE, "lengths": [24, 0, 4]}, **options)
    problem = support.poison(problem.replace(causal="bottom_right"))
    if layout is not None:
        problem = support.paged(problem, rng, 8, layout, 2)
    check_gradients(problem, second_derivative, tolerance=3e-4)


@pytest.mark.parametrize("order", [1, 2])
def test_gradients_match_differences(order):
    options = {"bias": "n", "sinks": True, "alibi": True, "causal": "bottom_right"}
    problem = support.dense(np.random.default_rng(4), **{**BASE, "kv_len": 24}, **options)
    (operands, loss), _ = losses(problem)
    loss = jax.jit(loss)
    jax.test_util.check_grads(loss, (operands,), order, modes=["rev"], rtol=0.02, atol=0.02)


def test_integer_operands_get_no_gradient():
    rng = np.random.default_rng(5)
    problem = support.dense(rng, **BASE, cache_dtype="int8", mask="bt")
    problem = support.paged(problem, rng, 4, "NHD", 2)
    arrays = {name: jnp.asarray(array) for name, array in problem.arrays.items()}
    _, pull = jax.vjp(lambda x: jnp.sum(support.call(x, "NHD")), arrays)
    (gradients,) = pull(jnp.float32(1))
    without = {name for name, g in gradients.items() if g.dtype == jax.dtypes.float0}
    assert without == {"key", "value", "mask", "kv_lengths", "page_table", "layer"}
    assert all(gradients[name].shape == arrays[name].shape for name in arrays)


@pytest.mark.parametrize("layout", [None, "NHD"], ids=["dense", "NHD"])
def test_backward_memory_is_linear_in_the_context(layout):
    query_len, num_q_heads, head_dim = 64, 8, 8
    shape = jax.ShapeDtypeStruct

    def backward(kv_len):
        keys = (1, kv_len, 1, head_dim) if layout is None else (kv_len // 16, 16, 1, head_dim)
        x = {
            "query": shape((1, query_len, num_q_heads, head_dim), jnp.float32),
            "key": shape(keys, jnp.float32),
            "value": shape(keys, jnp.float32),
            "kv_lengths": shape((1,), jnp.int32),
        }
        if layout is not None:
            x["page_table"] = shape((1, kv_len // 16), jnp.int32)

        def loss(differentiable, others):
            out, lse = support.call(differentiable | others, layout, return_lse=True)
            return jnp.sum(out) + jnp.sum(lse)

        names = ("query", "key", "value")
        differentiable = {name: x.pop(name) for name in names}
        return jax.jit(jax.grad(loss)).lower(differentiable, x).compile()

    kv_len = 4096
    short, long = backward(kv_len), backward(4 * kv_len)
    short_size, long_size = (c.memory_analysis().temp_size_in_bytes for c in (short, long))
    assert long_size <= 4 * short_size
    # A value for each query and key would take `query_len * num_q_heads` per key.
    per_key = (long_size - short_size) / (3 * kv_len) / 4
    assert per_key < query_len * num_q_heads / 4
    arrays = re.findall(r"\[([\d,]+)\]", long.as_text())
    largest = max(np.prod([int(size) for size in shape.split(",") if size]) for shape in arrays)
    assert largest < query_len * num_q_heads * 4 * kv_len
