# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Fused QKV split, norm, rotation and cache write: values, and caches in place."""

import re

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import qkv_cases
import qkv_oracle
from qkv_cases import INT_MAX, Problem, bits, ulps

from jax_attn._src.fused_qkv_rope_cache.api import fused_qkv_rope_cache
from jax_attn._src.kv_cache import PagedKVCache

EVERYTHING = {"gate": "interleaved", "norm": "weight", "rotary": "first", "positions": "offsets"}
QUANTIZED = qkv_oracle.QUANTIZED


@pytest.fixture(autouse=True)
def chosen(implementation, monkeypatch):
    monkeypatch.setattr(Problem, "implementation", implementation)


def case_id(case):
    return "-".join(str(value).replace(" ", "") for value in case.values())


@pytest.mark.parametrize("case", qkv_cases.covering(), ids=case_id)
def test_values_match_float64(case):
    problem = Problem(**case)
    problem.check(problem.run())


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_slots_outside_the_cache_are_skipped(layout):
    problem = Problem(tokens=6, layout=layout, layers=3)
    capacity = problem.cache().num_pages * problem.cache().page_size
    outside = [-1, capacity, capacity + 1, INT_MAX, -INT_MAX - 1, -capacity]
    problem.slot_mapping = np.int32(outside)
    result = problem.run()
    problem.check(result)
    np.testing.assert_array_equal(result.cache.k_pages, problem.k_pages)
    np.testing.assert_array_equal(result.cache.v_pages, problem.v_pages)
    assert np.all(np.abs(result.key).sum(axis=-1) > 0)


@pytest.mark.parametrize("page_size", [1, 4])
def test_last_of_duplicate_slots_is_stored(page_size):
    slots = np.random.default_rng(1).integers(-2, 8, 64)
    problem = Problem(tokens=64, slot_mapping=slots, page_size=page_size, pairing=None)
    results = [problem.run() for _ in range(2)]
    problem.check(results[0])
    np.testing.assert_array_equal(bits(results[0].cache.k_pages), bits(results[1].cache.k_pages))


def test_int64_slots():
    problem = Problem(tokens=5, pairing=None)
    slots = np.int64([3, 2**32 + 1, 2**31, -(2**32) + 2, 0])
    problem.slot_mapping = slots
    expected = qkv_oracle.fill_pages(
        problem.k_pages, np.asarray(problem.run_eagerly().key), slots, "NHD"
    )
    np.testing.assert_array_equal(problem.run_eagerly().cache.k_pages, expected)
    with jax.enable_x64(True):
        assert jnp.asarray(slots).dtype == jnp.int64
        np.testing.assert_array_equal(problem.run().cache.k_pages, expected)


@pytest.mark.parametrize("layers", [None, 2])
def test_zero_tokens_leave_the_cache_alone(layers):
    problem = Problem(tokens=0, layers=layers, cache_dtype="int8", **EVERYTHING)
    result = problem.run()
    problem.check(result)
    assert result.query.shape == (0, 4, 64) and result.gate.shape == (0, 4, 64)
    assert result.key.shape == (0, 2, 64) and result.value.shape == (0, 2, 64)


