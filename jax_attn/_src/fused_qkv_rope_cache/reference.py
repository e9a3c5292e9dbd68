# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Split, norm, rotation and cache write in jax.numpy: the specification of the operation.

Complete, slow and obvious; but the cache is written by a scatter into the whole of it, so that
it stays in place when donated, also in a scan over layers.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_attn._src import dtypes
from jax_attn._src.fused_qkv_rope_cache.problem import Operands, Options
from jax_attn._src.kv_cache import PageLayout

Slots = tuple[jax.Array, jax.Array]


def reference(x: Operands, options: Options) -> dict[str, jax.Array]:
    """Returns the results by name: query `[tokens, N, H]`, gate, key, value, pages and scales."""
    query, gate, key, value = split(x, options)
    dtype = x.qkv.dtype
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    if options.epsilon is not None:
        query = normalize(query, x.q_weight, options.epsilon, options)
        key = normalize(key, x.k_weight, options.epsilon, options)
        if options.normalize_v:
            value = normalize(value.astype(jnp.float32), None, options.epsilon, options)
    if options.rotary_dim is not None:
        cos, sin = angles(x, options)
        query = rotate(query, cos, sin, options.rotary_dim, options)
        key = rotate(key, cos, sin, options.rotary_dim, options)
    query, key, value = query.astype(dtype), key.astype(dtype), value.astype(dtype)
    # The cache holds what is returned. Without the barrier XLA may drop the rounding to the
    # dtype of qkv, being allowed excess precision, and quantise the float32 value.
    key, value = lax.optimization_barrier((key, value))

    results = {"query": query, "key": key, "value": value}
    if gate is not None:
        results["gate"] = gate
    slots = locate(x, options)
    for name, new, pages, scale in (
        ("k", key, x.k_pages, x.k_scale),
        ("v", value, x.v_pages, x.v_scale),
    ):
        divisor = None
        if options.dynamic_scales:
            assert scale is not None
            divisor = dynamic_scale(new, pages.dtype)
            at = index(slots, x.layer, options.page_layout)
            written = scale.at[at].set(divisor[..., 0], mode="drop", unique_indices=True)
            results[f"{name}_scale"] = written
        elif scale is not None:
            divisor = scale_of(scale, slots, x.layer, options.page_layout)
        results[f"{name}_pages"] = store(new, pages, divisor, slots, x, options)
    return results


