# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The paged KV cache: pages of keys and values that sequences share."""

import dataclasses
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp

from jax_attn._src import checks, dtypes

PageLayout = Literal["NHD", "HND"]
PAGE_LAYOUTS: tuple[PageLayout, ...] = ("NHD", "HND")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Pages of keys and values, and the scales of quantised ones.

    A sequence owns no memory: a page table lists its pages in order. Token `i` of a sequence
    lives in page `page_table[b, i // page_size]` at offset `i % page_size`.

    The pytree does not check itself, since JAX rebuilds it around tracers; operations do.

    Attributes:
      k_pages: Keys, `[num_pages, page_size, num_kv_heads, head_dim]` in layout "NHD" or
        `[num_pages, num_kv_heads, page_size, head_dim]` in layout "HND". A leading layer axis
        makes it the cache of a whole model: `[num_layers, num_pages, ...]`.
      v_pages: Values, like `k_pages`; their head_dim may differ.
      k_scale: Float32 scale of stored keys: key = stored * k_scale. A scalar `[]`, per head
        `[num_kv_heads]`, per layer and head `[num_layers, num_kv_heads]`, or per token with the
        shape of `k_pages` less its head_dim. None for 1.
      v_scale: The same for values.
      layout: "NHD" (tokens before heads) or "HND" (heads before tokens).
    """

    k_pages: jax.Array
    v_pages: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    layout: PageLayout = dataclasses.field(default="NHD", metadata={"static": True})

    @classmethod
    def zeros(
        cls,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        num_layers: int | None = None,
        dtype: Any = jnp.bfloat16,
        layout: PageLayout = "NHD",
        k_scale: jax.Array | None = None,
        v_scale: jax.Array | None = None,
    ) -> Self:
        """Returns a cache of zeros.

        Args:
          num_pages: Pages in the pool (of each layer); 0 is a pool without pages.
          page_size: Tokens in a page.
          num_kv_heads: Heads of keys and values.
          head_dim: Size of a key.
          v_head_dim: Size of a value, `head_dim` if None.
          num_layers: Length of the leading layer axis, None for a cache without one.
          dtype: float32, bfloat16, float16, int8, float8_e4m3fn, float8_e4m3fnuz or float8_e5m2.
          layout: "NHD" or "HND".
          k_scale: Scale of stored keys.
          v_scale: Scale of stored values.

        Raises:
          ValueError: For another size below 1, or an unknown layout.
          TypeError: For a dtype that no cache has.
        """
        op = "PagedKVCache.zeros"
        sizes = {
            "num_pages": num_pages,
            "page_size": page_size,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "v_head_dim": head_dim if v_head_dim is None else v_head_dim,
            "num_layers": 1 if num_layers is None else num_layers,
        }
        for name, size in sizes.items():
            checks.check_at_least(op, name, size, 0 if name == "num_pages" else 1)
        checks.check_choice(op, "layout", layout, PAGE_LAYOUTS)
        if jnp.dtype(dtype) not in [jnp.dtype(d) for d in dtypes.CACHE_DTYPES]:
            names = ", ".join(jnp.dtype(d).name for d in dtypes.CACHE_DTYPES)
            raise TypeError(f"{op}: dtype must be one of {names}, got {jnp.dtype(dtype).name}.")
        page = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)
        lead = (num_pages,) if num_layers is None else (num_layers, num_pages)
        return cls(
            k_pages=jnp.zeros((*lead, *page, head_dim), dtype),
            v_pages=jnp.zeros((*lead, *page, sizes["v_head_dim"]), dtype),
            k_scale=k_scale,
            v_scale=v_scale,
            layout=layout,
        )

    @property
    def num_layers(self) -> int | None:
        """Length of the leading layer axis, None without one."""
        return self.k_pages.shape[0] if self.k_pages.ndim == 5 else None

    @property
    def num_pages(self) -> int:
        """Pages in the pool (of each layer)."""
        return self.k_pages.shape[-4]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.k_pages.shape[-3 if self.layout == "NHD" else -2]

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.k_pages.shape[-2 if self.layout == "NHD" else -3]

    def slots(self, page_table: jax.Array, positions: jax.Array) -> jax.Array:
        """Returns where tokens are stored: `page * page_size + offset`, or -1 for no slot.

        Args:
          page_table: int32 `[batch, max_pages]`, page ids of each sequence in order. A token of
            a page outside the pool has no slot.
          positions: int32 `[batch, num_tokens]`, positions of tokens in their sequence. A
            negative position, or one past the table, has no slot.

        Returns:
          int32 `[batch, num_tokens]`.

        Raises:
          ValueError: If the shapes disagree.
          TypeError: If an argument is not int32.
        """
        op = "PagedKVCache.slots"
        for name, array in {"page_table": page_table, "positions": positions}.items():
            checks.check_dtype(op, name, array, (jnp.int32,))
        dims = checks.Dims(op)
        dims.bind("page_table", page_table, "batch max_pages")
        dims.bind("positions", positions, "batch num_tokens")
        page_index = positions // self.page_size
        inside = (positions >= 0) & (page_index < dims["max_pages"])
        if dims["max_pages"] == 0:
            return jnp.full_like(positions, -1)
        pages = jnp.take_along_axis(page_table, jnp.where(inside, page_index, 0), axis=1)
        # The product of another id could wrap around to a slot of another sequence.
        inside &= (pages >= 0) & (pages < self.num_pages)
        slots = pages * self.page_size + positions % self.page_size
        return jnp.where(inside, slots, -1)


def check_cache(dims: checks.Dims, cache: Any, layer: Any) -> jax.Array | None:
    """Checks argument `cache` of an operation, and `layer` with it.

    Args:
      dims: Dimensions of the call; those of the cache are bound.
      cache: What the user gave.
      layer: What the user gave.

    Returns:
      The layer as an int32 scalar, None for a cache without layers.
    """
    op = dims.op
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"{op}: `cache` must be a PagedKVCache, got {type(cache).__name__}.")
    checks.check_choice(op, "cache.layout", cache.layout, PAGE_LAYOUTS)
    checks.check_dtype(op, "cache.k_pages", cache.k_pages, dtypes.CACHE_DTYPES)
    checks.check_dtype(op, "cache.v_pages", cache.v_pages, (cache.k_pages.dtype,))
    layer = checks.check_layer(op, cache.k_pages, layer)
    page = "page_size num_kv_heads" if cache.layout == "NHD" else "num_kv_heads page_size"
    pages = f"num_pages {page}" if layer is None else f"num_layers num_pages {page}"
    dims.bind("cache.k_pages", cache.k_pages, f"{pages} head_dim")
    dims.bind("cache.v_pages", cache.v_pages, f"{pages} v_head_dim")
    for name in ("page_size", "num_kv_heads", "head_dim", "v_head_dim"):
        checks.check_at_least(op, f"{name} of `cache`", dims[name], 1)
    scales = ["num_kv_heads", *([] if layer is None else ["num_layers num_kv_heads"]), pages]
    checks.check_scale(dims, "cache.k_scale", cache.k_scale, scales)
    checks.check_scale(dims, "cache.v_scale", cache.v_scale, scales)
    return layer