def test_cache_without_pages():
    cache = PagedKVCache.zeros(0, 16, 1, 8)
    qkv = jnp.ones((3, 24))
    result = fused_qkv_rope_cache(qkv, cache, jnp.arange(3), num_q_heads=1)
    assert result.cache.k_pages.shape == (0, 16, 1, 8) and result.key.shape == (3, 1, 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cached_keys_are_the_returned_keys(dtype):
    problem = Problem(dtype=dtype, cache_dtype=dtype, tokens=4, slot_mapping=[5, 0, 7, 2])
    for seen in (problem.run(), problem.run_eagerly()):
        pages = seen.cache.k_pages.reshape(-1, 2, 64), seen.cache.v_pages.reshape(-1, 2, 64)
        np.testing.assert_array_equal(bits(pages[0])[[5, 0, 7, 2]], bits(seen.key))
        np.testing.assert_array_equal(bits(pages[1])[[5, 0, 7, 2]], bits(seen.value))


def test_a_wider_cache_holds_the_rounded_keys():
    problem = Problem(dtype="bfloat16", cache_dtype="float32", tokens=64, slot_mapping=range(64))
    result = problem.run_eagerly()
    stored = result.cache.k_pages.reshape(-1, 2, 64)[:64]
    np.testing.assert_array_equal(stored, result.key.astype(jnp.float32))


@pytest.mark.parametrize("scale", [None, "head"])
@pytest.mark.parametrize("cache_dtype", QUANTIZED)
def test_quantised_caches_saturate(cache_dtype, scale):
    values = [1e6, -1e6, np.inf, -np.inf, np.nan, 0.0, 3.5, -2.5]
    problem = Problem(
        slot_mapping=range(8), cache_dtype=cache_dtype, scale=scale, pairing=None, heads=(1, 1)
    )
    problem.x["qkv"][:] = np.float32(values)[:, None]
    result = problem.run()
    problem.check(result)
    stored = np.asarray(result.cache.v_pages).reshape(-1, 1, 64)[:8, 0, 0].astype(np.float32)
    largest = 127 if cache_dtype == "int8" else float(jnp.finfo(cache_dtype).max)
    smallest = -128 if cache_dtype == "int8" else -largest
    np.testing.assert_array_equal(stored[:4], [largest, smallest, largest, smallest])
    assert stored[4] == 0 if cache_dtype == "int8" else np.isnan(stored[4])
    if scale is None:
        rounded = [0, 4, -2] if cache_dtype == "int8" else [0, 3.5, -2.5]  # to even
        np.testing.assert_array_equal(stored[5:], rounded)


def test_positions_outside_the_table_are_clipped():
    problem = Problem(tokens=4, slot_mapping=range(4))
    ends = {}
    for name, positions in {"out": [-5, 33, INT_MAX, -INT_MAX - 1], "in": [0, 32, 32, 0]}.items():
        problem.x["positions"] = np.int32(positions)
        ends[name] = problem.run_eagerly()
    jax.tree.map(np.testing.assert_array_equal, ends["out"], ends["in"])


def full_copies(compiled, pages):
    """The instructions of a compiled program that copy an array of the shape of `pages`."""
    shape = re.escape(f"[{','.join(map(str, pages.shape))}]")
    lines = compiled.as_text().splitlines()
    return [line for line in lines if re.search(rf"= \S*{shape}\S* (copy|transpose)\(", line)]


@pytest.mark.parametrize(
    "cache_dtype, layout, layers",
    [
        ("float32", "NHD", None),
        ("bfloat16", "HND", 3),
        ("int8", "NHD", 3),
        ("float8_e4m3fn", "HND", None),
    ],
)
def test_donated_cache_is_written_in_place(cache_dtype, layout, layers):
    problem = Problem(
        cache_dtype=cache_dtype, layout=layout, layers=layers, scale="token", dtype="bfloat16"
    )
    (qkv, cache, slots), keywords = problem.arguments()

    def update(cache, qkv, slots, keywords):
        return problem.call((qkv, cache, slots), keywords).cache

    rest = (qkv, slots, keywords)
    compiled = qkv_cases.jit(update, donate_argnums=0).lower(cache, *rest).compile()
    assert not full_copies(compiled, cache.k_pages)
    kept = qkv_cases.jit(update)(cache, *rest)
    pointer = cache.k_pages.unsafe_buffer_pointer()
    donated = compiled(cache, *rest)
    assert donated.k_pages.unsafe_buffer_pointer() == pointer
    assert cache.k_pages.is_deleted()
    np.testing.assert_array_equal(bits(donated.k_pages), bits(kept.k_pages))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_scan_over_layers(layout):
    problem = Problem(layers=3, layout=layout, dtype="bfloat16", cache_dtype="bfloat16")
    (qkv, cache, slots), keywords = problem.arguments()
    del keywords["layer"]
    qkvs = jnp.stack([qkv * factor for factor in (1, 2, 3)])

    def step(cache, layer_qkv):
        layer, qkv = layer_qkv
        result = problem.call((qkv, cache, slots), {**keywords, "layer": layer})
        return result.cache, result.query

    def model(cache, qkvs):
        return jax.lax.scan(step, cache, (jnp.arange(3), qkvs))

    expected, queries = cache, []
    for i in range(3):
        expected, query = step(expected, (i, qkvs[i]))
        queries.append(query)
    compiled = qkv_cases.jit(model, donate_argnums=0).lower(cache, qkvs).compile()
    assert not full_copies(compiled, cache.k_pages)
    pointer = cache.k_pages.unsafe_buffer_pointer()
    scanned, scanned_queries = compiled(cache, qkvs)
    assert scanned.k_pages.unsafe_buffer_pointer() == pointer
    # Another program may add in another order before it rounds.
    assert ulps(scanned.k_pages, expected.k_pages).max() <= 1
    assert ulps(scanned.v_pages, expected.v_pages).max() == 0
    assert ulps(scanned_queries, np.stack(queries)).max() <= 1


@pytest.mark.parametrize("layer", [-1, 3, INT_MAX])
def test_traced_layer_outside_the_cache_stores_nothing(layer):
    problem = Problem(layers=3)
    problem.layer = np.int32(layer)
    result = problem.run_eagerly()
    assert ulps(result.cache.k_pages, problem.k_pages).max() == 0
