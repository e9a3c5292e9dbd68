# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Attention kernels for JAX on AMD, NVIDIA and CPU."""

from jax_attn import ffi
from jax_attn._src.explain import CallExplanation, explain
from jax_attn._src.fused_qkv_rope_cache.api import FusedQKV, fused_qkv_rope_cache
from jax_attn._src.kv_cache import PagedKVCache
from jax_attn._src.merge import merge_attention
from jax_attn._src.page_allocator import PageAllocator
from jax_attn._src.qk_norm import QKNorm
from jax_attn._src.registration import platforms
from jax_attn._src.rope import Rope
from jax_attn._src.small_seq_attention.api import small_seq_attention
from jax_attn._src.split_kv_attention.api import paged_attention, split_kv_attention

__all__ = [
    "CallExplanation",
    "FusedQKV",
    "PageAllocator",
    "PagedKVCache",
    "QKNorm",
    "Rope",
    "explain",
    "ffi",
    "fused_qkv_rope_cache",
    "merge_attention",
    "paged_attention",
    "platforms",
    "small_seq_attention",
    "split_kv_attention",
]
