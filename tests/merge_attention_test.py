# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Merging parts of a context by log-sum-exp."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_attn

merge = jax.jit(jax_attn.merge_attention)


def parts(count, dtype=np.float32, shape=(2, 3, 4, 8)):
    rng = np.random.default_rng(count)
    outs = rng.standard_normal((count, *shape)).astype(dtype)
    lses = 3 * rng.standard_normal((count, *shape[:-1])).astype(np.float32)
    return outs, lses


def expected_merge(outs, lses, sinks=None):
    """The merge in float64, for parts that are finite or empty."""
    outs, lses = outs.astype(np.float64), lses.astype(np.float64)
    lse = np.logaddexp.reduce(lses, axis=0)
    if sinks is not None:
        lse = np.logaddexp(lse, np.asarray(sinks, np.float64))
    weights = np.exp(lses - np.where(np.isneginf(lse), 0, lse))
    return np.sum(np.where(weights[..., None] > 0, outs, 0) * weights[..., None], axis=0), lse


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("sinks", [None, np.linspace(-1, 4, 4, dtype=np.float32)])
def test_values(dtype, sinks):
    outs, lses = parts(5, dtype)
    lses[1, 0] = lses[:, 1, 2] = -np.inf
    outs[1, 0] = np.nan  # an empty part may hold anything
    outs[:, 1, 2] = np.nan
    out, lse = map(np.asarray, merge(outs, lses, sinks=sinks))
    expected, expected_lse = expected_merge(outs, lses, sinks)
    assert out.dtype == dtype
    np.testing.assert_allclose(
        out.astype(np.float64), expected, rtol=jnp.finfo(dtype).eps, atol=1e-6
    )
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)
    assert not out[1, 2].any()
    in_list, lse_of_list = merge(list(outs), tuple(lses), sinks=sinks)
    np.testing.assert_array_equal(in_list, out)
    np.testing.assert_array_equal(lse_of_list, lse)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_empty_parts_change_no_bit(count, dtype):
    outs, lses = parts(count, dtype)
    outs[1:], lses[1:] = np.nan, -np.inf
    order = np.random.default_rng(0).permutation(count)
    out, lse = merge(outs[order], lses[order])
    assert np.asarray(out).tobytes() == outs[0].tobytes()
    assert np.asarray(lse).tobytes() == lses[0].tobytes()


def test_merge_of_empty_parts_is_empty():
    outs, lses = parts(3)
    lses[:] = -np.inf
    for sinks in (None, np.full(4, -np.inf, np.float32)):
        out, lse = merge(outs, lses, sinks=sinks)
        assert not np.asarray(out).any()
        np.testing.assert_array_equal(lse, -np.inf)
    _, lse = merge(outs, lses, sinks=np.arange(4, dtype=np.float32))
    np.testing.assert_array_equal(lse, np.broadcast_to(np.arange(4), lse.shape))


def test_infinite_logits():
    # A sink of +inf takes all the weight, given here or already counted in a part.
    outs, lses = parts(2)
    sinks = np.array([np.inf, 0, -np.inf, 0], np.float32)
    out, lse = merge(outs, lses, sinks=sinks)
    np.testing.assert_array_equal(out[:, :, 0], 0)
    np.testing.assert_array_equal(lse[:, :, 0], np.inf)
    np.testing.assert_array_equal(out[:, :, 2], merge(outs, lses)[0][:, :, 2])
    outs[0], lses[0] = 0, np.inf
    out, lse = merge(outs, lses)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, np.inf)


def test_lse_far_outside_the_range_of_exp():
    outs, lses = parts(4)
    for shift in (-1e4, 1e4):
        out, lse = merge(outs, lses + np.float32(shift))
        expected, expected_lse = expected_merge(outs, lses + np.float32(shift))
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)


def test_merging_in_steps_is_merging_at_once():
    outs, lses = parts(6)
    left, right = merge(outs[:2], lses[:2]), merge(outs[2:], lses[2:])
    stepwise = merge([left[0], right[0]], [left[1], right[1]])
    for a, b in zip(stepwise, merge(outs, lses), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_gradients():
    outs, lses = parts(3, shape=(1, 2, 2, 3))
    sinks = np.array([0.5, -1], np.float32)

    def loss(outs, lses, sinks):
        out, lse = jax_attn.merge_attention(outs, lses, sinks=sinks)
        return jnp.sum(jnp.cos(out)) + jnp.sum(jnp.sin(lse))

    jax.test_util.check_grads(loss, (outs, lses, sinks), order=1, modes=["rev"], rtol=1e-2)
    lses[1] = lses[:, 0, 0] = -np.inf
    d_outs, d_lses, d_sinks = jax.grad(loss, argnums=(0, 1, 2))(outs, lses, sinks)
    for gradient in (d_outs, d_lses, d_sinks):
        assert np.all(np.isfinite(gradient))
    for gradient in (d_outs, d_lses):
        empty = np.isneginf(lses)
        assert not np.asarray(gradient)[empty].any()
        assert np.asarray(gradient)[~empty].any()


@pytest.mark.parametrize("axis_name", ["x", ("x", "y")])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_merging_over_devices_is_merging_their_parts(axis_name, with_sinks):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    outs, lses = parts(8)
    lses[0] = lses[5] = lses[:, 1, 1] = -np.inf
    sinks = np.arange(4, dtype=np.float32) if with_sinks else None
    arguments = {"outs": outs, "lses": lses} | ({"sinks": sinks} if with_sinks else {})
    merged = jax.jit(
        jax.shard_map(
            lambda x: jax_attn.merge_attention(**x, axis_name=axis_name),
            mesh=mesh,
            in_specs=({name: P() if name == "sinks" else P(axis_name) for name in arguments},),
            out_specs=P(),
        )
    )(arguments)
    for a, b in zip(merged, merge(outs, lses, sinks=sinks), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8), (2, 3, 4, 0)])
def test_zero_sizes(shape):
    outs, lses = parts(2, shape=shape)
    out, lse = merge(outs, lses)
    assert out.shape == shape
    np.testing.assert_allclose(lse, np.logaddexp(*lses), rtol=1e-6)
