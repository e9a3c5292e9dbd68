# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The arrays and the static options of one call, as they travel below the API."""

import dataclasses

import jax

from jax_attn._src.implementation import Implementation
from jax_attn._src.split_kv_attention.problem import Causal


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """The arrays of a call; absent ones are None.

    B sequences, T query length, S key length, N query heads, K kv heads, H head_dim, Hv head_dim
    of values. `#B` is B or 1. Packed arrays have the tokens of all sequences in one dimension, and
    T and S are the greatest lengths.
    """

    query: jax.Array  # [B, T, N, H] or [query tokens, N, H]
    key: jax.Array  # [B, S, K, H] or [kv tokens, K, H]
    value: jax.Array  # like key, with Hv
    bias: jax.Array | None = None  # [#B, #N, #T, S]
    query_lengths: jax.Array | None = None  # int32 [B]
    kv_lengths: jax.Array | None = None  # int32 [B]
    query_cu_seqlens: jax.Array | None = None  # int32 [B + 1], if and only if packed
    kv_cu_seqlens: jax.Array | None = None  # int32 [B + 1]

    def present(self) -> dict[str, jax.Array]:
        """The operands that are given, by name, in order."""
        named = {name: getattr(self, name) for name in OPERAND_NAMES}
        return {name: array for name, array in named.items() if array is not None}


OPERAND_NAMES = tuple(field.name for field in dataclasses.fields(Operands))

# What the backward pass has besides: the lse, and the cotangents of output and lse.
GRADIENT_OPERAND_NAMES = (*OPERAND_NAMES, "lse", "dout", "dlse")


@dataclasses.dataclass(frozen=True)
class Options:
    """The static options of a call, resolved: no None that stands for a default."""

    scale: float
    causal: Causal | None = None
    logits_soft_cap: float | None = None
    max_q_len: int | None = None  # both are None if the arrays are dense
    max_kv_len: int | None = None
    implementation: Implementation | None = None
    variant: str = ""  # instruction set of the CPU kernel, empty for the best; tests choose it

    @property
    def packed(self) -> bool:
        """Whether sequences lie one after the other in a dimension of tokens."""
        return self.max_q_len is not None

    def rank(self, name: str) -> int:
        """Dimensions of operand `name` without those that vmap adds in front."""
        if name == "bias":
            return 4
        if name in ("query_lengths", "kv_lengths", "query_cu_seqlens", "kv_cu_seqlens"):
            return 1
        return (3 if name in ("lse", "dlse") else 4) - self.packed
