# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Split-KV and paged attention over meshes of eight CPU devices."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_attn
from jax_attn._src import sharding

TARGET = "jax_attn_split_kv_attention"
NATIVE = "cpu" in jax_attn.platforms()
COLLECTIVES = r"(all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(?:-start)?\("

BATCH, QUERY_LEN, KV_HEADS, HEADS, HEAD_DIM, KV_LEN = 4, 2, 4, 8, 8, 24
LENGTHS = np.array([5, 24, 0, 17], np.int32)

# How each operand is sharded if batch and heads are; "b" and "h" stand for mesh axes.
DENSE_SPECS = {
    "query": "b.h.",
    "key": "b.h.",
    "value": "b.h.",
    "bias": "bh..",
    "kv_lengths": "b",
    "sinks": "h",
    "k_scale": "h",
    "v_scale": "b.h",
}
PAGED_SPECS = {
    "query": "b.h.",
    "key": "...h.",
    "value": "...h.",
    "k_scale": ".h",
    "v_scale": "...h",
    "page_table": "b.",
    "kv_lengths": "b",
    "sinks": "h",
    "mask": "....",
}
LAYOUTS = ("dense", "paged")


def operands(layout, kv_heads=KV_HEADS):
    """Operands by name: with one scale per head and one per token, and layers if paged."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    x = {"query": normal(BATCH, QUERY_LEN, HEADS, HEAD_DIM), "sinks": normal(HEADS)}
    x["kv_lengths"] = jnp.asarray(LENGTHS)
    if layout == "dense":
        stored = (BATCH, KV_LEN, kv_heads)
        x |= {"bias": normal(BATCH, HEADS, 1, KV_LEN), "k_scale": normal(kv_heads)}
    else:
        pages = BATCH * KV_LEN // 4
        stored = (2, pages, 4, kv_heads)
        x["page_table"] = jnp.asarray(rng.permutation(pages).reshape(BATCH, -1), jnp.int32)
        x |= {"k_scale": normal(2, kv_heads), "mask": jnp.ones((1, 1, 1, KV_LEN), bool)}
    x |= {"key": normal(*stored, HEAD_DIM), "value": normal(*stored, 2 * HEAD_DIM)}
    return x | {"v_scale": normal(*stored)}


def attend(x):
    """The output and the lse of operands of either kind."""
    x = dict(x)
    query, key, value = (x.pop(name) for name in ("query", "key", "value"))
    options = {"causal": "bottom_right", "return_lse": True}
    if "page_table" not in x:
        return jax_attn.split_kv_attention(query, key, value, **x, **options)
    scales = {name: x.pop(name) for name in ("k_scale", "v_scale")}
    cache = jax_attn.PagedKVCache(key, value, **scales)
    table, lengths = x.pop("page_table"), x.pop("kv_lengths")
    return jax_attn.paged_attention(query, cache, table, lengths, layer=1, **x, **options)


def loss(x, attend=attend):
    out, lse = attend(x)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isneginf(lse), 0, jnp.cos(lse)))


def gradients(x, attend=attend, names=None):
    """Gradients of the operands `names`, by default of all that have one."""
    floating = [name for name, a in x.items() if jnp.issubdtype(a.dtype, jnp.inexact)]
    floats = {name: x[name] for name in names or floating}
    return jax.grad(lambda floats: loss(x | floats, attend))(floats)


@functools.cache
def unsharded(layout, kv_heads=KV_HEADS):
    x = operands(layout, kv_heads)
    return jax.tree.map(np.asarray, (run(attend, x)[0], run(gradients, x)[0]))


def specs(layout, batch, heads):
    letters = {"b": batch, "h": heads, ".": None}
    table = DENSE_SPECS if layout == "dense" else PAGED_SPECS
    return {name: P(*[letters[c] for c in text]) for name, text in table.items()}


def mesh_of(kind):
    types = {"auto": (AxisType.Auto,) * 3, "explicit": (AxisType.Explicit,) * 3}
    types["mixed"] = (AxisType.Explicit, AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=types[kind])


def place(x, mesh, specs):
    return {name: jax.device_put(a, NamedSharding(mesh, specs[name])) for name, a in x.items()}


def run(function, x):
    """Results of a jitted function, and the collectives in its program; it calls one kernel."""
    # Half the time to compile; the partitioner does the same.
    options = {"xla_backend_optimization_level": 0}
    compiled = jax.jit(function).lower(x).compile(compiler_options=options)
    text = compiled.as_text()
    assert text.count(f'custom_call_target="{TARGET}"') == NATIVE
    return compiled(x), re.findall(COLLECTIVES, text)


def assert_trees_close(actual, expected):
    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    jax.tree.map(check, actual, expected)


SPLITS = [("x", None), (None, "y"), ("x", ("y", "z"))]
CASES = list(itertools.product(("auto", "explicit"), LAYOUTS, SPLITS))
CASES += [("auto", "dense", (("x", "y"), None)), ("explicit", "paged", ("z", "x"))]
# In a mesh that is mixed, only what is sharded over explicit axes stays where it is.
CASES += [("mixed", "dense", ("x", None)), ("mixed", "paged", (None, "x"))]


@pytest.mark.parametrize(("kind", "layout", "split"), CASES, ids=str)
def test_batch_and_heads_without_collectives(kind, layout, split):
    batch, heads = split
    mesh = mesh_of(kind)
    wanted = specs(layout, batch, heads)
    x = place(operands(layout), mesh, wanted)
    with jax.set_mesh(mesh):
        (out, lse), collectives = run(attend, x)
        assert collectives == []
        assert_trees_close((out, lse), unsharded(layout)[0])
        assert out.sharding.is_equivalent_to(NamedSharding(mesh, wanted["query"]), 4)
        assert lse.sharding.is_equivalent_to(NamedSharding(mesh, P(*wanted["query"][:3])), 3)

        backward, collectives = run(gradients, x)
        assert_trees_close(backward, unsharded(layout)[1])
        # What all sequences share has a gradient that is summed over them.
        assert set(collectives) <= ({"all-reduce"} if batch is not None else set())

        own = [name for name in backward if batch is None or batch in tuple(wanted[name])]
        if batch is not None:
            of_own = functools.partial(gradients, names=tuple(own))
            assert run(of_own, x)[1] == []
        for name in own:
            expected = NamedSharding(mesh, wanted[name])
            assert backward[name].sharding.is_equivalent_to(expected, x[name].ndim), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_automatic_axes_of_a_mixed_mesh(layout):
    """They are gathered: where some axes are manual, XLA partitions no custom call."""
    mesh = mesh_of("mixed")
    x = place(operands(layout), mesh, specs(layout, "x", "y"))
    with jax.set_mesh(mesh):
        results = run(attend, x)[0], run(gradients, x)[0]
    assert_trees_close(results, unsharded(layout))


def test_typeof_in_explicit_mode():
    mesh = mesh_of("explicit")
    x = place(operands("dense"), mesh, specs("dense", "x", ("y", "z")))
    with jax.set_mesh(mesh):
        out, lse = jax.eval_shape(attend, x)
    assert out.sharding.spec == P("x", None, ("y", "z"), None)
    assert lse.sharding.spec == P("x", None, ("y", "z"))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize(
    ("kv_heads", "heads"),
    [(4, ("x", "y", "z")), (1, "y"), (2, ("x", "y"))],
    ids=["8 devices of 4 kv heads", "MQA", "4 devices of 2 kv heads"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_query_heads_on_more_devices_than_kv_heads(layout, kv_heads, heads, kind):
    mesh = mesh_of(kind)
    wanted = {name: P() for name in specs(layout, None, None)}
    wanted |= {"query": P(None, None, heads, None), "sinks": P(heads)}
    x = place(operands(layout, kv_heads), mesh, wanted)
    with jax.set_mesh(mesh):
        (out, lse), collectives = run(attend, x)
        backward, _ = run(gradients, x)
    assert_trees_close(((out, lse), backward), unsharded(layout, kv_heads))
    if kv_heads == 1:
        assert collectives == []
        assert out.sharding.is_equivalent_to(x["query"].sharding, 4)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_replicated_context_of_a_sharded_batch_sums_its_gradient(kind):
    mesh = mesh_of(kind)
    wanted = specs("dense", "x", None) | {"key": P(), "value": P(), "v_scale": P()}
    x = place(operands("dense"), mesh, wanted)
    with jax.set_mesh(mesh):
        backward, collectives = run(gradients, x)
    assert_trees_close(backward, unsharded("dense")[1])
    assert collectives


def test_vmap_of_sharded_operands():
    mesh = mesh_of("auto")
    x = operands("paged")
    queries = jnp.stack([x["query"], -x["query"]])
    mapped = jax.vmap(lambda query, x: attend(x | {"query": query}), in_axes=(0, None))
    expected = jax.jit(mapped)(queries, x)
    for spec in (P("x"), P(None, "x", None, "y"), P("z", "x", None, "y")):
        wanted = specs("paged", *[spec[i] if len(spec) > i else None for i in (1, 3)])
        placed = place(x, mesh, wanted)
        query = jax.device_put(queries, NamedSharding(mesh, spec))
        actual, collectives = run(lambda args: mapped(*args), (query, placed))
        assert collectives == []
        assert_trees_close(actual, expected)


def test_donation_of_another_buffer():
    mesh = mesh_of("auto")
    x = place(operands("dense"), mesh, specs("dense", "x", "y"))
    buffer = jax.device_put(jnp.zeros((8, 8)), NamedSharding(mesh, P("x")))
    step = jax.jit(lambda x, buffer: (attend(x), buffer + 1), donate_argnums=1)
    results, new = step(x, buffer)
    assert buffer.is_deleted()
    assert_trees_close(results, unsharded("dense")[0])
    np.testing.assert_array_equal(new, np.ones((8, 8)))


# shard_map


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("split", [("x", "y"), (None, ("x", "z"))], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shard_map(layout, split, check_vma):
    wanted = specs(layout, *split)
    rows = wanted["query"]
    local = jax.shard_map(
        attend,
        mesh=mesh_of("auto"),
        in_specs=(wanted,),
        out_specs=(rows, P(*rows[:3])),
        check_vma=check_vma,
    )
    x = operands(layout)
    forward, collectives = run(local, x)
    assert collectives == []
    backward, _ = run(lambda x: gradients(x, local), x)
    assert_trees_close((forward, backward), unsharded(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_partially_manual_shard_map(layout):
    mesh = mesh_of("auto")
    wanted = specs(layout, "x", None)
    local = jax.shard_map(attend, mesh=mesh, in_specs=(wanted,), out_specs=P("x"), axis_names={"x"})
    x = place(operands(layout), mesh, specs(layout, "x", "y"))
    forward, _ = run(local, x)
    backward, _ = run(lambda x: gradients(x, local), x)
    assert_trees_close((forward, backward), unsharded(layout))


def test_gradients_inside_shard_map():
    """Replicated and varying operands: the gradient of a replicated one is the sum."""
    wanted = specs("paged", "x", None)
    local = jax.shard_map(
        gradients,
        mesh=mesh_of("auto"),
        in_specs=(wanted,),
        out_specs={name: wanted[name] for name in unsharded("paged")[1]},
    )
    backward, collectives = run(local, operands("paged"))
    assert_trees_close(backward, unsharded("paged")[1])
    assert set(collectives) == {"all-reduce"}


def test_shard_map_rejects_out_specs_that_forget_an_axis():
    wanted = specs("dense", "x", "y")
    local = jax.shard_map(
        attend, mesh=mesh_of("auto"), in_specs=(wanted,), out_specs=(P("x"), P("x"))
    )
    with pytest.raises(ValueError, match="y"):
        jax.jit(local).lower(operands("dense"))


@pytest.mark.parametrize("check_vma", [True, False])
def test_context_sharded_over_a_mesh_axis(check_vma):
    """Each device attends to a part, of which one is empty; sinks count once."""
    mesh = jax.make_mesh((4, 2), ("kv", "heads"), axis_types=(AxisType.Auto,) * 2)
    x = {n: a for n, a in operands("dense").items() if n not in ("bias", "k_scale", "v_scale")}
    x["kv_lengths"] = jnp.minimum(x["kv_lengths"], 17)  # of 4 shards of 6 keys: the last is empty

    def whole(x):
        x = dict(x)
        query, key, value = (x.pop(name) for name in ("query", "key", "value"))
        return jax_attn.split_kv_attention(query, key, value, **x, return_lse=True)

    def part(x):
        x = dict(x)
        sinks = x.pop("sinks")
        first = jax.lax.axis_index("kv") * x["key"].shape[1]
        out, lse = whole(x | {"kv_lengths": x["kv_lengths"] - first})
        return jax_attn.merge_attention([out], [lse], sinks=sinks, axis_name="kv")

    context = P(None, "kv", "heads")
    local = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(
            {
                **dict.fromkeys(("key", "value"), context),
                "query": P(None, None, "heads"),
                "sinks": P("heads"),
                "kv_lengths": P(),
            },
        ),
        out_specs=(P(None, None, "heads"), P(None, None, "heads")),
        check_vma=check_vma,
    )
    forward, collectives = run(local, x)
    assert set(collectives) == {"all-reduce"}
    backward, _ = run(lambda x: gradients(x, local), x)
    assert_trees_close(
        (forward, backward), (run(whole, x)[0], run(lambda x: gradients(x, whole), x)[0])
    )


# The declaration


def call(rows="b (k g)", shapes=None, shardable=("b", "k"), sizes=None, num_batch_dims=0):
    shapes = shapes or {"x": (4, 8), "y": (4, 2)}
    return sharding.Call(
        spec=sharding.ShardingSpec({"x": rows, "y": "b k", "out": rows}, shardable),
        operands=shapes,
        results={"out": shapes["x"]},
        num_batch_dims=num_batch_dims,
        sizes=sizes or {"k": 2, "g": 4},
    )


MESH = {"x": 2, "y": 2, "z": 4, "three": 3}


@pytest.mark.parametrize(
    ("given", "planned"),
    [
        ({"x": P("x", "y"), "y": P()}, {"b": ("x",), "k": ("y",)}),
        ({"x": P(), "y": P(None, "y")}, {"k": ("y",)}),
        ({"x": P(("x", "y")), "y": P()}, {"b": ("x", "y")}),
        # Does not divide: 2 kv heads on 4 devices, 4 sequences on 3.
        ({"x": P(None, "z"), "y": P()}, {}),
        ({"x": P(None, ("x", "y")), "y": P()}, {}),
        ({"x": P("three"), "y": P()}, {}),
        # The first operand decides; an axis is used once.
        ({"x": P("x"), "y": P("y", "x")}, {"b": ("x",)}),
        ({"x": P(("x", "y")), "y": P(None, "y")}, {"b": ("x", "y")}),
        ({"x": P(P.UNCONSTRAINED, "y"), "y": P("x")}, {"k": ("y",), "b": ("x",)}),
    ],
)
def test_plan(given, planned):
    assert call().plan(given, MESH) == planned


def test_partition_specs_of_a_plan():
    plan = {"b": ("x", "y"), "k": ("z",)}
    assert call().partition_spec("x", plan) == P(("x", "y"), "z")
    assert call().partition_spec("out", {"k": ("z",)}) == P(None, "z")
    # A dimension of size 1 broadcasts, and stays whole.
    one = call(shapes={"x": (4, 8), "y": (1, 2)})
    assert one.partition_spec("y", plan) == P(None, "z")


def test_shardy_rules():
    assert call().shardy_rule() == (
        "b (k g), b k -> b (k g)",
        {"need_replication_factors": ("g",), "g": 4},
    )
    assert call(sizes={"k": 2, "g": 1}, shapes={"x": (4, 2), "y": (4, 2)}).shardy_rule() == (
        "b k, b k -> b k",
        {},
    )
    # Of two vmap dimensions `y` has the inner one, and that with size 1.
    mapped = call(shapes={"x": (3, 5, 4, 8), "y": (1, 4, 2)}, num_batch_dims=2)
    rule, special = mapped.shardy_rule()
    assert rule == "vmap_0 vmap_1 b (k g), one_y_0 b k -> vmap_0 vmap_1 b (k g)"
    assert special == {"need_replication_factors": ("g", "one_y_0"), "g": 4}


def test_merged_dimensions():
    merging = sharding.Call(
        spec=sharding.ShardingSpec(
            {"x": "b d", "y": "s b", "out": "b", "d_y": "s b", "d_x": "b d"}, ("b",), ("s",)
        ),
        operands={"x": (4, 3), "y": (8, 4)},
        results={"out": (4,)},
        num_batch_dims=0,
        sizes={},
    )
    assert merging.shardy_rule() == (
        "b d, s b -> b",
        {"reduction_factors": ("s",), "need_replication_factors": ("d",)},
    )
    # `y` is the larger one, so that its sharding stays and that of `x` does not.
    plan = merging.plan({"x": P("x"), "y": P(("x", "z"), "y")}, MESH)
    assert plan == {"s": ("x", "z"), "b": ("y",)}
    assert merging.merged_axes(plan) == {"s": ("x", "z")}
    assert merging.summed_axes("out", plan) == ("x", "z")
    # A gradient that has the dimension is no sum over it, and then Shardy reduces nothing.
    gradients = dataclasses.replace(merging, results={"d_y": (8, 4), "d_x": (4, 3)})
    assert gradients.summed_axes("d_y", plan) == ()
    assert gradients.summed_axes("d_x", plan) == ("x", "z")
    assert gradients.shardy_rule()[1] == {"need_replication_factors": ("d",)}
