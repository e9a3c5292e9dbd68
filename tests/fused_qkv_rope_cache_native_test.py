# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel of `fused_qkv_rope_cache`: every variant, in place, and its shape of work."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qkv_cases
import qkv_oracle
import support
from jax.sharding import PartitionSpec as P
from qkv_cases import Problem, bits, ulps

import jax_attn

pytestmark = pytest.mark.skipif(
    "cpu" not in jax_attn.platforms(), reason="this build of jax_attn has no kernels for the CPU"
)

TARGET = "jax_attn_fused_qkv_rope_cache"
native = functools.partial(jax_attn.fused_qkv_rope_cache, implementation="native")


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    monkeypatch.setattr(Problem, "implementation", "native")


# ---- Values


def test_variant_solves_the_covering_array(variant):
    # Not by parameters: the calls take milliseconds.
    for case in qkv_cases.covering():
        problem = Problem(**case)
        problem.check(problem.run_eagerly())


# What the blocks of a vector width, and their remainders, can look like.
SHAPES = [
    {"head_dims": (h, hv), "rotary": rotary, "pairing": pairing, "norm": norm}
    for h, hv in [(8, 8), (24, 40), (96, 512), (512, 16), (192, 128)]
    for rotary, pairing, norm in [
        ("all", "halves", "weight"),
        ("last", "halves", "weightless_and_v"),
        ("first", "neighbours", "all_heads"),
        ("all", "neighbours", None),
    ]
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_variant_takes_every_head_dim(variant, dtype):
    for shape in SHAPES:
        problem = Problem(tokens=3, dtype=dtype, cache_dtype=dtype, gate="blocked", **shape)
        problem.check(problem.run_eagerly())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 40])
