# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""What memory the CPU kernels read, and addresses of more than 32 bits."""

import ctypes
import functools
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

import jax_attn
from jax_attn._src.split_kv_attention import primitive
from jax_attn._src.split_kv_attention.problem import Operands, Options

pytestmark = pytest.mark.skipif(
    "cpu" not in jax_attn.platforms(), reason="this build of jax_attn has no kernels for the CPU"
)


VARIANTS = support.VARIANTS

attend = functools.partial(
    jax_attn.split_kv_attention, return_lse=True, implementation="native", scale=1.0
)


def attend_to_part(query, key, value, query_offset, **options):
    """Attends to keys that are a part of their context, as a shard is."""
    operands = Operands(query, key, value, query_offset=jnp.asarray(query_offset, jnp.int32))
    return primitive.attend(operands, Options(scale=1.0, implementation="native", **options))


# ---- What is read


def lazy_memory(nbytes):
    """Bytes at the start of a page of memory, which become resident where they are touched."""
    no_reserve = 0x4000  # MAP_NORESERVE, which Python 3.11 does not name
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=flags), np.uint8)


def without_copy(array):
    """The same memory as a JAX array."""
    shared = jax.dlpack.from_dlpack(array)
    assert shared.unsafe_buffer_pointer() == array.ctypes.data
    return shared


def forbid(array, where):
    """Makes every read of an array's bytes from `where[0]` to `where[1]` crash the process."""
    begin, end = where
    assert begin % mmap.PAGESIZE == 0 and end % mmap.PAGESIZE == 0
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    address = ctypes.c_void_p(array.ctypes.data + begin)
    assert protect(address, ctypes.c_size_t(end - begin), 0) == 0, ctypes.get_errno()


def attend_guarded(unread, **options):
    """Attends to 2 contexts of 64 tokens, a page of memory each.

    Args:
      unread: `(sequence, first token, last token + 1)` of each part that must not be read.
      **options: Of the operation.
    """
    head_dim = 64
    heads = mmap.PAGESIZE // 4 // head_dim
    shape = (2, 64, heads, head_dim)
    arrays = []
    for fill in (0.0, 1.0):
        array = lazy_memory(4 * int(np.prod(shape))).view(np.float32).reshape(shape)
        array[...] = fill
        arrays.append(without_copy(array))
        for sequence, begin, end in unread:
            start = sequence * 64 * mmap.PAGESIZE
            forbid(array, (start + begin * mmap.PAGESIZE, start + end * mmap.PAGESIZE))
    query = jnp.ones((2, 2, heads, head_dim))
    run = attend_to_part if "query_offset" in options else attend
    out, _ = run(query, *arrays, **options)
    out = np.asarray(out)
    assert np.all((np.abs(out - 1) < 1e-6) | (out == 0)), options


def guards():
    """Cases of `attend_guarded`: lengths, causal, window and mask."""
    mask = np.zeros((2, 1, 1, 64), bool)
    mask[0, ..., 7:9] = mask[1, ..., 50] = True
    per_head = np.zeros((2, 16, 2, 64), bool)
    per_head[0, 3, 1, 7:9] = per_head[1, 9, 0, 50] = True
    lengths = jnp.array([33, 1], jnp.int32)
    return [
        ([(0, 33, 64), (1, 1, 64)], {"kv_lengths": lengths}),
        ([(0, 33, 64), (1, 1, 64)], {"kv_lengths": lengths, "num_splits": 3}),
        ([(0, 33, 64), (1, 1, 64)], {"kv_lengths": lengths, "split_size": 16}),
        ([(1, 0, 64)], {"kv_lengths": jnp.array([64, 0], jnp.int32)}),
        ([(0, 2, 64), (1, 2, 64)], {"causal": "top_left"}),
        ([(0, 0, 57), (1, 0, 57)], {"causal": "bottom_right", "sliding_window": 6}),
        ([(0, 0, 57), (1, 0, 57)], {"sliding_window": 6}),
        (
            [(0, 0, 28), (0, 33, 64), (1, 1, 64)],
            {"kv_lengths": lengths, "sliding_window": 4, "num_splits": 2},
        ),
        ([(0, 0, 64), (1, 1, 64)], {"query_offset": [-5, -1], "causal": "bottom_right"}),
        (
            [(0, 0, 64), (1, 0, 62)],
            {"query_offset": [70, 67], "causal": "bottom_right", "sliding_window": 6},
        ),
        ([(0, 0, 7), (0, 9, 64), (1, 0, 50), (1, 51, 64)], {"mask": jnp.asarray(mask)}),
        ([(0, 0, 7), (0, 9, 64), (1, 0, 50), (1, 51, 64)], {"mask": jnp.asarray(per_head)}),
        (
            [(0, 0, 7), (0, 9, 64), (1, 0, 64)],
            {"mask": jnp.asarray(per_head), "kv_lengths": lengths},
        ),
    ]


