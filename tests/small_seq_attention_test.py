# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Values and gradients of `small_seq_attention`, against the oracle in float64."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import small_seq_cases as cases
import support
from jax.experimental import checkify

import jax_attn

NATIVE = "cpu" in jax_attn.platforms()
needs_native = pytest.mark.skipif(
    not NATIVE, reason="this build of jax_attn has no kernels for the CPU"
)


@pytest.fixture
def small_variant(request, monkeypatch):
    cases.use_variant(request.param, monkeypatch)


every_variant = pytest.mark.parametrize("small_variant", support.VARIANTS, indirect=True)


# ---- Random problems


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(6))
def test_reference_solves_random_problem(seed):
    cases.random_problem(seed).check("xla")


@needs_native
@pytest.mark.fuzz
@pytest.mark.parametrize("seeds", [range(i, i + 10) for i in range(0, 30, 10)])
@every_variant
def test_variant_solves_random_problems(small_variant, seeds):
    for seed in seeds:
        try:
            cases.random_problem(seed).check("native")
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise


# ---- Shapes


def rng():
    return np.random.default_rng(0)


EDGES = {
    "empty_batch": {"batch": 0},
    "one_sequence": {"batch": 1},
    "primes": {"batch": 7, "num_q_heads": 13, "num_kv_heads": 13, "query_len": 3, "kv_len": 11},
    "one_of_everything": dict.fromkeys(
        ("batch", "query_len", "kv_len", "num_q_heads", "num_kv_heads"), 1
    ),
    "no_queries": {"query_len": 0},
    "no_keys": {"kv_len": 0},
    "no_q_heads": {"num_q_heads": 0},
    "longest": {"query_len": 32, "kv_len": 64, "head_dim": 8},
    "largest": {"head_dim": 512, "v_head_dim": 504},
    "mqa": {"num_q_heads": 37, "num_kv_heads": 1, "query_len": 5, "kv_len": 33},
    "all_empty": {"query_lengths": [0, 0, 0]},
    "no_keys_for_some": {"kv_lengths": [0, 6, 0]},
    "nothing_in_sight": {"kv_lengths": [2, 1, 3], "query_len": 5, "causal": "bottom_right"},
    "beyond_the_room": {"kv_lengths": [7, -1, support.INT_MAX], "query_lengths": [-5, 3, 9]},
}


@pytest.mark.parametrize("sizes", EDGES.values(), ids=EDGES)
def test_edges(sizes, implementation):
    cases.poison(cases.dense(rng(), bias="n", **sizes)).check(implementation)


PACKED_EDGES = {
    "no_sequences": {"query_bounds": [2], "kv_bounds": [0]},
    "all_empty": {"query_bounds": [3, 3, 3], "kv_bounds": [2, 4, 9]},
    "no_keys": {"query_bounds": [0, 3, 5], "kv_bounds": [9, 9, 9]},
    "too_long": {"query_bounds": [0, 6, 7], "kv_bounds": [0, 1, 9]},
    "decreasing": {"query_bounds": [4, 2, 6], "kv_bounds": [0, 5, 3]},
    "outside": {"query_bounds": [-3, 3, 99], "kv_bounds": [-9, -8, support.INT_MAX]},
    "holes": {
        "query_bounds": [1, 4, 6],
        "kv_bounds": [2, 5, 9],
        "query_lengths": [2, 1],
        "kv_lengths": [2, 9],
    },
}


@pytest.mark.parametrize("bounds", PACKED_EDGES.values(), ids=PACKED_EDGES)
def test_packed_edges(bounds, implementation):
    tokens = {"query_tokens": 7, "kv_tokens": 10, "max_q_len": 3, "max_kv_len": 4}
    problem = cases.packed(rng(), bias="bn", dtype="bfloat16", **tokens, **bounds)
    cases.poison(problem).check(implementation)


@pytest.mark.parametrize("tokens", [(0, 5), (5, 0), (0, 0)])
def test_packed_arrays_without_tokens(tokens, implementation):
    bounds = [np.minimum([0, 2, 5], count) for count in tokens]
    sizes = dict(zip(("query_tokens", "kv_tokens"), tokens, strict=True))
    problem = cases.packed(
        rng(), query_bounds=bounds[0], kv_bounds=bounds[1], max_q_len=3, max_kv_len=3, **sizes
    )
    problem.check(implementation)


