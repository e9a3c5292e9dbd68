# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Attention over a dense or paged KV cache in jax.numpy: the specification of the operation.

Complete, slow and obvious. The stages are separate functions because the backward pass
applies the same stages to a chunk of keys at a time.
"""

import jax
import jax.numpy as jnp

from jax_attn._src.split_kv_attention.problem import Operands, Options


def reference(x: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """Returns the output `[B, T, N, Hv]` and the lse `[B, T, N]` (float32, natural log)."""
    positions = jnp.arange(max_context(x, options), dtype=jnp.int32)
    visible = visible_keys(x, options, positions, x.mask)
    key = dequantize(gather_keys(x.key, x, options), gather_scale(x.k_scale, x, options))
    value = dequantize(gather_keys(x.value, x, options), gather_scale(x.v_scale, x, options))
    key, value = (clear_unseen(a, visible) for a in (key, value))

    s = logits(
        x.query, key, x.bias, x.alibi_slopes, query_positions(x, options), positions, options
    )
    s = jnp.where(visible, s, -jnp.inf)
    top = jnp.max(s, axis=-1, initial=-jnp.inf)  # [B, N, T]
    if x.sinks is not None:
        sinks = x.sinks[None, :, None]
        top_with_sinks = jnp.maximum(top, sinks)
    else:
        sinks, top_with_sinks = None, top
    p = exp_difference(s, top_with_sinks[..., None])
    total = jnp.sum(p, axis=-1)
    denominator = total if sinks is None else total + exp_difference(sinks, top_with_sinks)
    out = jnp.einsum(
        "bkgts,bskh->btkgh", split_heads(p, key), value, precision=jax.lax.Precision.HIGHEST
    )
    out = out.reshape(*x.query.shape[:3], value.shape[-1])  # [B, T, N, Hv]
    scale_out = jnp.where(denominator == 0, 0, 1 / jnp.where(denominator == 0, 1, denominator))
    out = out * jnp.swapaxes(scale_out, 1, 2)[..., None]

    if not options.lse_includes_sinks:
        top_with_sinks, denominator = top, jnp.sum(exp_difference(s, top[..., None]), axis=-1)
    lse = jnp.where(denominator == 0, -jnp.inf, top_with_sinks + jnp.log(denominator))
    return out.astype(x.query.dtype), jnp.swapaxes(lse, 1, 2)


def exp_difference(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns exp(a - b) for a <= b: 0 if b is -inf, and 0 or 1 if b is inf.

    A maximum of -inf belongs to a row without visible keys, whose terms are all 0.
    """
    infinite = jnp.isinf(b)
    equal = jnp.where(a == jnp.inf, 1.0, 0.0)
    return jnp.where(infinite, equal, jnp.exp(a - jnp.where(infinite, 0, b)))


def max_context(x: Operands, options: Options) -> int:
    """Keys that a sequence can have: the length of the buffer, or of the page table."""
    if x.page_table is None:
        return x.key.shape[1]
    token_axis = -3 if options.page_layout == "NHD" else -2
    return x.page_table.shape[1] * x.key.shape[token_axis]


def context_lengths(x: Operands, options: Options) -> jax.Array:
    """Lengths within the buffer, int32 `[B]`."""
    longest = max_context(x, options)
    if x.kv_lengths is None:
        return jnp.full((x.query.shape[0],), longest, jnp.int32)
    return jnp.clip(x.kv_lengths, 0, longest)


def query_positions(x: Operands, options: Options) -> jax.Array:
    """Positions of the queries in their contexts, int32 `[B, T]`.

    Where the keys are a part of the context, positions count from the first of them.
    """
    steps = jnp.arange(x.query.shape[1], dtype=jnp.int32)[None, :]
    if x.query_offset is not None:
        return x.query_offset[:, None] + steps
    if options.causal == "top_left":
        return jnp.broadcast_to(steps, x.query.shape[:2])
    return context_lengths(x, options)[:, None] - x.query.shape[1] + steps