def test_nan_and_infinity_pass(variant, dtype, head_dim):
    problem = Problem(
        tokens=4,
        slot_mapping=range(4),
        dtype=dtype,
        cache_dtype=dtype,
        head_dims=(head_dim, 64),
        heads=(1, 1),
    )
    qkv, cos = problem.x["qkv"], problem.rope["cos"]
    qkv[0, 3] = qkv[1, head_dim + 5] = np.nan
    qkv[2, 7] = np.inf
    problem.x["positions"][:] = [0, 0, 0, 1]
    # The last bits of a NaN must not carry over into its exponent.
    cos[1] = np.uint32(0xFFFFFFFF).view(np.float32)
    got = problem.run_eagerly()
    problem.implementation = "xla"
    expected = problem.run_eagerly()
    for name in ("query", "key", "value"):
        a, b = (np.asarray(getattr(x, name)).astype(np.float32) for x in (got, expected))
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=name)
        np.testing.assert_array_equal(np.isinf(a), np.isinf(b), err_msg=name)
    assert np.isnan(np.asarray(got.query)[3].astype(np.float32)).all()
    stored = got.cache.k_pages.reshape(-1, 1, head_dim)[:4]
    np.testing.assert_array_equal(bits(stored), bits(got.key))


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("norm", [None, "weight"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_halves_are_rounded_to_even(variant, head_dim, norm, cache_dtype):
    problem = Problem(
        slot_mapping=range(8),
        dtype="bfloat16",
        cache_dtype=cache_dtype,
        head_dims=(head_dim, 64),
        heads=(20, 3),
        norm=norm,
    )
    qkv, width = problem.x["qkv"], 20 * head_dim
    problem.rope["sin"][:] = 0
    problem.rope["cos"][:] = factor = np.float32(1.5 if norm is None else 1)
    if norm is not None:
        qkv[:] = np.sign(qkv.astype(np.float32)) + (qkv == 0)  # all mean squares are 1
        weight = (1 + (2 * np.arange(head_dim) + 1) / 256).astype(np.float32)
        problem.norm |= {"q_weight": weight, "k_weight": weight, "epsilon": 1e-30}
        factor = np.tile(weight, 23)
    exact = qkv[:, : 23 * head_dim].astype(np.float32) * factor
    assert np.mean((exact.view(np.uint32) & 0xFFFF) == 0x8000) > 0.1
    got = problem.run_eagerly()
    expected = exact.astype(qkv.dtype)
    np.testing.assert_array_equal(bits(got.query.reshape(8, -1)), bits(expected[:, :width]))
    np.testing.assert_array_equal(bits(got.key.reshape(8, -1)), bits(expected[:, width:]))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_heads_of_any_size_of_numbers_stand_side_by_side(variant, head_dim):
    problem = Problem(
        slot_mapping=range(8),
        dtype="bfloat16",
        cache_dtype="bfloat16",
        head_dims=(head_dim, 64),
        heads=(20, 3),
        norm="weight",
    )
    heads = problem.x["qkv"][:, : 23 * head_dim].reshape(8, 23, head_dim)
    problem.x["positions"][:] = range(8)
    problem.rope["cos"][4] = 1e12
    problem.rope["cos"][5, 2] = np.inf
    problem.rope["sin"][6, 1] = np.nan
    for head, value in {1: 0.0, 3: np.nan, 9: np.inf, 10: 1e30, 17: 1e-30, 21: -np.inf}.items():
        heads[:4, head, 7] = value
    heads[:, 12] = 0
    heads[7, 14] = 3e38
    got = problem.run_eagerly()
    problem.implementation = "xla"
    expected = problem.run_eagerly()
    for name in ("query", "key"):
        a, b = (np.asarray(getattr(x, name)).astype(np.float32) for x in (got, expected))
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("cache_dtype", qkv_oracle.QUANTIZED)
@pytest.mark.parametrize("scale", ["head", "dynamic"])
def test_quantised_entries_are_those_of_float64(variant, cache_dtype, scale):
    problem = Problem(
        tokens=256,
        slot_mapping=range(256),
        cache_dtype=cache_dtype,
        scale=scale,
        dtype="bfloat16",
        norm="weight",
        layout="HND",
        page_size=16,
    )
    got = problem.run_eagerly()
    for name, new in {"k": got.key, "v": got.value}.items():
        divisor = getattr(got.cache, f"{name}_scale")
        stored = np.asarray(getattr(got.cache, f"{name}_pages"))
        exact = np.asarray(new).astype(np.float64)
        expected = np.array(getattr(problem, f"{name}_pages"))
        for t, head in np.ndindex(256, 2):
            at = (t // 16, head, t % 16)
            quotient = exact[t, head] / np.float64(divisor[at if scale == "dynamic" else head])
            expected[at] = qkv_oracle.quantize(quotient, stored.dtype)
        apart = ulps(stored, expected)
        assert apart.max() <= 1
        assert np.mean(apart == 0) >= 0.999
        if scale == "dynamic":
            dequantised = stored[:16].astype(np.float32) * np.asarray(divisor)[:16, ..., None]
            rows = exact.reshape(16, 16, 2, 64).transpose(0, 2, 1, 3)
            step = {"int8": 1 / 254, "float8_e5m2": 2.0**-3}.get(cache_dtype, 2.0**-4)
            largest = np.abs(rows).max(axis=-1, keepdims=True)
            assert (np.abs(dequantised - rows) <= 1.01 * step * largest).all()


@pytest.mark.parametrize("cache_dtype", qkv_oracle.QUANTIZED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_number_of_16_bits_is_quantised(variant, cache_dtype, dtype):
    # Scales with and without quotients that are halves, one whose reciprocal is as far from a
    # float32 as can be, and some that are too small or large to multiply by it.
    scales = np.float32([1, 0.75, 0.0371, 3e-3, 7.3, 2 - 2.0**-23, 1e-20, 1e20])
    problem = Problem(
        tokens=512,
        slot_mapping=range(512),
        dtype=dtype,
        cache_dtype=cache_dtype,
        head_dims=(64, 128),
        heads=(16, 16),
        scale="head",
    )
    problem.k_scale = problem.v_scale = np.tile(scales, 2)
    # Half of the heads have neighbours in a row, the others NaN and infinities among numbers.
    every = np.arange(1 << 16).reshape(512, 1, 128)
    patterns = np.concatenate([every, every * 40503 & 0xFFFF], axis=1).astype(np.uint16)
    value = np.repeat(patterns, len(scales), axis=1)
    problem.x["qkv"][:, -16 * 128 :] = value.view(problem.x["qkv"].dtype).reshape(512, -1)
    stored = np.asarray(problem.run_eagerly().cache.v_pages).reshape(-1, 16, 128)[:512]
    value = value.view(problem.x["qkv"].dtype).astype(np.float32)
    is_nan = np.isnan(value)
    with np.errstate(over="ignore"):
        quotient = np.where(is_nan, 0, value) / problem.v_scale[:, None]
    expected = qkv_oracle.quantize(quotient, stored.dtype)
    assert np.mean(is_nan) < 0.04
    np.testing.assert_array_equal(bits(stored)[~is_nan], bits(expected)[~is_nan])
    is_none = np.isnan(stored.astype(np.float32)) if cache_dtype != "int8" else stored == 0
    assert is_none[is_nan].all()


def test_rows_of_zeros_get_scale_one():
    problem = Problem(scale="dynamic", cache_dtype="int8", pairing=None, slot_mapping=range(8))
    problem.x["qkv"][:] = 0
    problem.x["qkv"][1] = 1e-39  # its scale is below the normal numbers
    result = problem.run_eagerly()
    np.testing.assert_array_equal(result.cache.k_scale.reshape(-1, 2)[:8], 1)
    assert not np.any(result.cache.k_pages.reshape(-1, 2, 64)[:8])


# ---- Work


def test_large_calls_do_not_depend_on_how_they_are_cut():
    # Large enough to be shared among threads, and for stores that bypass the caches.
    options = {"heads": (8, 2), "head_dims": (256, 256), "gate": "interleaved", "norm": "weight"}
    slots = np.random.default_rng(0).permutation(2048)
    problem = Problem(tokens=1024, slot_mapping=slots[:1024], rotary="first", **options)
    assert problem.x["qkv"].nbytes > 16 << 20
    whole = problem.run_eagerly()
    x, positions = problem.x["qkv"], problem.x["positions"]
    for begin, end in [(0, 1), (1, 6), (500, 560), (1023, 1024)]:
        part = Problem(tokens=end - begin, slot_mapping=range(end - begin), **options)
        part.x |= {"qkv": x[begin:end], "positions": positions[begin:end]}
        part.rope, part.norm = problem.rope, problem.norm
        got = part.run_eagerly()
        for name in ("query", "gate", "key", "value"):
            np.testing.assert_array_equal(
                bits(getattr(got, name)), bits(getattr(whole, name))[begin:end], err_msg=name
            )
    stored = bits(whole.cache.k_pages).reshape(-1, 2, 256)
    np.testing.assert_array_equal(stored[slots[:1024]], bits(whole.key))
    untouched = bits(problem.k_pages).reshape(-1, 2, 256)[slots[1024:]]
    np.testing.assert_array_equal(stored[slots[1024:]], untouched)


@pytest.mark.parametrize("slot_dtype", [np.int32, np.int64])
def test_the_last_duplicate_wins_among_threads(slot_dtype):
    rng = np.random.default_rng(2)
    tokens = 4096
    slots = rng.integers(-5, 70, tokens).astype(slot_dtype)
    slots[rng.integers(0, tokens, 20)] = np.iinfo(slot_dtype).max
    qkv = jnp.asarray(rng.normal(size=(tokens, 24)), jnp.float32)
    cache = jax_attn.PagedKVCache.zeros(4, 16, 1, 8, dtype=jnp.float32)
    with jax.enable_x64(slot_dtype == np.int64):
        stored = native(qkv, cache, jnp.asarray(slots), num_q_heads=1).cache
    expected = np.zeros((64, 1, 8), np.float32)
    for slot, row in zip(slots, np.asarray(qkv), strict=True):
        if 0 <= slot < 64:
            expected[slot] = row[8:16]
    np.testing.assert_array_equal(np.asarray(stored.k_pages).reshape(64, 1, 8), expected)


def test_repeated_calls_give_the_same_bits():
    problem = Problem(tokens=300, norm="all_heads", dtype="bfloat16", gate="blocked")
    first = problem.run_eagerly()
    for _ in range(3):
        again = problem.run_eagerly()
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), first, again)


# ---- The cache stays where it is


def pointers(cache):
    return [a.unsafe_buffer_pointer() for a in jax.tree.leaves(cache)]


def copies(compiled, cache):
    shapes = {f"[{','.join(map(str, a.shape))}]" for a in jax.tree.leaves(cache)}
    lines = compiled.as_text().splitlines()
    return [line for line in lines if " copy(" in line and any(s in line for s in shapes)]


def dynamic_problem(**options):
    return Problem(
        scale="dynamic", cache_dtype="int8", dtype="bfloat16", layers=3, layout="HND", **options
    )


def test_donated_pages_and_scales_are_updated_in_place():
    problem = dynamic_problem()
    (qkv, cache, slots), keywords = problem.arguments()
    update = jax.jit(
        lambda cache, qkv: problem.call((qkv, cache, slots), keywords), donate_argnums=0
    )
    compiled = update.lower(cache, qkv).compile()
    assert not copies(compiled, cache)
    before = pointers(cache)
    assert pointers(compiled(cache, qkv).cache) == before


def test_without_donation_every_array_is_copied_once():
    problem = dynamic_problem()
    (qkv, cache, slots), keywords = problem.arguments()
    kept = [np.array(a) for a in jax.tree.leaves(cache)]
    update = jax.jit(lambda cache, qkv: problem.call((qkv, cache, slots), keywords).cache)
    assert len(copies(update.lower(cache, qkv).compile(), cache)) == 4
    updated = update(cache, qkv)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(cache), kept)
    problem.check(dataclasses.replace(problem.run_eagerly(), cache=updated))


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_loops_over_layers_carry_the_cache(loop):
    problem = dynamic_problem()
    (qkv, cache, slots), keywords = problem.arguments()
    del keywords["layer"]

    def layer(cache, index):
        result = problem.call((qkv, cache, slots), {**keywords, "layer": index})
        return result.cache, result.query

    def model(cache):
        if loop == "scan":
            return jax.lax.scan(layer, cache, jnp.arange(3, dtype=jnp.int32))[0]
        return jax.lax.while_loop(
            lambda carry: carry[1] < 3,
            lambda carry: (layer(*carry)[0], carry[1] + 1),
            (cache, jnp.int32(0)),
        )[0]

    expected = cache
    for index in range(3):
        expected, _ = layer(expected, index)
    compiled = jax.jit(model, donate_argnums=0).lower(cache).compile()
    assert not copies(compiled, cache)
    before = pointers(cache)
    got = compiled(cache)
    assert pointers(got) == before
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), got, expected)


