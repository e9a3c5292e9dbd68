# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Attention of short sequences and its gradients in float64 NumPy, one row at a time.

Written from the contract, and never imports the package. Dense and packed arrays are the same
here: tokens, and for each sequence where its tokens begin and how many there are.
"""

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass
class Solution:
    """Results, gradients, and for each number the sum of the absolute values it is made of.

    Attributes:
      values: "out", "lse", and gradients "query", "key", "value" and perhaps "bias", in the
        shapes of the operands.
      magnitudes: For each of them, the same shape; 0 where nothing contributes.
      largest_logit: Of all, by its absolute value.
    """

    values: dict[str, np.ndarray]
    magnitudes: dict[str, np.ndarray]
    largest_logit: float


def segments(
    shape: tuple[int, ...], lengths: Any, bounds: Any, longest: int | None
) -> list[tuple[int, int]]:
    """First token and number of tokens of each sequence."""
    if bounds is None:
        batch, room = shape[:2]
        lengths = [room] * batch if lengths is None else lengths
        return [(b * room, int(min(max(lengths[b], 0), room))) for b in range(batch)]
    tokens, found, start = shape[0], [], 0
    start = min(max(int(bounds[0]), 0), tokens)
    for i in range(len(bounds) - 1):
        end = max(start, min(max(int(bounds[i + 1]), 0), tokens))
        length = min(end - start, longest)
        if lengths is not None:
            length = min(max(int(lengths[i]), 0), length)
        found.append((start, length))
        start = end
    return found


def solve(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    query_lengths: Any = None,
    kv_lengths: Any = None,
    query_cu_seqlens: Any = None,
    kv_cu_seqlens: Any = None,
    max_q_len: int | None = None,
    max_kv_len: int | None = None,
    scale: float | None = None,
    causal: str | None = None,
    logits_soft_cap: float | None = None,
    dout: np.ndarray,
    dlse: np.ndarray,
) -> Solution:
    """Returns output, lse and gradients of `sum(out * dout) + sum(lse * dlse)`."""
    pairs = list(
        zip(
            segments(query.shape, query_lengths, query_cu_seqlens, max_q_len),
            segments(key.shape, kv_lengths, kv_cu_seqlens, max_kv_len),
            strict=True,
        )
    )
    heads, head_dim = query.shape[-2:]
    kv_heads, v_head_dim = value.shape[-2:]
    scale = head_dim**-0.5 if scale is None else scale
    wide = {"query": query, "key": key, "value": value, "dout": dout, "dlse": dlse}
    x = {name: np.asarray(a, np.float64) for name, a in wide.items()}
    for name, a in x.items():
        inner = a.shape[-1:] if name == "dlse" else a.shape[-2:]
        x[name] = a.reshape(math.prod(a.shape[: a.ndim - len(inner)]), *inner)
    rows = len(x["query"])
    values = {
        "out": np.zeros((rows, heads, v_head_dim)),
        "lse": np.full((rows, heads), -np.inf),
        **{name: np.zeros(x[name].shape) for name in ("query", "key", "value")},
    }
    if bias is not None:
        values["bias"] = np.zeros(bias.shape)
    magnitudes = {name: np.zeros(a.shape) for name, a in values.items()}
    largest_logit = 0.0

    for b, ((q_start, q_length), (k_start, k_length)) in enumerate(pairs):
        for t in range(q_length):
            seen = k_length
            if causal == "top_left":
                seen = min(k_length, t + 1)
            elif causal == "bottom_right":
                seen = min(k_length, max(0, k_length - q_length + t + 1))
            if seen == 0:
                continue
            for n in range(heads):
                k, i, j = n // (heads // kv_heads), q_start + t, slice(k_start, k_start + seen)
                q, keys, vals = x["query"][i, n], x["key"][j, k], x["value"][j, k]
                logits = scale * (keys @ q)
                slope = np.ones(seen)
                if logits_soft_cap is not None:
                    slope = 1 - np.tanh(logits / logits_soft_cap) ** 2
                    logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
                if bias is not None:
                    at = tuple(
                        0 if size == 1 else index
                        for size, index in zip(bias.shape[:3], (b, n, t), strict=True)
                    )
                    logits = logits + np.asarray(bias[at][:seen], np.float64)
                top = logits.max()
                if top == -np.inf:
                    continue
                largest_logit = max(largest_logit, np.abs(logits[np.isfinite(logits)]).max())
                p = np.exp(logits - top)
                values["lse"][i, n] = top + np.log(p.sum())
                magnitudes["lse"][i, n] = 1
                p /= p.sum()
                do, dl = x["dout"][i, n], x["dlse"][i, n]
                dp, dp_size = vals @ do, np.abs(vals) @ np.abs(do)
                ds = p * (dp - p @ dp + dl)
                ds_size = p * (dp_size + p @ dp_size + abs(dl))
                # A product of numbers of either sign has a relative error of their sizes.
                for name, where, number, size in (
                    ("out", (i, n), p @ vals, p @ np.abs(vals)),
                    ("value", (j, k), np.outer(p, do), np.outer(p, np.abs(do))),
                    (
                        "key",
                        (j, k),
                        scale * np.outer(ds * slope, q),
                        abs(scale) * np.outer(ds_size, np.abs(q)),
                    ),
                    (
                        "query",
                        (i, n),
                        scale * ((ds * slope) @ keys),
                        abs(scale) * (ds_size @ np.abs(keys)),
                    ),
                ):
                    values[name][where] += number
                    magnitudes[name][where] += size
                if bias is not None:
                    values["bias"][at][:seen] += ds
                    magnitudes["bias"][at][:seen] += ds_size
    shapes = {
        "out": (*query.shape[:-1], v_head_dim),
        "lse": query.shape[:-1],
        "query": query.shape,
        "key": key.shape,
        "value": value.shape,
    }
    for arrays in (values, magnitudes):
        for name, shape in shapes.items():
            arrays[name] = arrays[name].reshape(shape)
    return Solution(values, magnitudes, largest_logit)
