# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""What memory the fused QKV kernel touches, and addresses of more than 32 bits."""

import contextlib
import ctypes
import mmap
import resource
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from native_memory_test import forbid, lazy_memory, needs_mprotect, without_copy

import jax_attn

pytestmark = pytest.mark.skipif(
    "cpu" not in jax_attn.platforms(), reason="this build of jax_attn has no kernels for the CPU"
)

INT_MAX = np.iinfo(np.int32).max
LAYERS, PAGES = 3, 4


def protect(address, size, access):
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    done = mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), access)
    assert done == 0, ctypes.get_errno()


@contextlib.contextmanager
def only(array, layer, page):
    """Makes every access to another page of a JAX array crash the process."""
    page_bytes = array.nbytes // (LAYERS * PAGES)
    start = array.unsafe_buffer_pointer()
    ranges = []
    for index in range(LAYERS * PAGES):
        begin, end = (start + i * page_bytes for i in (index, index + 1))
        # Whole pages of memory; the first and the last one of the array are others' as well.
        begin, end = (
            -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE,
            end // mmap.PAGESIZE * mmap.PAGESIZE,
        )
        if divmod(index, PAGES) != (layer, page):
            ranges.append((begin, end - begin))
    for begin, size in ranges:
        protect(begin, size, 0)
    yield
    for begin, size in ranges:
        protect(begin, size, mmap.PROT_READ | mmap.PROT_WRITE)


def write_guarded(layout, dtype, layer, slots_of, page):
    """Stores tokens in a donated cache of which only page `page` of layer 1 may be touched."""
    heads, head_dim = 4, 64
    page_size = 4 * mmap.PAGESIZE // (heads * head_dim * jnp.dtype(dtype).itemsize)
    cache = jax_attn.PagedKVCache.zeros(
        PAGES, page_size, heads, head_dim, num_layers=LAYERS, dtype=dtype, layout=layout
    )
    slots = np.int32(slots_of(page_size, PAGES * page_size))
    # At the end of memory: nothing behind qkv may be read.
    size = len(slots) * 12 * 64 * 4
    memory = lazy_memory(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE)
    forbid(memory, (len(memory) - mmap.PAGESIZE, len(memory)))
    rows = memory[len(memory) - mmap.PAGESIZE - size : len(memory) - mmap.PAGESIZE]
    rows = rows.view(np.float32).reshape(len(slots), 12 * 64)
    rows[...] = 1
    norm = jax_attn.QKNorm(jnp.ones(64), jnp.ones(64), 1e-6)
    positions = np.where(np.arange(len(slots)) % 2, INT_MAX, -INT_MAX - 1).astype(np.int32)

    def update(cache, qkv):
        return jax_attn.fused_qkv_rope_cache(
            qkv,
            cache,
            slots,
            num_q_heads=4,
            positions=positions,
            rope=jax_attn.Rope.default(64, 8),
            qk_norm=norm,
            layer=jnp.int32(layer),
            implementation="native",
        )

    qkv = without_copy(rows)
    compiled = jax.jit(update, donate_argnums=0).lower(cache, qkv).compile()
    jax.block_until_ready(cache)
    with only(cache.k_pages, 1, page), only(cache.v_pages, 1, page):
        result = jax.block_until_ready(compiled(cache, qkv))
    assert np.all(result.value == 1)
    stored = np.asarray(result.cache.v_pages).astype(np.float32)
    here = stored[1, page]
    assert np.any(here == 1) == (layer == 1)
    assert stored.sum() == here.sum()


def garbage(page_size, capacity):
    """Slots that are none, and one at each end of page 2."""
    first, last = 2 * page_size, 3 * page_size - 1
    none = [-1, capacity, -capacity, INT_MAX, -INT_MAX - 1, capacity + 1]
    return [*none, first, *none, last, *none]


def main():
    with pytest.MonkeyPatch.context() as patch:
        support.use_variant(sys.argv[1], patch)
        if sys.argv[2:] == ["everything"]:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            write_guarded("NHD", "float32", 1, lambda size, _: [size + size // 2], 2)
        for layout in ("NHD", "HND"):
            for dtype in ("float32", "float8_e4m3fn"):
                write_guarded(layout, dtype, 1, garbage, 2)
                for layer in (-1, LAYERS, INT_MAX):
                    write_guarded(
                        layout, dtype, layer, lambda size, _: [size // 2, 3 * size // 2], 2
                    )
    print("nothing else was touched")


def run_guarded(*arguments):
    return subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=120
    )


@needs_mprotect
@pytest.mark.parametrize("name", support.VARIANTS)
def test_touches_only_the_slots_of_tokens(name):
    done = run_guarded(name)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "nothing else was touched\n"


@needs_mprotect
def test_the_guard_works():
    assert run_guarded("portable", "everything").returncode == -signal.SIGSEGV


@pytest.mark.parametrize(("layout", "layers"), [("NHD", None), ("HND", 5)])
def test_pool_of_more_than_2_31_elements(layout, layers):
    page_size, heads, head_dim = 64, 2, 512
    pages = 2**31 // (page_size * heads * head_dim * (layers or 1)) + 6
    cache = jax_attn.PagedKVCache.zeros(
        pages,
        page_size,
        heads,
        head_dim,
        v_head_dim=8,
        num_layers=layers,
        dtype=jnp.int8,
        layout=layout,
    )
    assert cache.k_pages.size > 2**31
    capacity = pages * page_size
    slots = np.int32([capacity - 1, capacity, 0, capacity - page_size])
    rng = np.random.default_rng(0)
    qkv = rng.integers(-9, 9, (4, 2 * (2 * head_dim + 8))).astype(np.float32)

    def update(cache, qkv):
        return jax_attn.fused_qkv_rope_cache(
            qkv,
            cache,
            slots,
            num_q_heads=2,
            layer=None if layers is None else layers - 1,
            implementation="native",
        ).cache

    before = cache.k_pages.unsafe_buffer_pointer()
    updated = jax.jit(update, donate_argnums=0)(cache, qkv)
    assert updated.k_pages.unsafe_buffer_pointer() == before
    stored = np.asarray(updated.k_pages)  # shares the memory
    pool = stored if layers is None else stored[-1]
    for token in (0, 2, 3):
        page, offset = divmod(int(slots[token]), page_size)
        row = pool[page, offset] if layout == "NHD" else pool[page, :, offset]
        expected = qkv[token, 2 * head_dim : 4 * head_dim].reshape(2, head_dim)
        np.testing.assert_array_equal(row, expected)


if __name__ == "__main__":
    main()
