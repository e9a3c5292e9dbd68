# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Fused QKV split, norm, rotation and cache write: gradients and vmap."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import qkv_cases
import qkv_oracle
from qkv_cases import Problem

EVERYTHING = {"gate": "interleaved", "norm": "weight", "rotary": "first", "positions": "offsets"}


@pytest.fixture(autouse=True)
def chosen(implementation, monkeypatch):
    monkeypatch.setattr(Problem, "implementation", implementation)


def differentiable(problem):
    """The float operands of a problem by name, and a function of them that calls the op."""
    (qkv, cache, slots), keywords = problem.arguments()
    operands = {"qkv": qkv, "k_pages": cache.k_pages, "v_pages": cache.v_pages}
    operands |= {"q_weight": keywords["qk_norm"].q_weight, "k_weight": keywords["qk_norm"].k_weight}
    if cache.k_scale is not None:
        operands |= {"k_scale": cache.k_scale}

    def call(operands):
        operands = dict(operands)
        weights = {name: operands.pop(name) for name in ("q_weight", "k_weight")}
        norm = dataclasses.replace(keywords["qk_norm"], **weights)
        qkv = operands.pop("qkv")
        filled = dataclasses.replace(cache, **operands)
        return problem.call((qkv, filled, slots), {**keywords, "qk_norm": norm})

    return operands, call


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "weight", "gate": "blocked", "scale": "token", "rotary": "first"},
        {"norm": "all_heads", "gate": "interleaved", "layout": "HND", "layers": 2},
        {"norm": "one_plus", "pairing": "neighbours", "positions": "mrope", "scale": "head"},
    ],
    ids=["token-scale", "all-heads", "mrope"],
)
def test_gradients_match_differences_in_float64(options):
    problem = Problem(tokens=6, head_dims=(16, 8), heads=(2, 1), page_size=4, **options)
    rng = np.random.default_rng(3)
    problem.k_pages, problem.v_pages = (
        qkv_cases.random(rng, a.shape) for a in (problem.k_pages, problem.v_pages)
    )
    operands, call = differentiable(problem)

    def outputs(operands):
        result = call(operands)
        stored = result.cache.k_pages, result.cache.v_pages
        return result.query, result.gate, result.key, result.value, *stored

    weights = jax.tree.map(
        lambda a: qkv_cases.random(rng, a.shape), jax.eval_shape(outputs, operands)
    )

    def loss(operands):
        weighted = jax.tree.map(lambda a, w: jnp.sum(a * w), outputs(operands), weights)
        return sum(jax.tree.leaves(weighted))

    def loss_in_float64(operands):
        x = {**problem.x, "qkv": operands["qkv"]}
        norm = {**problem.norm, "q_weight": operands["q_weight"], "k_weight": operands["k_weight"]}
        heads = qkv_oracle.qkv_heads(x, problem.rope, norm)
        where = problem.slot_mapping, problem.layout
        k_pages, v_pages = (
            qkv_oracle.fill_pages(operands[f"{name}_pages"], new, *where, scale, problem.layer)
            for name, new, scale in (
                ("k", heads[2], operands.get("k_scale")),
                ("v", heads[3], problem.v_scale),
            )
        )
        arrays = (*heads, k_pages, v_pages)
        return sum(np.sum(a * w) for a, w in zip(arrays, weights, strict=True) if a is not None)

    gradient = qkv_cases.jit(jax.grad(loss))(operands)
    for name, array in operands.items():
        direction = rng.normal(size=array.shape)
        exact = jax.tree.map(lambda a: np.asarray(a).astype(np.float64), operands)
        step = 1e-5 * (0.01 if name == "k_scale" else 1)
        ahead, behind = (
            loss_in_float64({**exact, name: exact[name] + sign * step * direction})
            for sign in (1, -1)
        )
        expected = (ahead - behind) / (2 * step)
        got = np.sum(np.asarray(gradient[name]).astype(np.float64) * direction)
        size = np.linalg.norm(gradient[name]) * np.linalg.norm(direction)
        assert abs(got - expected) <= 1e-5 * size, name