def split(
    x: Operands, options: Options
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    """Splits qkv into query, gate or None, key and value, `[tokens, heads, head_dim]`."""
    tokens = x.qkv.shape[0]
    n, h = options.num_q_heads, x.k_pages.shape[-1]
    k = x.k_pages.shape[-2 if options.page_layout == "NHD" else -3]
    q_columns = n * h * (1 if options.gate is None else 2)
    query, key, value = jnp.split(x.qkv, [q_columns, q_columns + k * h], axis=1)
    gate = None
    if options.gate is None:
        query = query.reshape(tokens, n, h)
    elif options.gate == "interleaved":
        both = query.reshape(tokens, n, 2, h)
        query, gate = both[:, :, 0], both[:, :, 1]
    else:
        both = query.reshape(tokens, 2, n, h)
        query, gate = both[:, 0], both[:, 1]
    return query, gate, key.reshape(tokens, k, h), value.reshape(tokens, k, x.v_pages.shape[-1])


def normalize(
    a: jax.Array, weight: jax.Array | None, epsilon: float, options: Options
) -> jax.Array:
    """Returns the RMSNorm of float32 `[tokens, heads, head_dim]`."""
    over = -1 if options.norm_scope == "head" else (-2, -1)
    mean_square = jnp.mean(a * a, axis=over, keepdims=True)
    a = a * lax.rsqrt(mean_square + epsilon)
    if weight is None:
        return a
    factor = options.weight_offset + weight.astype(jnp.float32)
    heads = 1 if options.norm_scope == "head" else a.shape[1]
    return a * factor.reshape(1, heads, a.shape[2])


def angles(x: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and sines of each token, float32 `[tokens, 1, width]`."""
    assert x.cos is not None and x.sin is not None and x.positions is not None
    positions = x.positions
    if x.offsets is not None:
        positions = positions + jnp.broadcast_to(x.offsets, positions.shape)
    cos = jnp.take(x.cos, positions, axis=0, mode="clip").astype(jnp.float32)
    sin = jnp.take(x.sin, positions, axis=0, mode="clip").astype(jnp.float32)
    if options.mrope_sections is not None:
        axis = mrope_axes(options.mrope_sections, options)[None, :]
        cos, sin = (
            jnp.where(axis == 0, a[0], jnp.where(axis == 1, a[1], a[2])) for a in (cos, sin)
        )
    return cos[:, None, :], sin[:, None, :]


def mrope_axes(sections: tuple[int, int, int], options: Options) -> np.ndarray:
    """Which of the three positions turns each column of the table: int `[width]`."""
    pairs = np.arange(sum(sections))
    axes = np.repeat(np.arange(3), sections)
    if options.mrope_interleaved:
        turn = pairs % 3
        axes = np.where(pairs < 3 * np.asarray(sections)[turn], turn, 0)
    if options.table_width == "half":
        return axes
    return np.repeat(axes, 2) if options.interleaved else np.tile(axes, 2)


def rotate(
    a: jax.Array, cos: jax.Array, sin: jax.Array, rotary_dim: int, options: Options
) -> jax.Array:
    """Rotates the pairs of the rotary dims of float32 `[tokens, heads, head_dim]`."""
    passing = a.shape[-1] - rotary_dim
    start = passing if options.nope_first else 0
    before, span, after = jnp.split(a, [start, start + rotary_dim], axis=-1)
    first, second = split_pairs(span, options)
    cos_pair, sin_pair = (cos, cos), (sin, sin)
    if options.table_width == "full":
        cos_pair, sin_pair = split_pairs(cos, options), split_pairs(sin, options)
    turned = (
        first * cos_pair[0] - second * sin_pair[0],
        second * cos_pair[1] + first * sin_pair[1],
    )
    if options.interleaved:
        span = jnp.stack(turned, axis=-1).reshape(span.shape)
    else:
        span = jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([before, span, after], axis=-1)


def split_pairs(a: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    """Returns the first and the second members of the pairs of the last axis."""
    if options.interleaved:
        return a[..., 0::2], a[..., 1::2]
    half = a.shape[-1] // 2
    return a[..., :half], a[..., half:]


def locate(x: Operands, options: Options) -> Slots:
    """Returns the page and the offset of each token, int32 `[tokens]`, no two alike.

    A token that is not stored gets a page past the pool, which the scatter drops. Capacity is
    compared in pages, since the number of slots may not fit in the dtype of the slots.
    """
    num_pages = x.k_pages.shape[-4]
    page_size = x.k_pages.shape[-3 if options.page_layout == "NHD" else -2]
    slots = x.slot_mapping
    page = slots // page_size
    stored = (slots >= 0) & (page < num_pages) & last_of_duplicates(slots)
    if x.layer is not None:
        stored &= (x.layer >= 0) & (x.layer < x.k_pages.shape[0])
    nowhere = num_pages + jnp.arange(slots.shape[0], dtype=slots.dtype)
    page = jnp.where(stored, page, nowhere)
    offset = jnp.where(stored, slots % page_size, 0)
    return page.astype(jnp.int32), offset.astype(jnp.int32)


def last_of_duplicates(slots: jax.Array) -> jax.Array:
    """Marks the tokens whose slot no later token has: bool `[tokens]`."""
    order = jnp.argsort(slots, stable=True)
    ordered = slots[order]
    last = jnp.concatenate([ordered[1:] != ordered[:-1], jnp.ones(ordered[:1].shape, bool)])
    return jnp.zeros(slots.shape, bool).at[order].set(last, unique_indices=True)


def index(slots: Slots, layer: jax.Array | None, layout: PageLayout) -> tuple:
    """The index of the slots in pages, or in their scale: all heads of each token."""
    page, offset = slots
    per_layer = () if layer is None else (layer,)
    return (
        (*per_layer, page, offset) if layout == "NHD" else (*per_layer, page, slice(None), offset)
    )


def store(
    new: jax.Array,
    pages: jax.Array,
    divisor: jax.Array | None,
    slots: Slots,
    x: Operands,
    options: Options,
) -> jax.Array:
    """Returns `pages` with `new`, `[tokens, K, head_dim]`, divided by the scale and quantised."""
    if divisor is not None:
        new = new.astype(jnp.float32) / divisor
    # In place if it can be. XLA on CPU has no scatter of 8-bit floats (nor, when old, of
    # bfloat16): it converts all pages to a wider type and back, in the same memory.
    at = index(slots, x.layer, options.page_layout)
    return pages.at[at].set(quantize(new, pages.dtype), mode="drop", unique_indices=True)


def dynamic_scale(new: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the scale that makes the largest number of each row the largest of `dtype`."""
    top = jnp.max(jnp.abs(new.astype(jnp.float32)), axis=-1, keepdims=True)
    scale = top / largest_of(dtype)
    # Rows of zeros, and of numbers whose scale a float32 cannot hold.
    return jnp.where(scale < float(jnp.finfo(jnp.float32).tiny), 1.0, scale)


def scale_of(
    scale: jax.Array, slots: Slots, layer: jax.Array | None, layout: PageLayout
) -> jax.Array:
    """Returns the scale of each token as an array that broadcasts to `[tokens, K, head_dim]`."""
    if scale.ndim > 2:
        # A token that is not stored divides by 1, so that its gradient is 0 and not NaN.
        at = index(slots, layer, layout)
        return scale.at[at].get(mode="fill", fill_value=1.0)[..., None]
    if scale.ndim == 2:
        scale = lax.dynamic_index_in_dim(scale, layer, keepdims=False)
    return scale if scale.ndim == 0 else scale[None, :, None]


def quantize(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rounds to nearest even in `dtype`. Quantised formats saturate; NaN is 0 in int8."""
    if dtype not in [jnp.dtype(d) for d in dtypes.QUANTIZED_DTYPES]:
        return values.astype(dtype)
    values = values.astype(jnp.float32)
    if dtype == jnp.int8:
        values = jnp.where(jnp.isnan(values), 0.0, jnp.round(values))
        return jnp.clip(values, -128.0, 127.0).astype(dtype)
    return jnp.clip(values, -largest_of(dtype), largest_of(dtype)).astype(dtype)


def largest_of(dtype: jnp.dtype) -> float:
    """Returns the largest finite number of a quantised dtype."""
    return 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