@needs_native
def test_results_that_go_around_the_caches_are_the_same():
    # More than 8 MiB of results are written by other instructions.
    small = cases.dense(rng(), batch=64, query_len=2, kv_len=8, head_dim=64, dtype="bfloat16")
    expected = small.run("native")
    for copies in (16, 80):
        arrays = {n: np.tile(a, (copies, 1, 1, 1)) for n, a in small.arrays.items()}
        cotangents = {
            n: np.tile(a, (copies,) + (1,) * (a.ndim - 1)) for n, a in small.cotangents.items()
        }
        found = cases.Problem(arrays, small.options, cotangents).run("native")
        for name, array in found.items():
            first, last = array[:64], array[-64:]
            np.testing.assert_array_equal(first, expected[name])
            np.testing.assert_array_equal(last, expected[name])
    assert sum(a.nbytes for a in found.values()) > 2 * (8 << 20)


@needs_native
def test_repeated_calls_give_the_same_bits():
    problem = cases.random_problem(3)
    first, second = problem.run("native"), problem.run("native")
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_packed_is_dense_without_its_padding(implementation):
    lengths = {"query_lengths": [2, 0, 1], "kv_lengths": [4, 3, 6]}
    dense = cases.dense(rng(), bias="bnt", causal="bottom_right", **lengths)
    arrays, indices = {}, {}
    for side, names in (("query", ["query"]), ("kv", ["key", "value"])):
        counts = lengths[f"{side}_lengths"]
        indices[side] = [(b, t) for b, count in enumerate(counts) for t in range(count)]
        where = tuple(np.array(indices[side]).T)
        arrays |= {name: dense.arrays[name][where] for name in names}
        arrays[f"{side}_cu_seqlens"] = np.cumsum([0, *counts]).astype(np.int32)
    where = tuple(np.array(indices["query"]).T)
    cotangents = {name: array[where] for name, array in dense.cotangents.items()}
    arrays["bias"] = dense.arrays["bias"]
    options = {**dense.options, "max_q_len": 2, "max_kv_len": 6}
    packed = cases.Problem(arrays, options, cotangents).run(implementation)
    expected = dense.run(implementation)
    sides = {"out": "query", "lse": "query", "query": "query", "key": "kv", "value": "kv"}
    for name, array in expected.items():
        if name in sides:
            array = array[tuple(np.array(indices[sides[name]]).T)]
        np.testing.assert_allclose(packed[name], array, rtol=1e-6, atol=1e-6, err_msg=name)


# ---- Numbers


@every_variant
def test_infinite_bias_hides_keys(small_variant):
    bias = np.zeros((1, 4, 2, 6), np.float32)
    bias[:, :, :, 3:] = -np.inf
    bias[:, 1] = -np.inf  # all of a row
    problem = cases.dense(rng()).replace(bias=bias)
    for implementation in ("native", "xla"):
        found = problem.run(implementation)
        assert np.all(found["lse"][:, :, 1] == -np.inf)
        assert np.all(found["out"][:, :, 1] == 0)
        assert np.all(found["query"][:, :, 1] == 0)
        assert np.all(found["key"][:, 3:] == 0)
        assert np.all(found["bias"][..., 3:] == 0)
        assert all(np.isfinite(found[name]).all() for name in ("out", "query", "key", "value"))
    hidden = problem.replace(bias=None, kv_lengths=np.full(3, 3, np.int32)).run("native")
    for name in ("out", "lse"):
        seen = found[name][:, :, 2:]
        np.testing.assert_allclose(seen, hidden[name][:, :, 2:], rtol=1e-5, atol=1e-6)


@every_variant
def test_a_nan_stays_in_its_row(small_variant):
    problem = cases.dense(rng(), num_kv_heads=4)
    problem.arrays["query"][1, 1, 2, 3] = np.nan
    found = problem.run("native")
    for name in ("out", "lse", "query"):
        bad = np.zeros(found[name].shape[:3], bool)
        bad[1, 1, 2] = True
        assert np.isnan(found[name][bad]).all()
        assert np.isfinite(found[name][~bad]).all()


@every_variant
@pytest.mark.parametrize("dtype", support.FLOATS)
def test_large_logits(small_variant, dtype):
    problem = cases.dense(rng(), dtype=dtype, scale=20.0, bias="n")
    problem.check("native")


@pytest.mark.parametrize("name", ["scale", "causal", "logits_soft_cap", "bias", "kv_lengths"])
def test_every_option_has_an_effect(name, implementation):
    changes = {
        "scale": 1.0,
        "causal": "top_left",
        "logits_soft_cap": 0.5,
        "bias": np.arange(6, dtype=np.float32).reshape(1, 1, 1, 6),
        "kv_lengths": np.array([1, 2, 3], np.int32),
    }
    problem = cases.dense(rng())
    changed = problem.replace(**{name: changes[name]})
    found, expected = changed.check(implementation), problem.run(implementation)
    assert not np.allclose(found["out"], expected["out"], atol=1e-3)


# ---- Derivatives