def test_derivatives_agree_with_differences():
    problem = Problem(tokens=6, head_dims=(8, 8), heads=(1, 1), norm="weight", scale="scalar")
    problem.k_pages, problem.v_pages = map(np.zeros_like, (problem.k_pages, problem.v_pages))
    problem.k_scale = problem.v_scale = np.float32(1.5)
    operands, call = differentiable(problem)

    def outputs(operands):
        result = call(operands)
        return result.query, result.key, result.value, result.cache.k_pages, result.cache.v_pages

    jax.test_util.check_grads(
        jax.jit(outputs), (operands,), order=1, modes="rev", atol=2e-2, rtol=2e-2, eps=1e-2
    )


@pytest.mark.parametrize("cache_dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_gradients_through_float8_pages(cache_dtype):
    problem = Problem(
        tokens=3, slot_mapping=[4, -1, 4], cache_dtype=cache_dtype, pairing=None, heads=(1, 1)
    )
    problem.x["qkv"][2, 64:80] = 1e6  # saturated: no gradient
    (qkv, cache, slots), keywords = problem.arguments()

    def loss(qkv, k_pages):
        filled = dataclasses.replace(cache, k_pages=k_pages)
        stored = problem.call((qkv, filled, slots), keywords).cache.k_pages
        return jnp.sum(jnp.nan_to_num(stored.astype(jnp.float32)) * 2)

    d_qkv, d_pages = jax.grad(loss, (0, 1))(qkv, jnp.zeros_like(cache.k_pages))
    expected = np.zeros(qkv.shape)
    expected[2, 80:128] = 2  # the keys of the token that was stored
    np.testing.assert_array_equal(d_qkv, expected)
    untouched = np.full(d_pages.shape, 2.0)
    untouched[1, 0] = 0  # slot 4 of pages of 4
    np.testing.assert_array_equal(d_pages.astype(jnp.float32), untouched)


def test_int8_pages_have_no_gradient():
    problem = Problem(cache_dtype="int8", scale="head")
    (qkv, cache, slots), keywords = problem.arguments()

    def loss(qkv):
        result = problem.call((qkv, cache, slots), keywords)
        stored = result.cache.k_pages.astype(jnp.float32)
        return jnp.sum(stored) + jnp.sum(result.query)

    d_qkv = jax.grad(loss)(qkv)
    assert np.any(d_qkv[:, :256] != 0) and not np.any(d_qkv[:, 256:])


@pytest.mark.parametrize("over", ["tokens", "cache", "both"])
def test_vmap(over):
    problems = [Problem(seed=seed, scale="token", layers=2, **EVERYTHING) for seed in range(3)]
    for problem in problems[1:]:
        if over == "tokens":
            names = ("k_pages", "v_pages", "k_scale", "v_scale")
        else:
            names = ("x", "slot_mapping", "rope", "norm") if over == "cache" else ()
        for name in names:
            setattr(problem, name, getattr(problems[0], name))
    operands = []
    for problem in problems:
        (qkv, cache, slots), keywords = problem.arguments()
        operands.append(((qkv, slots, keywords), cache))
    axes = (None if over == "cache" else 0, None if over == "tokens" else 0)
    tokens, caches = (
        many[0] if axis is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
        for many, axis in zip(zip(*operands, strict=True), axes, strict=True)
    )

    def call(tokens, cache):
        qkv, slots, keywords = tokens
        return problems[0].call((qkv, cache, slots), keywords)

    got = qkv_cases.jit(jax.vmap(call, axes))(tokens, caches)
    for i, problem in enumerate(problems):
        problem.check(jax.tree.map(lambda a, i=i: a[i], got))


def test_vmap_of_grad():
    problem = Problem(tokens=4, norm="weight", head_dims=(16, 16), scale="scalar")
    problem.k_pages = np.zeros_like(problem.k_pages)
    operands, call = differentiable(problem)

    def loss(qkv):
        result = call({**operands, "qkv": qkv})
        return jnp.sum(result.query * 3) + jnp.sum(result.cache.k_pages**2)

    qkvs = jnp.stack([operands["qkv"], operands["qkv"] * 2])
    got = qkv_cases.jit(jax.vmap(jax.grad(loss)))(qkvs)
    for i in range(2):
        np.testing.assert_allclose(
            got[i], qkv_cases.jit(jax.grad(loss))(qkvs[i]), rtol=1e-5, atol=1e-4
        )