def attend_guarded_pages(layout):
    """Attends to pages of a pool of layers, all others of which must not be read."""
    layers, pages, page_size, heads, head_dim = 3, 8, 4, 4, 64
    assert page_size * heads * head_dim * 4 == mmap.PAGESIZE
    inner = (page_size, heads) if layout == "NHD" else (heads, page_size)
    shape = (layers, pages, *inner, head_dim)
    used = {(2, 1), (2, 4), (2, 5)}
    arrays = []
    for fill in (0.0, 1.0):
        array = lazy_memory(4 * int(np.prod(shape))).view(np.float32).reshape(shape)
        array[...] = fill
        arrays.append(without_copy(array))
        for layer in range(layers):
            for page in range(pages):
                if (layer, page) not in used:
                    start = (layer * pages + page) * mmap.PAGESIZE
                    forbid(array, (start, start + mmap.PAGESIZE))
    cache = jax_attn.PagedKVCache(*arrays, layout=layout)
    # The first sequence has two pages, the second one page; before its window and after its
    # length the table lists pages that must not be read.
    table = jnp.array([[4, 1, 0], [6, 5, -1]], jnp.int32)
    out = jax_attn.paged_attention(
        jnp.ones((2, 1, heads, head_dim)),
        cache,
        table,
        jnp.array([8, 6], jnp.int32),
        layer=jnp.int32(2),
        sliding_window=2 if layout == "NHD" else None,
        mask=None
        if layout == "NHD"
        else jnp.array([[[[True] * 12]], [[[False] * 4 + [True] * 8]]]),
        implementation="native",
    )
    np.testing.assert_array_equal(out, np.ones(out.shape))


def main():
    """Runs the cases that a read of too much would crash."""
    with pytest.MonkeyPatch.context() as patch:
        support.use_variant(sys.argv[1], patch)
        if sys.argv[2:] == ["everything"]:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            attend_guarded(guards()[0][0])
        for unread, options in guards():
            attend_guarded(unread, **options)
        for layout in ("NHD", "HND"):
            attend_guarded_pages(layout)
    print("nothing else was read")


def run_guarded(*arguments):
    return subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=120
    )


needs_mprotect = pytest.mark.skipif(
    not sys.platform.startswith("linux") or mmap.PAGESIZE != 4096,
    reason="needs mprotect and memory pages of 4096 bytes",
)


@needs_mprotect
@pytest.mark.parametrize("name", VARIANTS)
def test_reads_only_what_is_seen(name):
    done = run_guarded(name)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "nothing else was read\n"


@needs_mprotect
def test_the_guard_works():
    assert run_guarded("portable", "everything").returncode == -signal.SIGSEGV


# ---- Addresses of more than 32 bits


def huge(shape, dtype):
    """Zeros that take memory only where they are written; skips where that is not possible."""
    dtype = jnp.dtype(dtype)
    try:
        memory = lazy_memory(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
    except OSError as error:
        pytest.skip(f"no address space for an array of shape {shape}: {error}")
    return memory.view(dtype).reshape(shape)


def near_one(rng, shape, dtype):
    return rng.integers(-3, 4, shape).astype(jnp.dtype(dtype))


needs_lazy_memory = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs memory that is allocated when it is touched"
)


@needs_lazy_memory
@pytest.mark.parametrize("dtype", ["int8", "float32"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("layers", [None, 5])
def test_pool_of_more_than_2_31_elements(variant, dtype, layout, layers):
    rng = np.random.default_rng(0)
    page_size, heads, head_dim = 64, 2, 512
    pages = 2**31 // (page_size * heads * head_dim) + 6
    shape = (pages, page_size, heads) if layout == "NHD" else (pages, heads, page_size)
    if layers:
        shape = (layers, -(-pages // layers), *shape[1:])
    key, value = huge((*shape, head_dim), dtype), huge((*shape, 8), dtype)
    for array in (key, value):
        pool = array if layers is None else array[-1]
        pool[-4:] = near_one(rng, pool[-4:].shape, dtype)
    table = key.shape[-4] - 1 - np.array([[0, 2], [3, 1]], np.int32)
    assert key.size > 2**31
    query = near_one(rng, (2, 1, 4, head_dim), "float32") / np.float32(64)
    lengths = np.array([128, 70], np.int32)
    cache = jax_attn.PagedKVCache(without_copy(key), without_copy(value), layout=layout)
    out, lse = jax_attn.paged_attention(
        jnp.asarray(query),
        cache,
        jnp.asarray(table),
        jnp.asarray(lengths),
        layer=None if layers is None else layers - 1,
        return_lse=True,
        implementation="native",
    )
    arrays = {"query": query, "key": key, "value": value, "page_table": table}
    arrays["kv_lengths"] = lengths
    if layers:
        arrays["layer"] = np.int32(layers - 1)
    expected = support.Problem(arrays, {}, layout).solve()
    support.assert_close(np.asarray(out), np.asarray(lse), expected, np.float32)


@needs_lazy_memory
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_context_of_more_than_2_31_elements(variant, dtype):
    rng = np.random.default_rng(0)
    kv_len, heads, head_dim = 2**19 + 3, 8, 512
    key, value = huge((2, kv_len, heads, head_dim), dtype), huge((2, kv_len, heads, 8), dtype)
    for array in (key, value):
        array[:, -40:] = near_one(rng, array[:, -40:].shape, dtype)
    assert key[0].size > 2**31
    query = near_one(rng, (2, 1, heads, head_dim), "float32") / np.float32(64)
    lengths = np.array([kv_len, kv_len - 1], np.int32)
    out, lse = jax_attn.split_kv_attention(
        jnp.asarray(query),
        without_copy(key),
        without_copy(value),
        kv_lengths=jnp.asarray(lengths),
        sliding_window=39,
        return_lse=True,
        implementation="native",
    )
    problem = support.Problem(
        {"query": query, "key": key, "value": value, "kv_lengths": lengths},
        {"sliding_window": 39},
    )
    support.assert_close(np.asarray(out), np.asarray(lse), problem.solve(), np.float32)


if __name__ == "__main__":
    main()
