# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Triton kernels that only read, or only copy: what a GPU's memory can give."""

from collections.abc import Callable
from typing import Any

import peers_torch
import torch
import triton
import triton.language as tl
from device import Runner

# Elements of float32 that a program does at a time, how often, and with how many warps.
_TILES = ((512, 1, 4), (4096, 1, 4), (4096, 4, 4), (8192, 4, 8), (8192, 16, 8))


@triton.jit
def _read(x: tl.tensor, out: tl.tensor, tile: tl.constexpr, count: tl.constexpr) -> None:
    first = tl.program_id(0).to(tl.int64) * (tile * count) + tl.arange(0, tile)
    total = tl.zeros([tile], tl.float32)
    for i in tl.static_range(count):
        total += tl.load(x + first + i * tile)
    tl.store(out + tl.program_id(0), tl.sum(total))


@triton.jit
def _copy(x: tl.tensor, out: tl.tensor, tile: tl.constexpr, count: tl.constexpr) -> None:
    first = tl.program_id(0).to(tl.int64) * (tile * count) + tl.arange(0, tile)
    for i in tl.static_range(count):
        tl.store(out + first + i * tile, tl.load(x + first + i * tile))


def readers(num_elements: int, num_sets: int, num_calls: int) -> dict[str, Runner]:
    """Returns passes that read so many float32 elements, in whole tiles, by name."""
    return _runners("triton read", _read, num_elements, num_sets, num_calls, writes_all=False)


def copiers(num_elements: int, num_sets: int, num_calls: int) -> dict[str, Runner]:
    """Returns passes that read and write so many float32 elements, by name."""
    return _runners("triton copy", _copy, num_elements, num_sets, num_calls, writes_all=True)


def _runners(
    name: str, kernel: Any, num_elements: int, num_sets: int, num_calls: int, writes_all: bool
) -> dict[str, Runner]:
    sets = [torch.ones(num_elements, device="cuda") for _ in range(num_sets)]
    found = {}
    for tile, count, warps in _TILES:
        programs = num_elements // (tile * count)
        if programs == 0:
            continue
        size = num_elements if writes_all else programs
        steps = [
            _step(kernel, x, torch.empty(size, device="cuda"), programs, tile, count, warps)
            for x in sets
        ]
        found[f"{name} {count} x {tile}"] = peers_torch.captured(steps, num_calls)
    return found


def _step(
    kernel: Any, x: Any, out: Any, programs: int, tile: int, count: int, warps: int
) -> Callable[[], Any]:
    def step() -> Any:
        kernel[(programs,)](x, out, tile, count, num_warps=warps)
        return out

    return step
