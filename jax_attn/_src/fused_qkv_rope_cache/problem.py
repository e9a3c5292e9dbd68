# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The arrays and the static options of one call, as they travel below the API."""

import dataclasses
from typing import Literal

import jax

from jax_attn._src.implementation import Implementation
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

    def present(self) -> dict[str, jax.Array]:
        """The operands that are given, by name, in order."""
        named = {name: getattr(self, name) for name in OPERAND_NAMES}
        return {name: array for name, array in named.items() if array is not None}


OPERAND_NAMES = tuple(field.name for field in dataclasses.fields(Operands))

# Dimensions of each operand without those that vmap adds in front. Positions, and scales, may have
# others.
OPERAND_RANKS = {
    "qkv": 2,
    "k_pages": 4,
    "v_pages": 4,
    "slot_mapping": 1,
    "layer": 0,
    "offsets": 1,
    "cos": 2,
    "sin": 2,
    "q_weight": 1,
    "k_weight": 1,
}


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
    dynamic_scales: bool = False
    has_layers: bool = False
    k_scale_rank: int = 0
    v_scale_rank: int = 0
    implementation: Implementation | None = None
    variant: str = ""  # instruction set of the CPU kernel, empty for the best; tests choose it

    @property
    def result_names(self) -> tuple[str, ...]:
        """Names of the results, in order."""
        gate = () if self.gate is None else ("gate",)
        scales = ("k_scale", "v_scale") if self.dynamic_scales else ()
        return ("query", "key", "value", "k_pages", "v_pages", *gate, *scales)

    def rank(self, name: str) -> int:
        """Dimensions of operand `name` without those that vmap adds in front."""
        if name in ("k_scale", "v_scale"):
            return getattr(self, f"{name}_rank")
        if name == "positions":
            return 1 if self.mrope_sections is None else 2
        return OPERAND_RANKS[name] + (self.has_layers and name in ("k_pages", "v_pages"))
