# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Attention kernels for JAX on AMD, NVIDIA and CPU."""

from jax_attn._src.kv_cache import PagedKVCache
from jax_attn._src.merge import merge_attention
from jax_attn._src.page_allocator import PageAllocator
from jax_attn._src.registration import platforms
from jax_attn._src.split_kv_attention.api import paged_attention, split_kv_attention

__all__ = [
    "PageAllocator",
    "PagedKVCache",
    "merge_attention",
    "paged_attention",
    "platforms",
    "split_kv_attention",
]