def visible_keys(
    x: Operands, options: Options, positions: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Which query sees which key: bool `[B, N or 1, T, S]` for the keys at `positions`."""
    key_position = positions[None, None, None, :]
    query_position = query_positions(x, options)[:, None, :, None]
    visible = key_position < context_lengths(x, options)[:, None, None, None]
    visible = jnp.broadcast_to(visible, (x.query.shape[0], 1, x.query.shape[1], positions.shape[0]))
    if options.causal is not None:
        visible &= key_position <= query_position
    if options.sliding_window is not None:
        visible &= key_position > query_position - options.sliding_window
    return visible if mask is None else visible & mask


def gather_keys(stored: jax.Array, x: Operands, options: Options) -> jax.Array:
    """Returns keys or values of each sequence in order, `[B, S, K, H]`, still quantised."""
    if x.page_table is None:
        return stored
    if options.page_layout == "HND":
        stored = jnp.swapaxes(stored, -3, -2)
    return gather_pages(stored, x.page_table, x.layer)


def gather_scale(scale: jax.Array | None, x: Operands, options: Options) -> jax.Array | None:
    """Returns the scale as an array that broadcasts to `[B, S, K]`."""
    if scale is None or scale.ndim == 0:
        return scale
    if scale.ndim <= 2:
        return (scale[x.layer] if scale.ndim == 2 else scale)[None, None, :]
    if x.page_table is None:
        return scale
    if options.page_layout == "HND":
        scale = jnp.swapaxes(scale, -2, -1)
    return gather_pages(scale, x.page_table, x.layer)


def gather_pages(pages: jax.Array, page_table: jax.Array, layer: jax.Array | None) -> jax.Array:
    """Gathers `[(L,) P, page_size, ...]` to `[B, S, ...]`; ids outside the pool are clipped."""
    if layer is not None:
        pages = jax.lax.dynamic_index_in_dim(pages, layer, keepdims=False)
    gathered = pages[clip_page_ids(page_table, pages.shape[0])]
    b, pages_per_sequence, page_size, *rest = gathered.shape
    return gathered.reshape(b, pages_per_sequence * page_size, *rest)


def clip_page_ids(page_table: jax.Array, num_pages: int) -> jax.Array:
    """Page ids inside the pool. Others are the caller's error, but read no other memory."""
    return jnp.clip(page_table, 0, max(num_pages - 1, 0))


def dequantize(stored: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Returns `stored * scale` in float32; `scale` broadcasts over head_dim."""
    values = stored.astype(jnp.float32)
    if scale is None:
        return values
    return values * (scale if scale.ndim == 0 else scale[..., None])


def clear_unseen(context: jax.Array, visible: jax.Array) -> jax.Array:
    """Zeroes keys that no query of their kv head sees, whatever is stored there."""
    seen = split_heads(visible, context).any(axis=(2, 3))  # [B, K or 1, S]
    return jnp.where(jnp.swapaxes(seen, 1, 2)[..., None], context, 0)


def split_heads(per_query_head: jax.Array, context: jax.Array) -> jax.Array:
    """Splits `[B, N or 1, T, S]` into `[B, K or 1, G, T, S]`."""
    b, n, t, s = per_query_head.shape
    k = context.shape[2] if n != 1 else 1
    return per_query_head.reshape(b, k, n // k, t, s)


def logits(
    query: jax.Array,
    key: jax.Array,
    bias: jax.Array | None,
    alibi_slopes: jax.Array | None,
    query_position: jax.Array,
    key_position: jax.Array,
    options: Options,
) -> jax.Array:
    """Returns `cap(scale * query . key) + bias - slope * distance`, float32 `[B, N, T, S]`."""
    b, t, n, h = query.shape
    k = key.shape[2]
    grouped = query.astype(jnp.float32).reshape(b, t, k, n // k, h)
    s = jnp.einsum("btkgh,bskh->bkgts", grouped, key, precision=jax.lax.Precision.HIGHEST)
    s = s.reshape(b, n, t, key.shape[1]) * options.scale
    if options.logits_soft_cap is not None:
        s = options.logits_soft_cap * jnp.tanh(s / options.logits_soft_cap)
    if bias is not None:
        s = s + bias.astype(jnp.float32)
    if alibi_slopes is not None:
        distance = jnp.abs(query_position[:, None, :, None] - key_position[None, None, None, :])
        s = s - alibi_slopes[None, :, None, None] * distance.astype(jnp.float32)
    return s
