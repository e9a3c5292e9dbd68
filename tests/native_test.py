# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels in every variant: values, capabilities, numerics and formats."""

import functools

import fuzz_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import jax_attn
from jax_attn._src import registration

pytestmark = pytest.mark.skipif(
    "cpu" not in jax_attn.platforms(), reason="this build of jax_attn has no kernels for the CPU"
)


VARIANTS = support.VARIANTS
CAPABILITIES = [
    row
    for row in jax_attn.ffi.capabilities()
    if (row["op"], row["platform"]) == ("split_kv_attention", "cpu")
]
F32_ULP = 2.0**-23


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
    support.use_variant(VARIANTS[0], monkeypatch)
    for expected, actual in zip(best, problem.run("native"), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_unknown_variant(monkeypatch):
    support.use_variant("sse9", monkeypatch)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*'sse9' cannot"):
        support.dense(np.random.default_rng(0)).run("native")


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
    query = support.struct(1, 1, 2, head_dim, dtype=query_dtype)
    key = support.struct(1, 4, 1, head_dim, dtype=cache_dtype)
    value = support.struct(1, 4, 1, v_head_dim, dtype=cache_dtype)
    call = functools.partial(jax_attn.split_kv_attention, implementation=implementation)
    return jax.jit(call).lower(query, key, value).as_text()


@pytest.mark.parametrize("row, query_dtype, cache_dtype", TABLE_DTYPES)
def test_table_accepts_dtypes(row, query_dtype, cache_dtype):
    assert support.TARGET in lower("native", query_dtype, cache_dtype)


def test_table_names_all_dtypes_that_the_op_takes():
    for row in CAPABILITIES:
        assert sorted(row["query_dtypes"]) == sorted(support.FLOATS)
        assert sorted(row["cache_dtypes"]) == sorted(support.FLOATS + support.QUANTIZED)


@pytest.mark.parametrize("which", ["head_dim", "v_head_dim"])
@pytest.mark.parametrize("row, size, accepted", TABLE_HEAD_DIMS)
def test_table_head_dims(row, size, accepted, which):
    if accepted:
        assert support.TARGET in lower("native", **{which: size})
        return
    reason = (
        f"head_dim {size} is not a multiple of {row['head_dim_multiple']} "
        f"up to {row['max_head_dim']}"
    )
    with pytest.raises(NotImplementedError, match=f'implementation="native".*: {reason}\\. Use'):
        lower("native", **{which: size})
    assert support.TARGET not in lower(None, **{which: size})


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
