# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Attention in float64 NumPy, one query row at a time, written from the documentation alone.

Nothing here is shared with the package, and a row gathers only the keys it sees: whatever the
documentation calls unread stays unread, so NaN in it would be a difference.
"""

from typing import Any, NamedTuple

import numpy as np


class Attention(NamedTuple):
    """What a correct implementation returns, and the size of the terms that it adds up."""

    out: np.ndarray  # float64 [B, T, N, Hv]
    lse: np.ndarray  # float64 [B, T, N]
    magnitude: np.ndarray  # like out: sum of |probability * value|, which rounding scales with
    largest_logit: np.ndarray  # like lse: of finite absolute values, which rounding scales with


class Storage:
    """Keys or values, dense or in pages, read as float64 where asked."""

    def __init__(
        self,
        array: Any,
        scale: Any = None,
        page_table: Any = None,
        layout: str | None = None,
        layer: Any = None,
    ):
        self.array = np.asarray(array)
        self.scale = None if scale is None else np.asarray(scale).astype(np.float64)
        self.page_table = page_table
        self.layout = layout
        self.layer = layer
        sizes = self.array.shape[-4:]
        if layout is None:
            self.kv_len, self.num_kv_heads, self.head_dim = sizes[1:]
        else:
            num_pages, *page, self.head_dim = sizes
            self.page_size, self.num_kv_heads = page if layout == "NHD" else reversed(page)
            self.num_pages = num_pages
            self.kv_len = np.shape(page_table)[1] * self.page_size

    def read(self, b: int, keys: np.ndarray, head: int) -> np.ndarray:
        """Returns float64 `[len(keys), head_dim]`, dequantised."""
        if self.layout is None:
            where = (b, keys, head)
        else:
            page = np.asarray(self.page_table)[b, keys // self.page_size]
            page = np.clip(page, 0, self.num_pages - 1)
            offset = keys % self.page_size
            where = (page, offset, head) if self.layout == "NHD" else (page, head, offset)
            if self.layer is not None:
                where = (int(self.layer), *where)
        return self.array[where].astype(np.float64) * self._scale_at(where, head)

    def _scale_at(self, where: tuple, head: int) -> Any:
        if self.scale is None:
            return 1.0
        match self.scale.ndim:
            case 0:
                return self.scale
            case 1:
                return self.scale[head]
            case 2:
                return self.scale[int(self.layer), head]
            case _:
                return self.scale[where][:, None]


def visible_keys(
    batch: int,
    num_q_heads: int,
    query_len: int,
    kv_len: int,
    *,
    mask: Any = None,
    kv_lengths: Any = None,
    causal: str | None = None,
    sliding_window: int | None = None,
) -> np.ndarray:
    """Returns bool `[B, N, T, S]`: which keys each query row sees."""
    seen = np.zeros((batch, num_q_heads, query_len, kv_len), bool)
    keys = np.arange(kv_len)
    for b in range(batch):
        length = context_length(b, kv_len, kv_lengths)
        for t in range(query_len):
            position = query_position(t, query_len, length, causal)
            row = keys < length
            if causal is not None:
                row &= keys <= position
            if sliding_window is not None:
                row &= keys > position - sliding_window
            seen[b, :, t] = row
    return seen if mask is None else seen & np.asarray(mask)


def context_length(b: int, kv_len: int, kv_lengths: Any) -> int:
    """The number of keys in context `b`."""
    return kv_len if kv_lengths is None else int(np.clip(np.asarray(kv_lengths)[b], 0, kv_len))


def query_position(t: int, query_len: int, length: int, causal: str | None) -> int:
    """The position of query `t` in a context of `length` keys."""
    return t if causal == "top_left" else length - query_len + t


def attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    kv_lengths: Any = None,
    page_table: Any = None,
    layout: str | None = None,
    layer: Any = None,
    scale: float | None = None,
    causal: str | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    lse_includes_sinks: bool = True,
) -> Attention:
    """Computes `split_kv_attention`, or `paged_attention` if `layout` is that of a cache."""
    query = np.asarray(query).astype(np.float64)
    keys = Storage(key, k_scale, page_table, layout, layer)
    values = Storage(value, v_scale, page_table, layout, layer)
    batch, query_len, num_q_heads, head_dim = query.shape
    group_size = num_q_heads // keys.num_kv_heads
    rows = (batch, num_q_heads, query_len, keys.kv_len)
    seen = visible_keys(
        *rows, mask=mask, kv_lengths=kv_lengths, causal=causal, sliding_window=sliding_window
    )
    if scale is None:
        scale = head_dim**-0.5 if head_dim else 1.0
    if bias is not None:
        bias = np.broadcast_to(np.asarray(bias).astype(np.float64), rows)
    if sinks is not None:
        sinks = np.asarray(sinks).astype(np.float64)

    out = np.zeros((batch, query_len, num_q_heads, values.head_dim))
    lse = np.zeros((batch, query_len, num_q_heads))
    magnitude, largest_logit = np.zeros_like(out), np.zeros_like(lse)
    for b in range(batch):
        length = context_length(b, keys.kv_len, kv_lengths)
        for n in range(num_q_heads):
            for t in range(query_len):
                (where,) = np.nonzero(seen[b, n, t])
                logits = scale * (keys.read(b, where, n // group_size) @ query[b, t, n])
                if logits_soft_cap is not None:
                    logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
                if bias is not None:
                    logits = logits + bias[b, n, t, where]
                if alibi_slopes is not None:
                    distance = np.abs(query_position(t, query_len, length, causal) - where)
                    logits = logits - float(alibi_slopes[n]) * distance
                largest_logit[b, t, n] = np.max(np.abs(logits[np.isfinite(logits)]), initial=0)
                lse_keys = log_sum_exp(logits)
                total = lse_keys if sinks is None else np.logaddexp(lse_keys, sinks[n])
                lse[b, t, n] = total if lse_includes_sinks else lse_keys
                if lse_keys > -np.inf and total < np.inf:
                    weights = np.exp(logits - total)
                    rows_of_v = values.read(b, where, n // group_size)
                    out[b, t, n] = weights @ rows_of_v
                    magnitude[b, t, n] = weights @ np.abs(rows_of_v)
    return Attention(out, lse, magnitude, largest_logit)


def log_sum_exp(logits: np.ndarray) -> float:
    """The natural logarithm of the sum of exponentials, -inf for none."""
    top = np.max(logits, initial=-np.inf)
    return top if np.isinf(top) else top + np.log(np.sum(np.exp(logits - top)))
