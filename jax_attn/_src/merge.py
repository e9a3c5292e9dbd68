# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Merging attention over parts of a context into attention over all of it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_attn._src import checks, dtypes


def merge_attention(
    outs: jax.Array | Sequence[jax.Array],
    lses: jax.Array | Sequence[jax.Array],
    *,
    sinks: jax.Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Merges attention over disjoint parts of a context by log-sum-exp.

    The parts can be splits, a shared prefix and a suffix (cascade attention; Ye et al. 2024),
    or the shards of a mesh axis. An empty part, of lse -inf, changes nothing, not even the last
    bit. Differentiable in `outs`, `lses` and `sinks`.

    Args:
      outs: Normalised outputs, `[num_parts, batch, query_len, num_q_heads, v_head_dim]` or a
        sequence of `num_parts` arrays without the first dimension.
      lses: Their log-sum-exps, natural logarithm, float32 `[num_parts, batch, query_len,
        num_q_heads]` or a sequence. They must not count sinks if `sinks` is given.
      sinks: float `[num_q_heads]`, logits to count once in the denominator of the whole.
      axis_name: Mesh axes to merge over as well, inside `shard_map`: each device holds its own
        parts, and all get the result. One pmax and one psum of `out` and `lse` cross devices.

    Returns:
      The merged output, like a part, and its lse, float32 `[batch, query_len, num_q_heads]`.

    Raises:
      ValueError: If there are no parts, shapes disagree, or there is no such mesh axis.
      TypeError: If an argument has a dtype that is not accepted.
    """
    op = "merge_attention"
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"{op}: `outs` and `lses` must list the same parts, at least one; "
            f"got {len(outs)} and {len(lses)}."
        )
    dims = checks.Dims(op)
    for i in range(len(outs)):
        accepted = dtypes.FLOAT_DTYPES if i == 0 else (outs[0].dtype,)
        checks.check_dtype(op, f"outs[{i}]", outs[i], accepted)
        checks.check_dtype(op, f"lses[{i}]", lses[i], (jnp.float32,))
        dims.bind(f"outs[{i}]", outs[i], "batch query_len num_q_heads v_head_dim")
        dims.bind(f"lses[{i}]", lses[i], "batch query_len num_q_heads")
    out = outs if isinstance(outs, jax.Array) else jnp.stack(list(outs))
    lse = lses if isinstance(lses, jax.Array) else jnp.stack(list(lses))
    if sinks is not None:
        checks.check_dtype(op, "sinks", sinks, dtypes.FLOAT_DTYPES)
        dims.bind("sinks", sinks, "num_q_heads")
        sinks = sinks.astype(jnp.float32)
    if axis_name is not None:
        axis_name = checks.mesh_axes(op, "axis_name", axis_name)
    return _merge(out, lse, sinks, axis_name, lse_includes_sinks=True)


def merge_shards(
    out: jax.Array,
    lse: jax.Array,
    sinks: jax.Array | None,
    axes: tuple[str, ...],
    *,
    lse_includes_sinks: bool,
) -> tuple[jax.Array, jax.Array]:
    """Merges one part of each device over mesh axes, under any number of vmap dimensions."""
    return _merge(out[None], lse[None], sinks, axes, lse_includes_sinks=lse_includes_sinks)


def _merge(
    out: jax.Array,
    lse: jax.Array,
    sinks: jax.Array | None,
    axes: tuple[str, ...] | None,
    *,
    lse_includes_sinks: bool,
) -> tuple[jax.Array, jax.Array]:
    """Merges parts along the first dimension, and over mesh axes."""
    dtype = out.dtype
    # The maximum only keeps the exponentials in range: its gradient cancels.
    top = jax.lax.stop_gradient(jnp.max(lse, axis=0, keepdims=True))
    if axes is not None:
        top = jax.lax.pmax(top, axes)
    weight = _exp_difference(lse, top)
    # An empty part may hold NaN from a kernel of someone else; its weight of 0 must win.
    weighted = jnp.where(weight[..., None] > 0, out.astype(jnp.float32), 0) * weight[..., None]
    total = jnp.sum(weight, axis=0, keepdims=True)
    merged = jnp.sum(weighted, axis=0)
    if axes is not None:
        total, merged = jax.lax.psum((total, merged), axes)
    merged_lse = _log_sum(top, total)
    if sinks is not None:
        # [..., num_q_heads] to [1, ..., batch, query_len, num_q_heads]
        sinks = jnp.expand_dims(sinks, (-3, -2))
        sinks = jax.lax.expand_dims(sinks, range(lse.ndim - sinks.ndim))
        top_of_all = jnp.maximum(top, jax.lax.stop_gradient(sinks))
        factor = _exp_difference(top, top_of_all)
        total = total * factor + _exp_difference(sinks, top_of_all)
        merged = merged * factor[0, ..., None]
        if lse_includes_sinks:
            merged_lse = _log_sum(top_of_all, total)
    merged = merged / jnp.where(total == 0, 1, total)[0, ..., None]
    return merged.astype(dtype), merged_lse[0]


def _log_sum(top: jax.Array, total: jax.Array) -> jax.Array:
    """Returns top + log(total), -inf for a total of 0."""
    empty = total == 0
    return jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1, total)))


def _exp_difference(logit: jax.Array, top: jax.Array) -> jax.Array:
    """Returns exp(logit - top) for logit <= top, where inf - inf is 0 and -inf - -inf is -inf."""
    difference = logit - jnp.where(jnp.isinf(top), 0, top)
    # An infinite sink outweighs all finite parts.
    of_infinite = jnp.where(jnp.isposinf(logit), 0.0, -jnp.inf)
    return jnp.exp(jnp.where(jnp.isposinf(top), of_infinite, difference))
