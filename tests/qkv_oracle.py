# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""`fused_qkv_rope_cache` in float64 NumPy, token by token and head by head, from its docstring."""

import ml_dtypes
import numpy as np

QUANTIZED = ("int8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2")


def qkv_heads(x, rope=None, norm=None):
    """Returns float64 query, gate or None, key and value of all tokens.

    Args:
      x: Dict of `qkv`, `num_q_heads`, `num_kv_heads`, `head_dim`, `v_head_dim`, `gate`, and with a
        rope `positions` and `offsets`.
      rope: Dict of the fields of `Rope`.
      norm: Dict of the fields of `QKNorm`.
    """
    n, k, h, hv = (x[name] for name in ("num_q_heads", "num_kv_heads", "head_dim", "v_head_dim"))
    queries, gates, keys, values = [], [], [], []
    for t, row in enumerate(np.asarray(x["qkv"]).astype(np.float64)):
        columns = list(row)

        def take(size, columns=columns):
            head, columns[:size] = columns[:size], []
            return np.array(head)

        query, gate = [], []
        for _ in range(n):
            query.append(take(h))
            if x["gate"] == "interleaved":
                gate.append(take(h))
        if x["gate"] == "blocked":
            gate = [take(h) for _ in range(n)]
        key, value = [take(h) for _ in range(k)], [take(hv) for _ in range(k)]
        assert not columns
        if norm is not None:
            query = rms_norm(query, norm["q_weight"], norm)
            key = rms_norm(key, norm["k_weight"], norm)
            if norm["normalize_v"]:
                value = rms_norm(value, None, norm)
        if rope is not None:
            query = [rotate(head, x, t, rope) for head in query]
            key = [rotate(head, x, t, rope) for head in key]
        queries.append(query)
        gates.append(gate)
        keys.append(key)
        values.append(value)
    return (
        np.reshape(queries, (-1, n, h)),
        None if x["gate"] is None else np.reshape(gates, (-1, n, h)),
        np.reshape(keys, (-1, k, h)),
        np.reshape(values, (-1, k, hv)),
    )


def rms_norm(heads, weight, norm):
    """Returns the normalised heads of one token."""
    everything = np.concatenate(heads)
    out = []
    for i, head in enumerate(heads):
        over = head if norm["scope"] == "head" else everything
        normed = head / np.sqrt(np.mean(over**2) + norm["epsilon"])
        if weight is not None:
            w = np.asarray(weight).astype(np.float64)
            if norm["scope"] == "all_heads":
                w = w[i * len(head) : (i + 1) * len(head)]
            normed = normed * (norm["weight_offset"] + w)
        out.append(normed)
    return out


def rotate(head, x, token, rope):
    """Returns one rotated head of a token."""
    dims = len(head) if rope["rotary_dim"] is None else rope["rotary_dim"]
    start = len(head) - dims if rope["nope_first"] else 0
    out = np.array(head)
    for pair in range(dims // 2):
        position = np.asarray(x["positions"])[..., token].astype(np.int64)
        if rope["mrope_sections"] is not None:
            position = position[mrope_axis(pair, rope)]
        if x["offsets"] is not None:
            position = position + int(x["offsets"][token])
        position = min(max(int(position), 0), len(rope["cos"]) - 1)
        i, j = (2 * pair, 2 * pair + 1) if rope["interleaved"] else (pair, pair + dims // 2)
        at_i, at_j = (pair, pair) if rope["table_width"] == "half" else (i, j)
        cos, sin = (np.asarray(rope[name])[position].astype(np.float64) for name in ("cos", "sin"))
        first, second = head[start + i], head[start + j]
        out[start + i] = first * cos[at_i] - second * sin[at_i]
        out[start + j] = second * cos[at_j] + first * sin[at_j]
    return out


def mrope_axis(pair, rope):
    """Returns which position turns a pair: 0 temporal, 1 height, 2 width."""
    temporal, height, width = rope["mrope_sections"]
    if not rope["mrope_interleaved"]:
        return 0 if pair < temporal else 1 if pair < temporal + height else 2
    if pair % 3 == 1 and pair < 3 * height:
        return 1
    return 2 if pair % 3 == 2 and pair < 3 * width else 0


def fill_pages(pages, new, slot_mapping, layout, scale=None, layer=None):
    """Returns pages in which `new`, `[tokens, heads, head_dim]`, is stored one after the other.

    In float64 nothing is rounded; else a quotient is rounded to float32, as stored values are.
    """
    pages = np.array(pages)
    pool = pages if layer is None else pages[layer]  # a view
    page_size = pool.shape[1 if layout == "NHD" else 2]
    for t, slot in enumerate(np.asarray(slot_mapping).astype(np.int64)):
        if not 0 <= slot < len(pool) * page_size:
            continue
        page, offset = divmod(int(slot), page_size)
        for head in range(new.shape[1]):
            at = (page, offset, head) if layout == "NHD" else (page, head, offset)
            value = np.asarray(new[t, head])
            if scale is not None:
                by_rank = {0: (), 1: (head,), 2: (layer, head), 3: at, 4: (layer, *at)}
                dtype = np.float64 if pages.dtype == np.float64 else np.float32
                divisor = np.asarray(scale)[by_rank[np.ndim(scale)]]
                value = value.astype(dtype) / divisor.astype(dtype)
            pool[at] = quantize(value, pages.dtype)
    return pages


def row_scales(new, dtype):
    """Returns the scale of each row, so that its largest number is the largest of `dtype`."""
    largest = 127 if dtype.name == "int8" else float(ml_dtypes.finfo(dtype).max)
    scales = np.abs(new.astype(np.float64)).max(axis=-1) / largest
    return np.where(scales < np.finfo(np.float32).tiny, 1, scales).astype(np.float32)


def quantize(value, dtype):
    """Casts to `dtype`; quantised formats saturate, and NaN is 0 in int8."""
    if dtype.name not in QUANTIZED:
        return value.astype(dtype)
    value = value.astype(np.float32)
    if dtype.name == "int8":
        return np.clip(np.rint(np.nan_to_num(value, nan=0.0)), -128, 127).astype(dtype)
    largest = float(ml_dtypes.finfo(dtype).max)
    return np.clip(value, -largest, largest).astype(dtype)
