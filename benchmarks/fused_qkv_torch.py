# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The fused QKV pass as torch.compile makes it, from the usual PyTorch code."""

import dataclasses
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import peers_torch
from device import Device, Runner

NUM_LAYERS = 4


def missing(device: Device) -> str | None:
    """Why torch.compile cannot work here, None if it can."""
    if device.platform == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler"
    return None


def prepare(case: Any, device: Device, sets: Sequence[Any]) -> Runner:
    """Compiles one step, which writes the cache of a layer in place."""
    import torch

    x = sets[0]
    qkv, slots, positions, cos, sin, q_weight, k_weight = (
        torch.from_dlpack(a)
        for a in (x.qkv, x.slots, x.positions, x.rope.cos, x.rope.sin, *jax.tree.leaves(x.norm))
    )
    slots, positions = slots.long(), positions.long()
    n, k, h = case.num_q_heads, case.num_kv_heads, case.head_dim
    shape = (NUM_LAYERS, case.num_pages * 16, k, h)
    pages = [torch.zeros(shape, dtype=qkv.dtype, device=qkv.device) for _ in range(2)]

    def normalize(a: Any, weight: Any) -> Any:
        a = a.float()
        a = a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + x.norm.epsilon)
        return a * weight.float()

    def rotate(a: Any, cos: Any, sin: Any) -> Any:
        half = cos.shape[-1]
        first, second, rest = a.split([half, half, h - 2 * half], -1)
        turned = (first * cos - second * sin, second * cos + first * sin, rest)
        return torch.cat(turned, -1).to(qkv.dtype)

    def step(qkv: Any, k_pages: Any, v_pages: Any) -> Any:
        queries = n * h * (1 if case.gate is None else 2)
        query, key, value = qkv.split([queries, k * h, k * h], -1)
        gate = None
        if case.gate == "interleaved":
            query, gate = query.unflatten(-1, (n, 2, h)).unbind(-2)
        elif case.gate == "blocked":
            query, gate = query.unflatten(-1, (2, n, h)).unbind(-3)
        else:
            query = query.unflatten(-1, (n, h))
        key, value = key.unflatten(-1, (k, h)), value.unflatten(-1, (k, h))
        at = cos[positions][:, None], sin[positions][:, None]
        query = rotate(normalize(query, q_weight), *at)
        key = rotate(normalize(key, k_weight), *at)
        k_pages[slots] = key
        v_pages[slots] = value
        gates = () if gate is None else (gate.contiguous(),)
        return query, key, value.contiguous(), *gates

    compiled = torch.compile(step, dynamic=False)

    num_steps = case.num_steps(device)

    def call() -> Any:
        out = None
        for i in range(num_steps):
            layer = (i + 1) % NUM_LAYERS
            out = compiled(qkv, pages[0][layer], pages[1][layer])
        return out, [a[1] for a in pages]

    call = torch.no_grad()(call)
    if device.platform == "gpu":
        return dataclasses.replace(peers_torch.captured([call], num_calls=1), steps=num_steps)
    call()
    return Runner([call], lambda out: None, steps=num_steps)


def output(out: Any) -> np.ndarray:
    """Queries and pages of layer 1, one after the other."""
    (query, *_), pages = out
    return np.concatenate([a.float().cpu().numpy().ravel() for a in (query, *pages)])