def test_check_grads(implementation):
    problem = cases.dense(rng(), query_lengths=[2, 1, 2], kv_lengths=[6, 2, 0], bias="n")
    arrays = {name: jnp.asarray(a) for name, a in problem.arrays.items()}

    def of(floats):
        options = {"return_lse": True, "implementation": implementation, "logits_soft_cap": 2.0}
        out, lse = cases.call(arrays | floats, **options)
        return out, jnp.where(jnp.isfinite(lse), lse, 0)

    floats = {name: arrays[name] for name in ("query", "key", "value", "bias")}
    order = 2 if implementation == "native" else 1  # the second is the same code
    check = functools.partial(jax.test_util.check_grads, modes=["rev"], atol=0.02, rtol=0.02)
    check(jax.jit(of), (floats,), order=order)


def test_second_derivative_is_that_of_the_reference():
    arrays = {name: jnp.asarray(a) for name, a in cases.dense(rng(), bias="b").arrays.items()}

    def slope(implementation, query, key, bias):
        def loss(query, key, bias):
            x = arrays | {"query": query, "key": key, "bias": bias}
            out, lse = cases.call(x, return_lse=True, implementation=implementation)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

        gradients = jax.grad(loss, (0, 1, 2))(query, key, bias)
        return sum(jnp.sum(jnp.sin(3 * g)) for g in gradients)

    args = arrays["query"], arrays["key"], arrays["bias"]
    found, expected = (
        jax.jit(jax.grad(functools.partial(slope, implementation), (0, 1, 2)))(*args)
        for implementation in (None, "xla")
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_forward_mode_is_refused_by_jax():
    arrays = {name: jnp.asarray(a) for name, a in cases.dense(rng()).arrays.items()}
    query = arrays["query"]
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: cases.call(arrays | {"query": q}), (query,), (query,))


# ---- Lengths that are too long


def checked(problem):
    """The error that checkify finds, and the output."""
    arrays = {name: jnp.asarray(a) for name, a in problem.arrays.items()}
    function = checkify.checkify(lambda x: cases.call(x, debug_checks=True, **problem.options))
    error, out = jax.jit(function)(arrays)
    return error.get(), out


HINTS = {"query_tokens": 7, "kv_tokens": 10, "max_q_len": 3, "max_kv_len": 4}
GOOD = {"query_bounds": [0, 2, 5], "kv_bounds": [0, 4, 7]}
MISTAKES = {
    "query_too_long": ({"query_bounds": [0, 1, 5]}, "a sequence is longer than max_q_len=3."),
    "kv_too_long": ({"kv_bounds": [0, 5, 7]}, "a sequence is longer than max_kv_len=4."),
    "decreases": ({"kv_bounds": [3, 0, 4]}, "`kv_cu_seqlens` decreases."),
    "outside": (
        {"query_bounds": [5, 6, 8]},
        "`query_cu_seqlens` has a bound outside the 7 tokens that there are.",
    ),
    "negative": (
        {"query_bounds": [-1, 1, 2]},
        "`query_cu_seqlens` has a bound outside the 7 tokens that there are.",
    ),
    "no_room": (
        {"kv_lengths": [4, 4]},
        "`kv_lengths` is negative or more than `kv_cu_seqlens` has room for.",
    ),
    "negative_length": (
        {"query_lengths": [1, -1]},
        "`query_lengths` is negative or more than `query_cu_seqlens` has room for.",
    ),
}


@pytest.mark.parametrize("change, message", MISTAKES.values(), ids=MISTAKES)
def test_checkify_reports_mistakes_of_packing(change, message):
    error, out = checked(cases.packed(rng(), **{**HINTS, **GOOD, **change}))
    assert error is not None and f"small_seq_attention: {message}" in error
    assert np.isfinite(out).all()


@pytest.mark.parametrize("side, room", [("query", 2), ("kv", 6)])
def test_checkify_reports_lengths_beyond_the_room(side, room):
    for lengths in ([1, 2, room + 1], [-1, 2, 1]):
        error, _ = checked(cases.dense(rng(), **{f"{side}_lengths": lengths}))
        name = f"`{side}_lengths`"
        expected = f"small_seq_attention: {name} is negative or more than {side}_len={room}."
        assert error is not None and expected in error


def test_checkify_finds_nothing_wrong_with_what_is_right():
    good = cases.packed(rng(), **HINTS, **GOOD, kv_lengths=[4, 2])
    assert checked(good)[0] is None
    assert checked(cases.dense(rng(), query_lengths=[0, 1, 2], kv_lengths=[6, 0, 1]))[0] is None


def test_debug_checks_need_checkify():
    arrays = cases.dense(rng(), kv_lengths=[1, 2, 3]).arrays
    with pytest.raises(ValueError, match="checkify"):
        jax.jit(lambda x: cases.call(x, debug_checks=True))(arrays)
