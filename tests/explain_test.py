# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""What `explain` says, compared with numbers worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_attn
from jax_attn._src import registration

NATIVE = "cpu" in jax_attn.platforms()
needs_native = pytest.mark.skipif(
    not NATIVE, reason="this build of jax_attn has no kernels for the CPU"
)

# 4 bytes of each: query and output 2 x 1 x 4 x 64, keys and values 2 x 48 x 2 x 64, lse 2 x 1 x 4.
QUERY = jnp.zeros((2, 1, 4, 64))
KEY = jnp.zeros((2, 48, 2, 64))
DENSE_BYTES = 4 * (2 * 512 + 2 * 12288 + 8)

# A pool of 512 tokens, of which the tables of both sequences list 4 pages of 16 tokens each.
POOL = (32, 16, 2, 64)
TABLE = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
LENGTHS = jnp.array([5, 20], jnp.int32)
PAGED_BYTES = 4 * (2 * 512 + 2 * (2 * 64) * 2 * 64 + 8)


def cache_of(*shape, v_head_dim=64, dtype=jnp.float32, layout="NHD"):
    pages = jnp.zeros(shape, dtype), jnp.zeros((*shape[:-1], v_head_dim), dtype)
    return jax_attn.PagedKVCache(*pages, layout=layout)


def dense(query, key, **options):
    return jax_attn.split_kv_attention(query, key, key, **options)


def one(calls):
    (call,) = calls
    return call


def workspace_size(**changes):
    sizes = {
        **{"batch": 2, "query_len": 1, "num_q_heads": 4, "num_kv_heads": 2},
        **{"head_dim": 64, "v_head_dim": 64, "kv_len": 48},
        **changes,
    }
    return jax_attn.ffi.split_kv_workspace_size("cpu", **sizes)


@needs_native
def test_variant_of_operations_without_matrix_instructions():
    assert registration.variant_of("cpu", "amx") == "avx512"
    assert registration.variant_of("cpu", "avx2") == "avx2"


@needs_native
def test_native():
    scratch = 4 * workspace_size()
    variant = jax_attn.ffi.variants("cpu")[0]
    call = one(jax_attn.explain(dense)(QUERY, KEY))
    assert call == jax_attn.CallExplanation(
        op="split_kv_attention",
        platform="cpu",
        implementation="native",
        variant=variant,
        num_splits=1,
        scratch_bytes=scratch,
        bytes_moved=DENSE_BYTES,
        cache_copies=0,
        refused={"xla": "the native kernel takes this case"},
    )
    assert DENSE_BYTES == 102432
    assert str(call) == (
        f"split_kv_attention on cpu: native ({variant}, 1 splits)\n"
        f"  scratch: {scratch} bytes\n"
        "  moves: 102432 bytes at full length\n"
        "  not xla: the native kernel takes this case"
    )


@needs_native
@pytest.mark.parametrize("options", [{"num_splits": 3}, {"split_size": 16}])
def test_splits_and_their_scratch(options):
    call = one(jax_attn.explain(functools.partial(dense, **options))(QUERY, KEY))
    planned = one(jax_attn.explain(dense)(QUERY, KEY))
    # 48 keys are two tiles of 32: three splits of whole tiles are two.
    assert call.num_splits == (2 if "num_splits" in options else 3)
    assert call.scratch_bytes == 4 * workspace_size(**options)
    # A partial result of each split is 2 kv heads x 2 rows x (64 values, maximum, sum).
    assert call.scratch_bytes >= planned.scratch_bytes + 4 * 2 * call.num_splits * 2 * 2 * 66
    assert call.bytes_moved == DENSE_BYTES


def test_xla():
    function = functools.partial(dense, implementation="xla")
    call = one(jax_attn.explain(function)(QUERY, KEY))
    assert (call.implementation, call.variant, call.num_splits) == ("xla", None, None)
    assert (call.scratch_bytes, call.bytes_moved) == (None, DENSE_BYTES)
    assert call.refused == {"native": 'implementation="xla" was asked for'}
    assert str(call).splitlines() == [
        "split_kv_attention on cpu: xla",
        "  moves: 102432 bytes at full length",
        '  not native: implementation="xla" was asked for',
    ]


