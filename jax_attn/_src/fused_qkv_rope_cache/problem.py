# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The arrays and the static options of one call, as they travel below the API."""

import dataclasses
from typing import Literal

import jax

from jax_attn._src.kv_cache import PageLayout
from jax_attn._src.qk_norm import NormScope
from jax_attn._src.rope import TableWidth

GateLayout = Literal["interleaved", "blocked"]
GATE_LAYOUTS: tuple[GateLayout | None, ...] = ("interleaved", "blocked", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """The arrays of a call; absent ones are None.

    N query heads, K kv heads, H head_dim, Hv head_dim of values, P pages, L layers, W width of
    the RoPE table.
    """

    qkv: jax.Array  # [tokens, N * H (twice with a gate) + K * H + K * Hv]
    k_pages: jax.Array  # [(L,) P, page_size, K, H] or [(L,) P, K, page_size, H]
    v_pages: jax.Array  # like k_pages, with Hv
    slot_mapping: jax.Array  # int32 or int64 [tokens]
    layer: jax.Array | None = None  # int32 []
    positions: jax.Array | None = None  # int32 [tokens], or [3, tokens] for M-RoPE
    offsets: jax.Array | None = None  # int32 [tokens]
    cos: jax.Array | None = None  # [max_positions, W]
    sin: jax.Array | None = None
    q_weight: jax.Array | None = None  # [H] or [N * H]
    k_weight: jax.Array | None = None  # [H] or [K * H]
    k_scale: jax.Array | None = None  # float32 [], [K], [L, K] or k_pages.shape[:-1]
    v_scale: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """The static options of a call. None is off: no gate, no rotation, no norm."""

    num_q_heads: int
    page_layout: PageLayout
    gate: GateLayout | None = None
    rotary_dim: int | None = None  # resolved: None is no rotation, not the whole head
    interleaved: bool = False
    nope_first: bool = False
    table_width: TableWidth = "half"
    mrope_sections: tuple[int, int, int] | None = None
    mrope_interleaved: bool = False
    epsilon: float | None = None
    weight_offset: float = 0.0
    norm_scope: NormScope = "head"
    normalize_v: bool = False
