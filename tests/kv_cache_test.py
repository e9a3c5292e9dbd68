# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The paged cache, its slots and its page allocator."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_attn
from jax_attn import PageAllocator, PagedKVCache


@pytest.mark.parametrize("num_layers", [None, 3])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_zeros_and_properties(layout, num_layers):
    cache = PagedKVCache.zeros(
        5, 16, 2, 64, v_head_dim=32, num_layers=num_layers, dtype=jnp.float8_e4m3fn, layout=layout
    )
    lead = () if num_layers is None else (num_layers,)
    page = (16, 2) if layout == "NHD" else (2, 16)
    assert cache.k_pages.shape == (*lead, 5, *page, 64)
    assert cache.v_pages.shape == (*lead, 5, *page, 32)
    assert cache.k_pages.dtype == cache.v_pages.dtype == jnp.float8_e4m3fn
    assert not cache.k_pages.astype(jnp.float32).any()
    assert cache.num_layers == num_layers
    assert (cache.num_pages, cache.page_size, cache.num_kv_heads) == (5, 16, 2)
    assert cache.layout == layout
    assert cache.k_scale is cache.v_scale is None


def test_zeros_defaults_and_scales():
    scale = jnp.float32(0.5)
    cache = PagedKVCache.zeros(0, 1, 1, 8, k_scale=scale, v_scale=2 * scale)
    assert cache.k_pages.shape == cache.v_pages.shape == (0, 1, 1, 8)
    assert cache.k_pages.dtype == jnp.bfloat16
    assert cache.layout == "NHD"
    assert (float(cache.k_scale), float(cache.v_scale)) == (0.5, 1.0)


def test_cache_is_a_pytree_that_does_not_check_itself():
    cache = PagedKVCache.zeros(5, 16, 2, 64, layout="HND", k_scale=jnp.float32(2))
    leaves, tree = jax.tree.flatten(cache)
    assert len(leaves) == 3
    assert jax.tree.unflatten(tree, [None] * 3).layout == "HND"
    assert jax.tree.map(lambda x: x.shape, cache).k_pages == (5, 2, 16, 64)
    assert tree != jax.tree.structure(PagedKVCache.zeros(5, 16, 2, 64, k_scale=jnp.float32(2)))
    doubled = jax.jit(lambda c: jax.tree.map(lambda x: x + jnp.ones_like(x), c))(cache)
    assert isinstance(doubled, PagedKVCache)
    assert doubled.layout == "HND"
    np.testing.assert_array_equal(doubled.v_pages, 1)
    assert doubled.k_scale == 3
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(cache)]
    assert paths == [".k_pages", ".v_pages", ".k_scale"]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_cache_is_carried_through_a_scan(layout):
    cache = PagedKVCache.zeros(2, 4, 1, 8, num_layers=3, dtype=jnp.float32, layout=layout)

    def write(cache, layer):
        pages = cache.k_pages.at[layer].add(layer.astype(jnp.float32))
        return PagedKVCache(pages, cache.v_pages, layout=cache.layout), None

    cache, _ = jax.lax.scan(write, cache, jnp.arange(3, dtype=jnp.int32))
    np.testing.assert_array_equal(cache.k_pages.max((1, 2, 3, 4)), [0, 1, 2])


@pytest.mark.parametrize("num_layers", [None, 2])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_slots(layout, num_layers):
    cache = PagedKVCache.zeros(10, 4, 3, 8, layout=layout, num_layers=num_layers)
    table = np.array([[7, 2, 9], [0, -1, 10]], np.int32)
    positions = np.array([[0, 3, 4, 11, 12, -1], [1, 4, 8, -5, 2**31 - 1, 3]], np.int32)
    expected = [[28, 31, 8, 39, -1, -1], [1, -1, -1, -1, -1, 3]]
    for slots in (cache.slots, jax.jit(cache.slots)):
        result = slots(table, positions)
        np.testing.assert_array_equal(result, expected)
        assert result.dtype == jnp.int32


def test_page_ids_whose_slot_would_wrap_around_have_none():
    cache = PagedKVCache.zeros(8, 16, 1, 8)
    table = np.array([[2**28, 2**28 + 1, 2**31 - 1, -(2**31), 7]], np.int32)
    slots = cache.slots(table, np.arange(0, 80, 16, dtype=np.int32)[None])
    np.testing.assert_array_equal(slots, [[-1, -1, -1, -1, 112]])