@needs_native
def test_refused():
    call = one(jax_attn.explain(dense)(QUERY[..., :12], KEY[..., :12]))
    assert call.implementation == "xla"
    assert call.refused == {"native": "head_dim 12 is not a multiple of 8 up to 512"}
    assert call.bytes_moved == 4 * (2 * 96 + 2 * 2304 + 8)


def test_required_but_refused_raises_as_the_call_does():
    function = functools.partial(dense, implementation="native")
    with pytest.raises(NotImplementedError, match='implementation="native" cannot be used on cpu'):
        jax_attn.explain(function)(QUERY[..., :12], KEY[..., :12])


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_absent_platforms(platform):
    if platform in jax_attn.platforms():
        pytest.skip("this build of jax_attn has kernels for it")
    call = one(jax_attn.explain(dense, platform=platform)(QUERY, KEY))
    assert (call.platform, call.implementation, call.cache_copies) == (platform, "xla", None)
    reason = f"there is no kernel for split_kv_attention on {platform}"
    if platform != "tpu":
        name = {"cuda": "CUDA", "rocm": "ROCm"}[platform]
        reason = f"the {name} kernels are not installed, or too new for this jaxlib"
    assert call.refused == {"native": reason}
    assert str(call).splitlines() == [
        f"split_kv_attention on {platform}: xla",
        "  moves: 102432 bytes at full length",
        f"  not native: {reason}",
    ]
    required = functools.partial(dense, implementation="native")
    with pytest.raises(NotImplementedError, match=f"cannot be used on {platform}: {reason}"):
        jax_attn.explain(required, platform=platform)(QUERY, KEY)


def test_the_default_platform_can_be_named():
    assert jax_attn.explain(dense, platform="cpu")(QUERY, KEY) == jax_attn.explain(dense)(
        QUERY, KEY
    )


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_paged_counts_what_the_tables_list(layout):
    shape = POOL if layout == "NHD" else (32, 2, 16, 64)
    cache = cache_of(*shape, layout=layout)
    call = one(jax_attn.explain(jax_attn.paged_attention)(QUERY, cache, TABLE, LENGTHS))
    assert call.op == "paged_attention"
    assert call.bytes_moved == PAGED_BYTES == 135200
    assert call.cache_copies == 0
    if NATIVE:
        assert call.scratch_bytes == 4 * workspace_size(kv_len=64, page_layout=layout)
        assert call.num_splits == 1


@pytest.mark.parametrize("dtype, size", [("bfloat16", 2), ("int8", 1), ("float8_e4m3fn", 1)])
def test_bytes_by_dtype(dtype, size):
    cache = cache_of(*POOL, v_head_dim=8, dtype=jnp.dtype(dtype))
    query = QUERY.astype(jnp.bfloat16)
    call = one(jax_attn.explain(jax_attn.paged_attention)(query, cache, TABLE, LENGTHS))
    # Query, output with v_head_dim 8, lse; 2 x 64 tokens of 2 heads of 64 + 8 numbers.
    assert call.bytes_moved == 2 * 512 + 2 * 64 + 4 * 8 + size * (2 * 64) * 2 * (64 + 8)


def test_jit_and_static_arguments():
    function = jax.jit(dense, static_argnames=("causal", "num_splits"))
    options = {"causal": "top_left", "num_splits": 2}
    calls = jax_attn.explain(function)(QUERY, KEY, **options)
    assert calls == jax_attn.explain(functools.partial(dense, **options))(QUERY, KEY)
    assert jax_attn.explain(jax.jit(jax.jit(dense)))(QUERY, KEY) == jax_attn.explain(dense)(
        QUERY, KEY
    )