def test_gradients_do_not_keep_the_pages():
    problem = Problem(norm="weight")
    (qkv, cache, slots), keywords = problem.arguments()

    def loss(qkv, cache):
        result = problem.call((qkv, cache, slots), keywords)
        return jnp.sum(result.query) + jnp.sum(result.key * 2), result.cache

    step = jax.jit(jax.grad(loss, has_aux=True), donate_argnums=1)
    compiled = step.lower(qkv, cache).compile()
    assert not copies(compiled, cache)
    before = pointers(cache)
    _, updated = compiled(qkv, cache)
    assert pointers(updated) == before


def test_shards_of_a_shard_map_are_updated_in_place():
    mesh = jax.make_mesh((4,), ("x",))
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.normal(size=(12, 32)), jnp.float32)
    slots = jnp.tile(jnp.array([1, 0, -1], jnp.int32), 4)
    cache = jax_attn.PagedKVCache.zeros(8, 2, 1, 8, dtype=jnp.float32)
    specs = (P("x"), P("x"), P("x"))

    def local(cache, qkv, slots):
        result = native(qkv, cache, slots, num_q_heads=2)
        return result.cache, result.query

    update = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P("x"), P("x"))),
        donate_argnums=0,
    )
    cache, qkv, slots = jax.device_put((cache, qkv, slots), jax.NamedSharding(mesh, P("x")))
    compiled = update.lower(cache, qkv, slots).compile()
    assert " copy(" not in compiled.as_text() and "all-" not in compiled.as_text()
    before = [s.data.unsafe_buffer_pointer() for s in cache.k_pages.addressable_shards]
    updated, _ = compiled(cache, qkv, slots)
    after = [s.data.unsafe_buffer_pointer() for s in updated.k_pages.addressable_shards]
    assert after == before
    keys = np.asarray(qkv).reshape(4, 3, 32)[:, :2, 16:24]
    stored = np.asarray(updated.k_pages).reshape(4, 4, 8)
    np.testing.assert_array_equal(stored[:, :2], keys[:, ::-1])
    assert not stored[:, 2:].any()


