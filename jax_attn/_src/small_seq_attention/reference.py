# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Attention of short sequences in jax.numpy: the specification of the operation.

Complete, slow and obvious, and differentiable any number of times.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jax_attn._src.small_seq_attention.problem import Operands, Options
from jax_attn._src.split_kv_attention import reference as stages


def reference(x: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """Returns the output, like query with v_head_dim, and the lse without it (float32)."""
    return _packed(x, options) if options.packed else _dense(x, options)


def gradients(
    x: Operands, options: Options, dout: jax.Array, dlse: jax.Array | None
) -> dict[str, jax.Array]:
    """Returns the cotangents of query, key and value, and of the bias.

    That of the bias is float32 `[B, N, T, S]`, not summed over what the bias is broadcast to.
    """
    arrays = {"query": x.query, "key": x.key, "value": x.value}
    if x.bias is not None:
        shape = _logits_shape(x, options)
        arrays["bias"] = jnp.broadcast_to(x.bias.astype(jnp.float32), shape)

    def forward(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return reference(dataclasses.replace(x, **arrays), options)

    (_, lse), pull = jax.vjp(forward, arrays)
    (found,) = pull((dout, jnp.zeros_like(lse) if dlse is None else dlse))
    return found


def _logits_shape(x: Operands, options: Options) -> tuple[int, ...]:
    """[B, N, T, S]."""
    num_q_heads = x.query.shape[-2]
    if not options.packed:
        return (x.query.shape[0], num_q_heads, x.query.shape[1], x.key.shape[1])
    assert x.query_cu_seqlens is not None and options.max_q_len and options.max_kv_len
    num_sequences = x.query_cu_seqlens.shape[0] - 1
    return (num_sequences, num_q_heads, options.max_q_len, options.max_kv_len)


def _packed(x: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """Gathers the sequences into dense arrays, attends, and puts the rows back."""
    query_lengths, query_index = _tokens(
        x.query_cu_seqlens, x.query_lengths, x.query.shape[0], options.max_q_len
    )
    kv_lengths, kv_index = _tokens(
        x.kv_cu_seqlens, x.kv_lengths, x.key.shape[0], options.max_kv_len
    )

    def gather(tokens: jax.Array, index: jax.Array) -> jax.Array:
        # One more token, of zeros, for what a sequence does not have.
        return jnp.pad(tokens, ((0, 1), (0, 0), (0, 0)))[index]

    dense = Operands(
        query=gather(x.query, query_index),
        key=gather(x.key, kv_index),
        value=gather(x.value, kv_index),
        bias=x.bias,
        query_lengths=query_lengths,
        kv_lengths=kv_lengths,
    )
    out, lse = _dense(dense, options)
    num_tokens, num_q_heads, _ = x.query.shape
    packed_out = jnp.zeros((num_tokens + 1, num_q_heads, x.value.shape[-1]), out.dtype)
    packed_lse = jnp.full((num_tokens + 1, num_q_heads), -jnp.inf, lse.dtype)
    return (
        packed_out.at[query_index].set(out)[:num_tokens],
        packed_lse.at[query_index].set(lse)[:num_tokens],
    )


def _tokens(
    cu_seqlens: jax.Array | None, lengths: jax.Array | None, num_tokens: int, longest: int | None
) -> tuple[jax.Array, jax.Array]:
    """Returns the length of each sequence `[B]`, and where its tokens are `[B, longest]`.

    The index is `num_tokens`, one more than there are, for tokens that a sequence does not have.
    Bounds that are out of range or decrease are the caller's error; they are clipped and raised to
    the one before, so that sequences never overlap.
    """
    assert cu_seqlens is not None and longest is not None
    bounds = jax.lax.cummax(jnp.clip(cu_seqlens, 0, num_tokens))
    room = jnp.minimum(bounds[1:] - bounds[:-1], longest)
    length = room if lengths is None else jnp.clip(lengths, 0, room)
    step = jnp.arange(longest, dtype=jnp.int32)[None, :]
    index = jnp.where(step < length[:, None], bounds[:-1, None] + step, num_tokens)
    return length, index


def _dense(x: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    visible = _visible_keys(x, options)  # [B, 1, T, S]
    sees = visible.any(axis=3)[:, 0, :, None]  # [B, T, 1]
    # What has no part in the result is cleared, whatever is there: a gradient of 0 times NaN
    # would not be 0.
    query = jnp.where(sees[..., None], x.query, 0)
    key, value = (stages.clear_unseen(a.astype(jnp.float32), visible) for a in (x.key, x.value))

    s = _logits(query, key, x.bias, options)
    s = jnp.where(visible, s, -jnp.inf)  # [B, N, T, S]
    # The maximum only keeps the exponentials in range: its gradient cancels.
    top = jax.lax.stop_gradient(jnp.max(s, axis=-1, initial=-jnp.inf))
    p = stages.exp_difference(s, top[..., None])
    total = jnp.sum(p, axis=-1)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    weights = p / total[..., None]
    b, t, n, _ = x.query.shape
    out = jnp.einsum(
        "bkgts,bskh->btkgh",
        stages.split_heads(weights, key),
        value,
        precision=jax.lax.Precision.HIGHEST,
    ).reshape(b, t, n, value.shape[-1])
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    # Chosen by what a row sees, so that cotangents of other rows have no effect either.
    out = jnp.where(sees[..., None], out, 0).astype(x.query.dtype)
    return out, jnp.where(sees, jnp.swapaxes(lse, 1, 2), -jnp.inf)


def _visible_keys(x: Operands, options: Options) -> jax.Array:
    """Which query sees which key: bool `[B, 1, T, S]`."""
    b, t, s = *x.query.shape[:2], x.key.shape[1]

    def lengths_or(lengths: jax.Array | None, longest: int) -> jax.Array:
        if lengths is None:
            return jnp.full((b, 1, 1, 1), longest, jnp.int32)
        return jnp.clip(lengths, 0, longest)[:, None, None, None]

    query_length, kv_length = lengths_or(x.query_lengths, t), lengths_or(x.kv_lengths, s)
    query_step = jnp.arange(t, dtype=jnp.int32)[None, None, :, None]
    position = jnp.arange(s, dtype=jnp.int32)[None, None, None, :]
    visible = (query_step < query_length) & (position < kv_length)
    if options.causal == "top_left":
        visible &= position <= query_step
    elif options.causal == "bottom_right":
        visible &= position <= kv_length - query_length + query_step
    return visible


def _logits(
    query: jax.Array, key: jax.Array, bias: jax.Array | None, options: Options
) -> jax.Array:
    """Returns `cap(scale * query . key) + bias`, float32 `[B, N, T, S]`."""
    b, t, n, h = query.shape
    k = key.shape[2]
    grouped = query.astype(jnp.float32).reshape(b, t, k, n // k, h)
    s = jnp.einsum("btkgh,bskh->bkgts", grouped, key, precision=jax.lax.Precision.HIGHEST)
    s = s.reshape(b, n, t, key.shape[1]) * options.scale
    if options.logits_soft_cap is not None:
        s = options.logits_soft_cap * jnp.tanh(s / options.logits_soft_cap)
    return s if bias is None else s + bias.astype(jnp.float32)
