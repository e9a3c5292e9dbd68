# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The arrays and the static options of one attention call, as they travel below the API."""

import dataclasses
from typing import Literal

import jax

from jax_attn._src.implementation import Implementation
from jax_attn._src.kv_cache import PageLayout

Causal = Literal["bottom_right", "top_left"]

CAUSAL: tuple[Causal | None, ...] = ("bottom_right", "top_left", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """The arrays of a call; absent ones are None.

    B batch, T query length, S key length, N query heads, K kv heads, H head_dim, Hv head_dim of
    values, P pages, M pages per sequence, L layers. `#B` is B or 1.
    """

    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, S, K, H]; paged: [(L,) P, page_size, K, H] or [(L,) P, K, page_size, H]
    value: jax.Array  # like key, with Hv
    bias: jax.Array | None = None  # [#B, #N, #T, S]
    mask: jax.Array | None = None  # bool [#B, #N, #T, S]
    kv_lengths: jax.Array | None = None  # int32 [B]
    query_offset: jax.Array | None = None  # int32 [B], of the first query from the first key
    page_table: jax.Array | None = None  # int32 [B, M]
    layer: jax.Array | None = None  # int32 []
    alibi_slopes: jax.Array | None = None  # float32 [N]
    sinks: jax.Array | None = None  # float32 [N]
    k_scale: jax.Array | None = None  # float32 [], [K], [L, K] or key.shape[:-1]
    v_scale: jax.Array | None = None

    def present(self) -> dict[str, jax.Array]:
        """The operands that are given, by name, in order."""
        named = {name: getattr(self, name) for name in OPERAND_NAMES}
        return {name: array for name, array in named.items() if array is not None}


OPERAND_NAMES = tuple(field.name for field in dataclasses.fields(Operands))

# Dimensions of each operand without those that vmap adds in front. Scales may have fewer.
OPERAND_RANKS = {
    "query": 4,
    "key": 4,
    "value": 4,
    "bias": 4,
    "mask": 4,
    "kv_lengths": 1,
    "query_offset": 1,
    "page_table": 2,
    "layer": 0,
    "alibi_slopes": 1,
    "sinks": 1,
    # Of the gradients alone: the results of attention, and their cotangents.
    "out": 4,
    "lse": 3,
    "d_out": 4,
    "d_lse": 3,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The static options of a call, resolved: no None that stands for a default."""

    scale: float
    causal: Causal | None = None
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    num_splits: int | None = None
    split_size: int | None = None
    lse_includes_sinks: bool = True
    page_layout: PageLayout | None = None  # None: keys and values are dense
    has_layers: bool = False
    k_scale_rank: int = 0
    v_scale_rank: int = 0
    implementation: Implementation | None = None
    variant: str = ""  # instruction set of the CPU kernel, empty for the best; tests choose it

    def rank(self, name: str) -> int:
        """Dimensions of operand `name` without those that vmap adds in front."""
        if name in ("k_scale", "v_scale"):
            return getattr(self, f"{name}_rank")
        return OPERAND_RANKS[name] + (self.has_layers and name in ("key", "value"))


@dataclasses.dataclass(frozen=True)
class GradientOptions:
    """The static options of the gradients of a call."""

    attention: Options
    wanted: tuple[str, ...]  # operands whose gradients are results; the first is the query

    def rank(self, name: str) -> int:
        """Dimensions of operand `name` without those that vmap adds in front."""
        return self.attention.rank(name)
