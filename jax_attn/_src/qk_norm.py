# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""RMSNorm of queries and keys."""

import dataclasses
from typing import Literal

import jax

NormScope = Literal["head", "all_heads"]
NORM_SCOPES: tuple[NormScope, ...] = ("head", "all_heads")
WEIGHT_OFFSETS = (0.0, 1.0)


_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QKNorm:
    """RMSNorm of queries and keys: `x / sqrt(mean(x**2) + epsilon) * (weight_offset + weight)`.

    Computed in float32 and not rounded before the rotation that follows.

    The pytree does not check itself, since JAX rebuilds it around tracers; operations do.

    Attributes:
      q_weight: float `[head_dim]`, or `[num_q_heads * head_dim]` with scope "all_heads". None
        for a norm without weight.
      k_weight: The same for keys, `[num_kv_heads * head_dim]` with scope "all_heads".
      epsilon: Added to the mean square; what a model was trained with, so there is no default.
      weight_offset: 0.0, or 1.0 for models that store `weight - 1` (Gemma, Qwen3-Next).
      scope: "head": the mean is over the dims of a head (Qwen3). "all_heads": over all heads
        of a token (MiniMax, OLMo 2).
      normalize_v: Normalise values too, over the same scope, without weight (Gemma 4).
    """

    q_weight: jax.Array | None
    k_weight: jax.Array | None
    epsilon: float = dataclasses.field(metadata=_STATIC)
    weight_offset: float = dataclasses.field(default=0.0, metadata=_STATIC)
    scope: NormScope = dataclasses.field(default="head", metadata=_STATIC)
    normalize_v: bool = dataclasses.field(default=False, metadata=_STATIC)