# ---- Refusals, and what is said of a call


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"head_dims": (12, 16)}, "head_dim 12 is not a multiple of 8 up to 512"),
        ({"head_dims": (16, 520)}, "head_dim 520 is not a multiple of 8 up to 512"),
    ],
)
def test_native_or_the_reason(options, reason):
    problem = Problem(pairing=None, **options)
    with pytest.raises(NotImplementedError) as raised:
        problem.run_eagerly()
    assert str(raised.value) == (
        'fused_qkv_rope_cache: implementation="native" cannot be used on cpu: '
        f"{reason}. Use implementation=None to fall back to jax.numpy."
    )
    problem.implementation = None
    problem.check(problem.run_eagerly())


def test_nested_vmap_up_to_the_limit():
    qkv = jnp.ones((1, 24))
    cache = jax_attn.PagedKVCache.zeros(1, 1, 1, 8, dtype=jnp.float32)
    call = functools.partial(native, num_q_heads=1)
    for depth in range(1, 9):
        call = jax.vmap(call, (0, None, None))
        qkv = qkv[None]
        if depth == 7:
            result = call(qkv, cache, jnp.zeros(1, jnp.int32))
            assert result.cache.k_pages.shape == (1,) * 7 + (1, 1, 1, 8)
            assert np.all(result.cache.k_pages == 1)
    with pytest.raises(NotImplementedError, match="vmap is nested 8 deep, at most 7"):
        call(qkv, cache, jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize("inner", [True, False])
def test_nested_vmap_of_different_operands(inner):
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.normal(size=(2, 3, 32)), jnp.float32)
    pages = jnp.asarray(rng.normal(size=(4, 2, 2, 1, 8)), jnp.float32)
    slots = jnp.array([3, 0, 3], jnp.int32)

    def call(qkv, pages):
        cache = jax_attn.PagedKVCache(pages, pages)
        return native(qkv, cache, slots, num_q_heads=2)

    over_cache, over_qkv = (None, 0), (0, None)
    axes = (over_qkv, over_cache) if inner else (over_cache, over_qkv)
    got = jax.vmap(jax.vmap(call, axes[0]), axes[1])(qkv, pages)
    for i, j in np.ndindex(2, 4):
        expected = call(qkv[i], pages[j])
        at = (j, i) if inner else (i, j)
        jax.tree.map(lambda a, b, at=at: np.testing.assert_array_equal(a[at], b), got, expected)


