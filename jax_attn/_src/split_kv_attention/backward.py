# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Gradients of split-KV attention, recomputed from the lse a chunk of keys at a time.

Memory is linear in the context: no array has both a query and all keys of a context in it, other
than the bias and its gradient. With p the softmax weights and D = sum(dout * out) of a row, the
gradient of a logit is p * (dp - D + dlse) (Dao 2022); the rest follows by differentiating the
stages of the reference on the chunk.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jax_attn._src import primitives
from jax_attn._src.split_kv_attention import reference as stages
from jax_attn._src.split_kv_attention.problem import Operands, Options

# Keys that are recomputed at a time.
_CHUNK = 512


def gradients(
    x: Operands,
    options: Options,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
) -> dict[str, jax.Array]:
    """Returns the cotangents of the operands that are floating point, by name."""
    floating = {
        name: array
        for name, array in x.present().items()
        if jnp.issubdtype(array.dtype, jnp.inexact)
    }
    out, dout = out.astype(jnp.float32), dout.astype(jnp.float32)
    rows = [jnp.swapaxes(a, 1, 2) for a in (lse, dlse, jnp.sum(dout * out, axis=-1))]  # [B, N, T]
    row_lse, row_dlse, row_d = rows
    full_lse = row_lse
    sinks = None if x.sinks is None else x.sinks[None, :, None]
    if sinks is not None and not options.lse_includes_sinks:
        full_lse = jnp.logaddexp(row_lse, sinks)

    def chunk_gradients(total: dict[str, jax.Array], index: jax.Array) -> tuple[Any, None]:
        chunk = _Chunk(x, options, index)
        taken = {name: chunk.take(name, array) for name, array in floating.items()}
        positions, fresh = chunk.positions()
        mask = None if x.mask is None else chunk.take("mask", x.mask)
        visible = stages.visible_keys(x, options, positions, mask) & fresh[None, None, None, :]

        def key_logits(taken: dict[str, jax.Array]) -> jax.Array:
            key = chunk.context("key", "k_scale", taken, visible)
            return stages.logits(
                taken["query"],
                key,
                taken.get("bias"),
                taken.get("alibi_slopes"),
                stages.query_positions(x, options),
                positions,
                options,
            )

        def values(taken: dict[str, jax.Array]) -> jax.Array:
            return chunk.context("value", "v_scale", taken, visible)

        s, pull_logits = jax.vjp(key_logits, taken)
        value, pull_values = jax.vjp(values, taken)
        s = jnp.where(visible, s, -jnp.inf)
        p = stages.exp_difference(s, full_lse[..., None])
        high = jax.lax.Precision.HIGHEST
        b, t, n, h = dout.shape
        grouped = dout.reshape(b, t, value.shape[2], n // value.shape[2], h)
        dp = jnp.einsum("btkgh,bskh->bkgts", grouped, value, precision=high).reshape(s.shape)
        dvalue = jnp.einsum(
            "bkgts,btkgh->bskh", stages.split_heads(p, value), grouped, precision=high
        )
        # The lse that was returned may leave sinks out, and then has other weights.
        returned = p if options.lse_includes_sinks else stages.exp_difference(s, row_lse[..., None])
        ds = p * (dp - row_d[..., None]) + returned * row_dlse[..., None]
        (from_logits,), (from_values,) = pull_logits(ds), pull_values(dvalue)
        for name in total:
            part = from_logits[name] + from_values[name]
            total[name] = chunk.add(name, total[name], part)
        return total, None

    floating.pop("sinks", None)
    # The carry of the scan must vary over the same manual mesh axes as what is added to it.
    total = {
        name: primitives.varying_alike(
            {"zeros": jnp.zeros(array.shape, jnp.float32), "rows": row_d}
        )["zeros"]
        for name, array in floating.items()
    }
    num_chunks = _Chunk.count(x, options)
    if num_chunks:
        total, _ = jax.lax.scan(chunk_gradients, total, jnp.arange(num_chunks, dtype=jnp.int32))
    if sinks is not None:
        p_sink = stages.exp_difference(jnp.broadcast_to(sinks, full_lse.shape), full_lse)
        dlse_part = row_dlse if options.lse_includes_sinks else 0.0
        total["sinks"] = jnp.sum(p_sink * (dlse_part - row_d), axis=(0, 2))
    return {name: array.astype(getattr(x, name).dtype) for name, array in total.items()}


class _Chunk:
    """The part of the operands that belongs to a run of keys, the same run for every sequence."""

    def __init__(self, x: Operands, options: Options, index: jax.Array):
        self._x = x
        self._options = options
        unit, size, total = self._units(x, options)
        # The last chunk starts early, so that all have one size; its first keys are not fresh.
        self._first = jnp.minimum(index * size, total - size)  # in units
        self._repeated = (index * size - self._first) * unit
        self._size = size
        self._unit = unit
        if x.page_table is not None:
            pages = jax.lax.dynamic_slice_in_dim(x.page_table, self._first, size, 1)
            self._pages = stages.clip_page_ids(pages, x.key.shape[-4])

    @staticmethod
    def _units(x: Operands, options: Options) -> tuple[int, int, int]:
        """Keys in a unit (a page, or one key), units in a chunk and units in all."""
        if x.page_table is None:
            return 1, min(_CHUNK, x.key.shape[1]), x.key.shape[1]
        unit = x.key.shape[-3 if options.page_layout == "NHD" else -2]
        total = x.page_table.shape[1]
        return unit, min(max(1, _CHUNK // unit), total), total

    @classmethod
    def count(cls, x: Operands, options: Options) -> int:
        """Chunks that cover all keys."""
        _, size, total = cls._units(x, options)
        return -(-total // size) if total else 0

    def positions(self) -> tuple[jax.Array, jax.Array]:
        """Positions of the chunk's keys, and which of them no earlier chunk had."""
        steps = jnp.arange(self._size * self._unit, dtype=jnp.int32)
        return self._first * self._unit + steps, steps >= self._repeated

    def take(self, name: str, array: jax.Array) -> jax.Array:
        """The chunk's part of an operand; all of one that does not have keys."""
        axis = self._key_axis(name)
        if axis is not None:
            size = self._size * self._unit
            return jax.lax.dynamic_slice_in_dim(array, self._first * self._unit, size, axis)
        if self._has_pages(name):
            return self._gather(array)
        return array

    def add(self, name: str, total: jax.Array, part: jax.Array) -> jax.Array:
        """Adds the chunk's part of a gradient to the whole."""
        part = part.astype(jnp.float32)
        axis = self._key_axis(name)
        if axis is not None:
            start = self._first * self._unit
            size = self._size * self._unit
            old = jax.lax.dynamic_slice_in_dim(total, start, size, axis)
            return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis)
        if self._has_pages(name):
            return total.at[self._page_index()].add(part)
        return total + part

    def context(
        self, stored: str, scale: str, taken: dict[str, jax.Array], visible: jax.Array
    ) -> jax.Array:
        """Dequantised keys or values of the chunk, `[B, S, K, H]`, zero where nothing sees them.

        Cleared before they are multiplied: each factor is in the gradient of the other, and a
        gradient of 0 times NaN is not 0.
        """
        array = taken.get(stored)
        if array is None:  # an integer format, which has no gradient
            array = self.take(stored, getattr(self._x, stored))
        factor = taken.get(scale)
        if self._has_pages(stored):
            array = self._flatten_pages(array)
        if factor is not None and self._options.rank(scale) == self._options.rank(stored) - 1:
            factor = factor[..., None]
            factor = self._flatten_pages(factor) if self._has_pages(scale) else factor
            factor = stages.clear_unseen(factor, visible)[..., 0]
        elif factor is not None and factor.ndim:
            factor = (factor[self._x.layer] if factor.ndim == 2 else factor)[None, None, :]
        return stages.dequantize(stages.clear_unseen(array, visible), factor)

    def _key_axis(self, name: str) -> int | None:
        if name in ("bias", "mask"):
            return 3
        if self._x.page_table is None and (
            name in ("key", "value") or self._options.rank(name) == 3
        ):
            return 1
        return None

    def _has_pages(self, name: str) -> bool:
        if self._x.page_table is None:
            return False
        per_token = self._options.rank("key") - 1
        return name in ("key", "value") or (
            name in ("k_scale", "v_scale") and self._options.rank(name) == per_token
        )

    def _page_index(self) -> Any:
        return self._pages if self._x.layer is None else (self._x.layer, self._pages)

    def _gather(self, pages: jax.Array) -> jax.Array:
        return pages[self._page_index()]

    def _flatten_pages(self, gathered: jax.Array) -> jax.Array:
        """`[B, pages, page_size, K, H]`, or with K first, to `[B, S, K, H]`."""
        if self._options.page_layout == "HND":
            gathered = jnp.swapaxes(gathered, 2, 3)
        b, pages, page_size, *rest = gathered.shape
        return gathered.reshape(b, pages * page_size, *rest)
