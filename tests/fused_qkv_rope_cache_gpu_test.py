# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The GPU kernel of `fused_qkv_rope_cache`: the CPU kernel's tests, and capture in graphs.

Skipped where there is no GPU; tests/fused_qkv_gpu_source_test.py runs some of them without one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qkv_cases
import support
from fused_qkv_rope_cache_native_test import (  # noqa: F401 - collected here too
    chosen,
    native,
    test_donated_pages_and_scales_are_updated_in_place,
    test_gradients_do_not_keep_the_pages,
    test_large_calls_do_not_depend_on_how_they_are_cut,
    test_loops_over_layers_carry_the_cache,
    test_nan_and_infinity_pass,
    test_nested_vmap_of_different_operands,
    test_nested_vmap_up_to_the_limit,
    test_quantised_entries_are_those_of_float64,
    test_remat_and_cond,
    test_repeated_calls_give_the_same_bits,
    test_rows_of_zeros_get_scale_one,
    test_the_last_duplicate_wins_among_threads,
    test_variant_solves_the_covering_array,
    test_variant_takes_every_head_dim,
    test_without_donation_every_array_is_copied_once,
)
from qkv_cases import Problem, bits

import jax_attn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        support.PLATFORM == "cpu" or support.PLATFORM not in jax_attn.platforms(),
        reason="no GPU that this build of jax_attn has kernels for",
    ),
]


@pytest.fixture
def variant():
    """There is one for all problems."""


@pytest.mark.parametrize(
    ("tokens", "gate"),
    [(1, None), (33, None), (200, None), (2501, None)]
    + [(tokens, "interleaved") for tokens in (1, 33, 512, 513, 1103)],
)
def test_numbers_of_tokens(chosen, tokens, gate):  # noqa: F811
    rng = np.random.default_rng(tokens)
    # Of four tokens one has the slot of another, and some slots are past the end. Nobody but the
    # last token knows that the token at a third of them is not stored.
    slots = rng.integers(-3, 2 * tokens + 8, tokens)
    slots[rng.random(tokens) < 0.25] = slots[0]
    slots[slots == 2 * tokens] = -1
    slots[[tokens // 3, -1]] = 2 * tokens
    problem = Problem(
        tokens,
        slot_mapping=slots,
        norm="weight",
        gate=gate,
        dtype="bfloat16",
        cache_dtype="float32" if gate else "bfloat16",
    )
    problem.check(problem.run_eagerly())


@pytest.mark.parametrize(
    "options",
    [
        {"cache_dtype": "bfloat16"},
        {"cache_dtype": "int8", "scale": "head"},
        {"norm": "all_heads", "heads": (48, 8)},
        {"table": "bfloat16", "layers": 3, "layout": "HND"},
        {"pairing": "neighbours", "rotary": "first"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_kernels_of_models(chosen, options):  # noqa: F811
    plain = {"dtype": "bfloat16", "norm": "weight", "head_dims": (128, 128), "page_size": 16}
    problem = Problem(40, **{**plain, "heads": (32, 8), **options})
    problem.check(problem.run_eagerly())


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-33, 1e33, np.inf, np.nan])
def test_extreme_scales(chosen, scale):  # noqa: F811
    problem = Problem(scale="scalar", cache_dtype="float8_e5m2", norm="weight")
    problem.k_scale = problem.v_scale = np.float32(scale)
    got = problem.run_eagerly().cache
    problem.implementation = "xla"
    expected = problem.run_eagerly().cache
    np.testing.assert_array_equal(got.k_pages.astype("float32"), expected.k_pages.astype("float32"))


def test_unknown_variant(chosen, monkeypatch):  # noqa: F811
    support.use_variant("sse9", monkeypatch)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*'sse9' cannot"):
        jax.block_until_ready(Problem().run_eagerly())


def update_layers(problem, cache, qkv, slots):
    """A scan over layers, as in a model; returns the queries of all layers and the cache."""
    _, keywords = problem.arguments()
    del keywords["layer"]

    def layer(cache, index):
        result = problem.call((qkv, cache, slots), {**keywords, "layer": index})
        return result.cache, result.query

    return jax.lax.scan(layer, cache, jnp.arange(3, dtype=jnp.int32))


@pytest.mark.parametrize("tokens", [3, 600])
def test_captured_and_replayed(chosen, tokens):  # noqa: F811
    # From the second call on the loop's body is a graph that XLA replays; from the third nothing
    # but the graph runs.
    options = {"dtype": "bfloat16", "cache_dtype": "int8", "scale": "dynamic", "layers": 3}
    problem = Problem(tokens, norm="weight", **options)
    (qkv, cache, slots), _ = problem.arguments()
    slots = jnp.asarray(slots)
    jitted = jax.jit(
        functools.partial(update_layers, problem),
        donate_argnums=0,
        compiler_options={"xla_gpu_graph_min_graph_size": 1},
    )
    expected, queries = jax.tree.map(np.asarray, jitted(cache, qkv, slots))
    cache = problem.cache()
    for i in range(6):
        before = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(cache)]
        cache, again = jitted(cache, qkv, slots)
        assert [a.unsafe_buffer_pointer() for a in jax.tree.leaves(cache)] == before
        np.testing.assert_array_equal(bits(again), bits(queries))
        got = jax.tree.map(np.asarray, cache)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), got, expected)
        # Slots are read by the kernel, so a replay sees new ones: of no token.
        _, again = jitted(problem.cache(), -qkv, jnp.full_like(slots, -1 - i))
        assert not np.array_equal(bits(again), bits(queries))


def test_explain(chosen):  # noqa: F811
    problem = Problem(dtype="bfloat16", cache_dtype="int8", scale="head")
    (qkv, cache, slots), keywords = problem.arguments()
    update = jax.jit(
        lambda cache, qkv: problem.call((qkv, cache, slots), keywords), donate_argnums=0
    )
    (call,) = jax_attn.explain(update)(cache, qkv)
    assert (call.platform, call.implementation) == (support.PLATFORM, "native")
    assert (call.variant, call.scratch_bytes, call.cache_copies) == ("vector", 0, 0)


def test_every_case_of_the_covering_array_is_native(chosen):  # noqa: F811
    for case in qkv_cases.covering():
        problem = Problem(**case)
        (qkv, cache, slots), keywords = problem.arguments()
        call = functools.partial(problem.call, keywords=keywords)
        (explained,) = jax_attn.explain(lambda *a, call=call: call(a))(qkv, cache, slots)
        assert explained.implementation == "native", case
