# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Fused QKV split, norm, rotation and cache write over meshes of eight CPU devices."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_attn

TARGET = "jax_attn_fused_qkv_rope_cache"
NATIVE = "cpu" in jax_attn.platforms()
COLLECTIVES = r"(all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(?:-start)?\("
TOKENS, HEADS, HEAD_DIM = 6, 8, 16
SLOTS = np.int32([3, 9, -1, 3, 0, 99])


def mesh_of(kind):
    types = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(types[kind],) * 2)


def operands(kv_heads=4, layout="NHD", scope="head", gate="blocked"):
    """Operands by name, and the call of the operation on them."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    q_size, k_size = (HEADS * HEAD_DIM, kv_heads * HEAD_DIM)
    pages = (2, 3, 4, kv_heads) if layout == "NHD" else (2, 3, kv_heads, 4)
    wide = scope == "all_heads"
    x = {
        "qkv": normal(TOKENS, q_size * (1 if gate is None else 2) + 2 * k_size),
        "k_pages": normal(*pages, HEAD_DIM),
        "v_pages": normal(*pages, HEAD_DIM),
        "k_scale": jnp.asarray(rng.uniform(0.5, 2, (2, kv_heads)), jnp.float32),
        "v_scale": jnp.asarray(rng.uniform(0.5, 2, pages), jnp.float32),
        "q_weight": normal(q_size if wide else HEAD_DIM),
        "k_weight": normal(k_size if wide else HEAD_DIM),
    }

    def call(x):
        result = jax_attn.fused_qkv_rope_cache(
            x["qkv"],
            jax_attn.PagedKVCache(
                x["k_pages"], x["v_pages"], x["k_scale"], x["v_scale"], layout=layout
            ),
            jnp.asarray(SLOTS),
            num_q_heads=HEADS,
            positions=jnp.arange(TOKENS, dtype=jnp.int32),
            rope=jax_attn.Rope.default(HEAD_DIM, 8),
            qk_norm=jax_attn.QKNorm(x["q_weight"], x["k_weight"], 1e-6, scope=scope),
            gate=gate,
            layer=1,
        )
        return dataclasses.asdict(result) | {"cache": (result.cache.k_pages, result.cache.v_pages)}

    return x, call


def by_heads(layout, axis):
    """How the cache is sharded if its heads are."""
    pages = P(None, None, None, axis) if layout == "NHD" else P(None, None, axis)
    return {"k_pages": pages, "v_pages": pages, "k_scale": P(None, axis), "v_scale": pages}


def place(x, mesh, specs):
    return {n: jax.device_put(a, NamedSharding(mesh, specs.get(n, P()))) for n, a in x.items()}


def run(function, x, **options):
    """Results of a jitted function, and the collectives in its program."""
    compiled = jax.jit(function, **options).lower(x).compile()
    text = compiled.as_text()
    return compiled(x), re.findall(COLLECTIVES, text), text


def moved_sizes(text):
    """Elements of each array that a collective of a program returns."""
    lines = [line for line in text.splitlines() if re.search(COLLECTIVES, line)]
    shapes = re.findall(r"\w\[([\d,]*)\]", " ".join(re.split(COLLECTIVES, x)[0] for x in lines))
    return [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]


def assert_trees_close(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected
    )


def loss(call, x):
    result = call(x)
    return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(result))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize(("layout", "gate"), [("NHD", "interleaved"), ("HND", "blocked")])
def test_sharded_heads_need_no_collective(kind, layout, gate):
    x, call = operands(layout=layout, gate=gate)
    expected = jax.jit(call)(x)
    expected_gradient = jax.jit(jax.grad(functools.partial(loss, call)))(x)
    mesh = mesh_of(kind)
    placed = place(x, mesh, by_heads(layout, "y"))
    with jax.set_mesh(mesh):
        got, collectives, text = run(call, placed)
        assert collectives == []
        assert text.count(f'custom_call_target="{TARGET}"') == NATIVE
        assert_trees_close(got, expected)
        heads = NamedSharding(mesh, P(None, "y", None))
        assert got["query"].sharding.is_equivalent_to(heads, 3)
        assert got["key"].sharding.is_equivalent_to(heads, 3)
        pages = NamedSharding(mesh, by_heads(layout, "y")["k_pages"])
        assert got["cache"][0].sharding.is_equivalent_to(pages, 5)
        backward, _, _ = run(jax.grad(functools.partial(loss, call)), placed)
        assert_trees_close(backward, expected_gradient)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize(
    ("layout", "scope", "kv_heads"),
    [("NHD", "head", 4), ("HND", "all_heads", 4), ("NHD", "head", 1)],
)
def test_sharded_pages_stay_where_they_are(kind, layout, scope, kv_heads):
    x, call = operands(kv_heads, layout, scope)
    for name in ("k_pages", "v_pages", "v_scale"):
        x[name] = jnp.concatenate([x[name]] * 16, axis=1)
    expected = jax.jit(call)(x)
    expected_gradient = jax.jit(jax.grad(functools.partial(loss, call)))(x)
    mesh = mesh_of(kind)
    pages = by_heads(layout, "y" if scope == "head" and kv_heads > 1 else None)
    for name in ("k_pages", "v_pages", "v_scale"):
        pages[name] = P(None, "x", *pages[name][2:])
    placed = place(x, mesh, pages)
    with jax.set_mesh(mesh):
        got, collectives, text = run(call, placed)
        assert collectives == []
        assert text.count(f'custom_call_target="{TARGET}"') == NATIVE
        assert_trees_close(got, expected)
        expected_sharding = NamedSharding(mesh, pages["k_pages"])
        assert got["cache"][0].sharding.is_equivalent_to(expected_sharding, 5)
        backward, _, text = run(jax.grad(functools.partial(loss, call)), placed)
        # Tokens cross devices, pages do not: a shard of them is larger than all of qkv.
        assert max(moved_sizes(text)) <= x["qkv"].size
        assert_trees_close(backward, expected_gradient)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_dynamic_scales_of_sharded_pages(dtype):
    x, _ = operands()
    pages = jnp.zeros((6, 4, 4, HEAD_DIM), dtype)
    cache = jax_attn.PagedKVCache(pages, pages, *[jnp.ones(pages.shape[:-1])] * 2)

    def call(qkv, cache):
        return jax_attn.fused_qkv_rope_cache(
            qkv, cache, jnp.asarray(SLOTS), num_q_heads=HEADS, gate="blocked", dynamic_scales=True
        ).cache

    expected = jax.jit(call)(x["qkv"], cache)
    mesh = mesh_of("auto")
    with jax.set_mesh(mesh):
        placed = jax.device_put(cache, NamedSharding(mesh, P(("x",))))
        got = jax.jit(call)(x["qkv"], placed)
        assert got.k_scale.sharding.spec[0] == "x"
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.skipif(not NATIVE, reason="in place by the kernel")
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_shards_of_the_cache_are_updated_in_place(kind):
    x, call = operands()
    mesh = mesh_of(kind)
    placed = place(x, mesh, by_heads("NHD", "y"))
    pointers = [s.data.unsafe_buffer_pointer() for s in placed["k_pages"].addressable_shards]
    with jax.set_mesh(mesh):
        pages = {name: placed.pop(name) for name in ("k_pages", "v_pages")}
        step = jax.jit(lambda pages, x: call(pages | x), donate_argnums=0)
        text = step.lower(pages, placed).compile().as_text()
        shard = re.escape("f32[2,3,4,1,16]")
        assert re.search(shard, text) and not re.search(rf"= {shard}\S* copy\(", text)
        got = step(pages, placed)
    after = [s.data.unsafe_buffer_pointer() for s in got["cache"][0].addressable_shards]
    assert after == pointers


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize(
    ("options", "specs"),
    [
        ({"kv_heads": 4}, by_heads("NHD", "y") | {"qkv": P("x", None)}),
        ({"kv_heads": 1}, {"qkv": P(None, "y")}),
        ({"scope": "all_heads"}, by_heads("NHD", "y") | {"q_weight": P("x")}),
        ({"gate": None}, {"qkv": P("x", "y"), "k_pages": P(None, None, "y")}),
    ],
    ids=["tokens", "one kv head", "norm over all heads", "slots of pages"],
)
def test_other_shardings_are_right(kind, options, specs):
    x, call = operands(**options)
    expected = jax.jit(call)(x)
    mesh = mesh_of(kind)
    placed = place(x, mesh, specs)
    with jax.set_mesh(mesh):
        got, _, _ = run(call, placed)
    assert_trees_close(got, expected)


def test_sharded_dimension_of_vmap_needs_no_collective():
    x, call = operands()
    many = {name: jnp.stack([a, a * 2, -a, a + 1]) for name, a in x.items()}
    mapped = jax.vmap(call)
    expected = jax.jit(mapped)(many)
    mesh = mesh_of("auto")
    heads = {name: P("x", *spec) for name, spec in by_heads("NHD", "y").items()}
    for specs in ({name: P("y") for name in x}, {name: P("x") for name in x} | heads):
        got, collectives, _ = run(mapped, place(many, mesh, specs))
        assert collectives == []
        assert_trees_close(got, expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_the_columns_of_each_device(check_vma):
    """The usual arrangement of tensor parallelism: each device projects to its own heads."""
    x, call = operands(gate=None)
    expected = jax.jit(call)(x)
    q, k, v = jnp.split(x["qkv"], [HEADS * HEAD_DIM, (HEADS + 4) * HEAD_DIM], axis=1)
    shards = [jnp.split(a, 4, axis=1) for a in (q, k, v)]
    own = jnp.concatenate([a[i] for i in range(4) for a in shards], axis=1)
    specs = {name: P() for name in x} | by_heads("NHD", "y") | {"qkv": P(None, "y")}

    def local(x):
        result = jax_attn.fused_qkv_rope_cache(
            x["qkv"],
            jax_attn.PagedKVCache(x["k_pages"], x["v_pages"], x["k_scale"], x["v_scale"]),
            jnp.asarray(SLOTS),
            num_q_heads=HEADS // 4,
            positions=jnp.arange(TOKENS, dtype=jnp.int32),
            rope=jax_attn.Rope.default(HEAD_DIM, 8),
            qk_norm=jax_attn.QKNorm(x["q_weight"], x["k_weight"], 1e-6),
            layer=1,
        )
        return result.query, result.cache.k_pages

    sharded = jax.shard_map(
        local,
        mesh=mesh_of("auto"),
        in_specs=(specs,),
        out_specs=(P(None, "y"), specs["k_pages"]),
        check_vma=check_vma,
    )
    got, collectives, _ = run(sharded, x | {"qkv": own})
    assert collectives == []
    assert_trees_close(got, (expected["query"], expected["cache"][0]))