def test_explain():
    problem = Problem(
        tokens=8, dtype="bfloat16", cache_dtype="int8", gate="interleaved", scale="head"
    )
    (qkv, cache, slots), keywords = problem.arguments()

    def update(cache, qkv):
        return problem.call((qkv, cache, slots), keywords)

    (call,) = jax_attn.explain(update)(cache, qkv)
    variant = support.vector_variant()
    # qkv and the gate, 12 heads of 64, twice; keys and values, 4 heads of 64, in a byte.
    moved = 8 * 64 * (2 * 12 * 2 + 4)
    assert call == jax_attn.CallExplanation(
        op="fused_qkv_rope_cache",
        platform="cpu",
        implementation="native",
        variant=variant,
        num_splits=None,
        scratch_bytes=0,
        bytes_moved=moved,
        cache_copies=2,
        refused={"xla": "the native kernel takes this case"},
    )
    assert str(call) == (
        f"fused_qkv_rope_cache on cpu: native ({variant})\n"
        "  scratch: 0 bytes\n"
        f"  moves: {moved} bytes\n"
        "  copies of the cache: 2; is it donated?\n"
        "  not xla: the native kernel takes this case"
    )
    (call,) = jax_attn.explain(jax.jit(update, donate_argnums=0))(cache, qkv)
    assert call.cache_copies == 0
    with pytest.raises(NotImplementedError, match="cannot be used on tpu"):
        jax_attn.explain(update, platform="tpu")(cache, qkv)

    def update_anyhow(cache, qkv):
        return problem.call((qkv, cache, slots), keywords | {"implementation": None})

    (call,) = jax_attn.explain(update_anyhow, platform="tpu")(cache, qkv)
    assert call.implementation == "xla"
    assert call.refused == {"native": "there is no kernel for fused_qkv_rope_cache on tpu"}


