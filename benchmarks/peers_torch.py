# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""PyTorch's scaled_dot_product_attention on the arrays of a case, shared without a copy."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from cases import Case, Inputs
from device import Device, Runner, calls_in_program


def missing(device: Device) -> str | None:
    """Why the installed PyTorch cannot use `device`, None if it can."""
    import torch

    if device.platform == "gpu" and not torch.cuda.is_available():
        return "this PyTorch has no GPU support"
    return None


def prepare(
    case: Case,
    device: Device,
    sets: Sequence[Inputs],
    masks: Sequence[jax.Array | None],
    *,
    fold: bool,
    heads_first: bool,
) -> Runner:
    """Makes SDPA ready.

    With `fold`, the query heads of a kv head become query rows, so that keys and values are read
    once per kv head; otherwise SDPA is told of the grouping. With `heads_first`, it gets a
    copy of the cache in its own layout.
    """
    steps = [_step(case, x, mask, fold, heads_first) for x, mask in zip(sets, masks, strict=True)]
    if device.platform == "cpu":
        return Runner(steps, lambda out: None)
    return captured(steps, calls_in_program(case.num_bytes))


def output(out: Any) -> np.ndarray:
    """Float32 `[B, T, N, H]`."""
    return out.float().cpu().numpy()


def _step(
    case: Case, x: Inputs, mask: jax.Array | None, fold: bool, heads_first: bool
) -> Callable[[], Any]:
    import torch

    b, t, n, k, h = (
        case.batch,
        case.query_len,
        case.num_q_heads,
        case.num_kv_heads,
        case.head_dim,
    )
    tensors = [torch.from_dlpack(a) for a in (x.query, x.key, x.value)]
    query, key, value = tensors
    table = None if x.page_table is None else torch.from_dlpack(x.page_table).long()
    query = query.transpose(1, 2)  # [B, N, T, H]
    seen = None if mask is None else torch.from_dlpack(mask)[:, None]  # [B, 1, T, S]
    if fold:
        query = query.reshape(b, k, (n // k) * t, h)
        seen = None if seen is None else seen.repeat(1, 1, n // k, 1)
    if heads_first and table is None:
        key, value = (a.transpose(1, 2).contiguous().transpose(1, 2) for a in (key, value))

    def step() -> Any:
        dense = (
            (key, value)
            if table is None
            else (a[table].reshape(b, case.kv_len, k, h) for a in (key, value))
        )
        heads = [a.transpose(1, 2) for a in dense]
        if heads_first and table is not None:
            heads = [a.contiguous() for a in heads]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, *heads, attn_mask=seen, enable_gqa=not fold and n != k
        )
        return out.reshape(b, n, t, h).transpose(1, 2)

    return torch.no_grad()(step)


def captured(steps: Sequence[Callable[[], Any]], num_calls: int) -> Runner:
    """A CUDA graph of all steps in order, as a program of JAX has them; returns the first's result.

    Does them again until it has done `num_calls` of them.
    """
    import torch

    rounds = -(-num_calls // len(steps))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for step in steps:
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [step() for step in [*steps] * rounds]

    def replay(kept: Any = steps) -> Any:
        del kept  # what the steps read must stay where it was captured
        graph.replay()
        return outs[0]

    return Runner([replay], lambda out: torch.cuda.synchronize(), steps=len(outs))
