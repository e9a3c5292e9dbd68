# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Attention where each device holds a part of every context.

A shard is a problem of its own: `shard_of` says where its keys end and where the queries stand,
counted from its first key. The results of shards are merged by their log-sum-exp, with one pmax
and one psum.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_attn._src import merge, sharding
from jax_attn._src.split_kv_attention.problem import GradientOptions, Options
from jax_attn._src.split_kv_attention.reference import clip_page_ids

Arrays = dict[str, jax.Array]
Axes = tuple[str, ...]


def attend(
    bind: Callable[[Arrays], Any],
    operands: Arrays,
    options: Options,
    call: sharding.Call,
    plan: Mapping[str, Axes],
) -> tuple[jax.Array, jax.Array]:
    """Attends on the shards that a plan makes, where its mesh axes are manual."""
    return attend_and_merge(bind, operands, options, call.merged_axes(plan))


def attend_and_merge(
    bind: Callable[[Arrays], Any], operands: Arrays, options: Options, axes: Mapping[str, Axes]
) -> tuple[jax.Array, jax.Array]:
    """Attends to the shard of each device, and merges over `axes`: those of each sharded name."""
    if not axes:
        return bind(operands)
    shard = shard_of(operands, options, axes)
    sinks = shard.pop("sinks", None)
    out, lse = bind(shard)
    return merge.merge_shards(
        out, lse, sinks, _all_axes(axes), lse_includes_sinks=options.lse_includes_sinks
    )


def gradients(
    bind: Callable[[Arrays], Any],
    operands: Arrays,
    options: GradientOptions,
    call: sharding.Call,
    plan: Mapping[str, Axes],
) -> list[jax.Array]:
    """Finds gradients on the shards that a plan makes: only what devices share is summed."""
    axes = call.merged_axes(plan)
    parts = dict(
        zip(options.wanted, bind(shard_of(operands, options.attention, axes)), strict=True)
    )
    if axes and "sinks" in parts:
        # It follows from the rows alone, so that all shards of a context find the same.
        is_first = lax.axis_index(_all_axes(axes)) == 0
        parts["sinks"] = jnp.where(is_first, parts["sinks"], 0)
    summed = {name: call.summed_axes(f"d_{name}", plan) for name in parts}
    return [lax.psum(x, summed[name]) if summed[name] else x for name, x in parts.items()]


def shard_of(operands: Arrays, options: Options, axes: Mapping[str, Axes]) -> Arrays:
    """Makes operands that are shards along `axes` a problem of its own.

    Args:
      operands: The shards. Lengths are those of whole contexts; page ids are those of the whole
        pool if `axes` shards pages.
      options: The options.
      axes: Mesh axes over which "kv_len", "page_index" or "page" is sharded.
    """
    shard = dict(operands)
    if "page" in axes:
        _hide_pages_of_others(shard, options, axes["page"])
    for name in ("kv_len", "page_index"):
        if name in axes:
            _count_from_first_key(shard, options, axes[name])
    return shard


def _count_from_first_key(shard: Arrays, options: Options, axes: Axes) -> None:
    """Counts lengths and positions from the first key of the shard."""
    heads_first = options.page_layout == "HND"
    size = shard["key"].shape[-2 if heads_first else -3]
    if options.page_layout is not None:
        size *= shard["page_table"].shape[-1]
    total = size * lax.axis_size(axes)
    first = lax.axis_index(axes) * jnp.int32(size)
    batch, query_len = shard["query"].shape[-4:-2]
    if "kv_lengths" in shard:
        lengths = jnp.clip(shard["kv_lengths"], 0, total)
    else:
        lengths = jnp.full((batch,), total, jnp.int32)
    shard["kv_lengths"] = jnp.clip(lengths - first, 0, size)
    # A single query that is the last token sees all keys of its context, wherever it stands.
    is_last = options.causal == "bottom_right" and query_len == 1
    by_position = options.sliding_window is not None or "alibi_slopes" in shard
    if by_position or (options.causal is not None and not is_last):
        top_left = options.causal == "top_left"
        shard["query_offset"] = (
            jnp.zeros_like(lengths) if top_left else lengths - query_len
        ) - first


def _hide_pages_of_others(shard: Arrays, options: Options, axes: Axes) -> None:
    """Makes page ids local, and masks the keys of pages that other devices hold."""
    key = shard["key"]
    num_pages, page_size = key.shape[-4], key.shape[-2 if options.page_layout == "HND" else -3]
    ids = clip_page_ids(shard["page_table"], num_pages * lax.axis_size(axes))
    ids = ids - lax.axis_index(axes) * jnp.int32(num_pages)
    own = jnp.repeat((ids >= 0) & (ids < num_pages), page_size, axis=-1)[..., None, None, :]
    mask = shard.get("mask")
    if mask is not None:
        rank = max(own.ndim, mask.ndim)
        own = _with_rank(own, rank) & _with_rank(mask, rank)
    shard |= {"page_table": ids, "mask": own}


def _with_rank(x: jax.Array, rank: int) -> jax.Array:
    return lax.expand_dims(x, range(rank - x.ndim))


def _all_axes(axes: Mapping[str, Axes]) -> Axes:
    return tuple(itertools.chain(*axes.values()))