def test_export_with_symbolic_tokens():
    problem = Problem(dtype="bfloat16", norm="weight", cache_dtype="float8_e4m3fn", scale="dynamic")
    problem.implementation = None
    (qkv, cache, slots), keywords = problem.arguments()
    positions, rope, norm = (keywords[name] for name in ("positions", "rope", "qk_norm"))

    def update(qkv, cache, slots, positions):
        result = problem.call(
            (qkv, cache, slots), {"positions": positions, "rope": rope, "qk_norm": norm}
        )
        return result.query, result.cache.k_pages, result.cache.k_scale

    (tokens,) = jax.export.symbolic_shape("tokens")
    structs = jax.tree.map(support_struct, (qkv, cache, slots, positions))
    structs = (
        jax.ShapeDtypeStruct((tokens, qkv.shape[1]), qkv.dtype),
        jax.tree.leaves(structs[1]),
        jax.ShapeDtypeStruct((tokens,), slots.dtype),
        jax.ShapeDtypeStruct((tokens,), positions.dtype),
    )
    tree = jax.tree.structure(cache)

    def flat(qkv, leaves, slots, positions):
        return update(qkv, jax.tree.unflatten(tree, leaves), slots, positions)

    exported = jax.export.export(
        jax.jit(flat),
        platforms=["cpu", "cuda"],
        disabled_checks=jax_attn.ffi.export_checks(),
    )(*structs)
    assert TARGET in exported.mlir_module()
    loaded = jax.export.deserialize(exported.serialize())
    got = loaded.call(qkv, jax.tree.leaves(cache), jnp.asarray(slots), positions)
    problem.implementation = "native"
    expected = update(qkv, cache, slots, positions)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def support_struct(a):
    return jax.ShapeDtypeStruct(np.shape(a), a.dtype)


def test_lowers_for_platforms_that_are_not_here():
    problem = Problem(layers=2)
    problem.implementation = None
    (qkv, cache, slots), keywords = problem.arguments()
    traced = jax.jit(lambda cache: problem.call((qkv, cache, slots), keywords)).trace(cache)
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert (TARGET in program) == (platform in jax_attn.platforms())


def test_remat_and_cond():
    problem = Problem(norm="weight", gate="blocked")
    (qkv, cache, slots), keywords = problem.arguments()

    def loss(qkv, wanted):
        def update(qkv):
            return jnp.sum(problem.call((qkv, cache, slots), keywords).query ** 2)

        return jax.lax.cond(wanted, jax.checkpoint(update), lambda qkv: jnp.sum(qkv), qkv)

    value, gradient = jax.jit(jax.value_and_grad(loss))(qkv, True)
    problem.implementation = "xla"
    expected, expected_gradient = jax.jit(jax.value_and_grad(loss))(qkv, True)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-5)