def test_calls_come_in_the_order_of_the_program():
    def function(query, key, cache):
        first = dense(query, key)
        second = jax_attn.paged_attention(first, cache, TABLE, LENGTHS)
        return dense(second, key, implementation="xla")

    calls = jax_attn.explain(function)(QUERY, KEY, cache_of(*POOL))
    assert [call.op for call in calls] == [
        *("split_kv_attention", "paged_attention", "split_kv_attention"),
    ]
    assert calls[2].implementation == "xla"


def test_control_flow():
    layers = cache_of(3, *POOL)

    def attend(x, layer):
        return jax_attn.paged_attention(x, layers, TABLE, LENGTHS, layer=layer)

    def scan(x):
        return jax.lax.scan(lambda x, i: (attend(x, i), None), x, jnp.arange(3, dtype=jnp.int32))[0]

    def loop(x):
        return jax.lax.fori_loop(0, 3, lambda i, x: attend(x, jnp.int32(i)), x)

    def cond(x):
        return jax.lax.cond(x[0, 0, 0, 0] > 0, lambda x: attend(x, 0), lambda x: x, x)

    def remat(x):
        return jax.checkpoint(lambda x: attend(x, 0))(x)

    for function in (scan, loop, cond, remat):
        call = one(jax_attn.explain(function)(QUERY))
        assert (call.op, call.bytes_moved) == ("paged_attention", PAGED_BYTES), function
        assert call.cache_copies == 0, function


def test_vmap_and_grad():
    call = one(jax_attn.explain(jax.vmap(dense, in_axes=(0, None)))(jnp.stack([QUERY] * 3), KEY))
    assert call.bytes_moved == 4 * (3 * 2 * 512 + 2 * 12288 + 3 * 8)
    # The forward call; a backward pass is plain JAX.
    calls = jax_attn.explain(jax.grad(lambda q: jnp.sum(dense(q, KEY))))(QUERY)
    assert one(calls).bytes_moved == DENSE_BYTES


def test_shard_map_is_explained_per_shard():
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    function = jax.shard_map(dense, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    call = one(jax_attn.explain(function)(QUERY, KEY))
    assert call.bytes_moved == DENSE_BYTES // 2
    if NATIVE:
        assert call.scratch_bytes == 4 * workspace_size(batch=1)


def test_no_calls():
    assert jax_attn.explain(lambda x: x + 1)(QUERY) == []


# A step of decoding: writes a token to the cache, then attends to it.
def step(query, cache, lengths):
    k_pages = cache.k_pages.at[TABLE[:, 0], lengths].set(1.0)
    v_pages = cache.v_pages.at[TABLE[:, 0], lengths].set(1.0)
    cache = jax_attn.PagedKVCache(k_pages, v_pages)
    return jax_attn.paged_attention(query, cache, TABLE, lengths + 1), cache


@pytest.mark.parametrize("v_head_dim", [64, 8])
def test_copies_of_a_cache_that_is_not_donated(v_head_dim):
    cache = cache_of(*POOL, v_head_dim=v_head_dim)
    for function in (step, jax.jit(step)):
        call = one(jax_attn.explain(function)(QUERY, cache, LENGTHS))
        assert call.cache_copies == 2  # keys and values
        assert "\n  copies of the cache: 2; is it donated?\n" in str(call)
    np.testing.assert_array_equal(cache.k_pages, np.zeros(POOL))  # nothing ran


def test_a_donated_cache_is_not_copied():
    cache = cache_of(*POOL)
    call = one(jax_attn.explain(jax.jit(step, donate_argnums=1))(QUERY, cache, LENGTHS))
    assert call.cache_copies == 0
    assert "copies" not in str(call)
    assert not cache.k_pages.is_deleted()


def test_works_on_shapes():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (QUERY, KEY))
    assert jax_attn.explain(dense)(*shapes) == jax_attn.explain(dense)(QUERY, KEY)


def test_keeps_the_name_of_the_function():
    assert jax_attn.explain(dense).__name__ == "dense"