@pytest.mark.parametrize("batch, max_pages, tokens", [(2, 0, 3), (0, 2, 3), (2, 2, 0)])
def test_slots_of_nothing(batch, max_pages, tokens):
    cache = PagedKVCache.zeros(2, 4, 1, 8)
    slots = cache.slots(
        jnp.zeros((batch, max_pages), jnp.int32), jnp.zeros((batch, tokens), jnp.int32)
    )
    np.testing.assert_array_equal(slots, np.full((batch, tokens), -1))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_token_written_to_its_slot_is_the_one_attended_to(layout):
    # slots(), the layout and paged_attention agree on where a token lives.
    cache = PagedKVCache.zeros(6, 4, 1, 8, dtype=jnp.float32, layout=layout)
    table = jnp.array([[5, 1], [3, 0]], jnp.int32)
    positions = jnp.array([[6], [2]], jnp.int32)
    slots = cache.slots(table, positions)[:, 0]
    page, offset = slots // 4, slots % 4
    where = (page, offset, 0) if layout == "NHD" else (page, 0, offset)
    values = jnp.arange(16, dtype=jnp.float32).reshape(2, 8)
    cache = PagedKVCache(cache.k_pages, cache.v_pages.at[where].set(values), layout=layout)
    query = jnp.ones((2, 1, 1, 8))
    newest_only = {"causal": "bottom_right", "sliding_window": 1}
    out = jax_attn.paged_attention(query, cache, table, positions[:, 0] + 1, **newest_only)
    np.testing.assert_array_equal(out[:, 0, 0], values)


class NaiveAllocator:
    """Counts users of pages in a dict."""

    def __init__(self, num_pages):
        self.num_pages = num_pages
        self.users = collections.Counter()

    def free_pages(self):
        return [page for page in range(self.num_pages) if not self.users[page]]


@pytest.mark.parametrize("num_pages", [0, 1, 7, 40])
def test_allocator_against_a_model(num_pages):
    rng = np.random.default_rng(num_pages)
    pages, model = PageAllocator(num_pages), NaiveAllocator(num_pages)
    held = []  # what each user holds, as given to it
    refused = collections.Counter()
    for _ in range(1000):
        match rng.choice(["alloc", "share", "free", "free twice", "share idle"]):
            case "alloc":
                wanted, free = int(rng.integers(0, num_pages // 3 + 2)), model.free_pages()
                if wanted > len(free):
                    refused["alloc"] += 1
                    with pytest.raises(MemoryError):
                        pages.alloc(wanted)
                else:
                    ids = pages.alloc(wanted)
                    assert ids.dtype == np.int32
                    assert ids.tolist() == free[:wanted]  # the lowest free ids
                    model.users.update(ids.tolist())
                    held.append(ids)
            case "share" if held:
                prefix = held[rng.integers(len(held))]
                prefix = prefix[: rng.integers(len(prefix) + 1)]
                np.testing.assert_array_equal(pages.share(prefix), prefix)
                model.users.update(prefix.tolist())
                held.append(prefix)
            case "free" if held:
                ids = held.pop(rng.integers(len(held)))
                pages.free(ids if rng.random() < 0.5 else ids[::-1].tolist())
                model.users.subtract(ids.tolist())
            case "free twice" if held:
                ids = held[rng.integers(len(held))][:1]
                too_often = [0, num_pages]  # outside the pool
                if len(ids):
                    too_often = np.repeat(ids, model.users[int(ids[0])] + 1)
                refused["free"] += 1
                with pytest.raises(ValueError, match=r"^PageAllocator\.free: "):
                    pages.free(too_often)
            case "share idle" if model.free_pages():
                idle = rng.choice(model.free_pages())
                refused["share"] += 1
                with pytest.raises(ValueError, match="is not in use"):
                    pages.share([*(page for page in held[0][:1] if held), idle] if held else [idle])
        assert pages.num_free == len(model.free_pages())
    assert refused["alloc"]
    for ids in held:
        pages.free(ids)
    assert pages.alloc(num_pages).tolist() == list(range(num_pages))


def test_freeing_a_shared_page_keeps_it_for_the_other_user():
    pages = PageAllocator(3)
    prefix = pages.alloc(2)
    pages.share(prefix)
    pages.free(prefix)
    assert pages.num_free == 1
    assert pages.alloc(1).tolist() == [2]
    pages.free(prefix[:1])
    assert pages.alloc(1).tolist() == [0]


def test_a_refused_call_changes_nothing():
    pages = PageAllocator(4)
    mine = pages.alloc(3)
    for refused in (
        lambda: pages.alloc(2),
        lambda: pages.share([0, 3]),
        lambda: pages.free([0, 1, 3]),
        lambda: pages.free([0, 1, 1]),
        lambda: pages.free([0, 4]),
        lambda: pages.free([0.0]),
    ):
        with pytest.raises((MemoryError, ValueError, TypeError)):
            refused()
        assert pages.num_free == 1
    pages.free(mine)
    assert pages.alloc(4).tolist() == [0, 1, 2, 3]
