# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""`small_seq_attention` under JAX's transformations and over meshes, and what `explain` says."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_seq_cases as cases
import support
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_attn

NATIVE = "cpu" in jax_attn.platforms()
needs_native = pytest.mark.skipif(
    not NATIVE, reason="this build of jax_attn has no kernels for the CPU"
)
COLLECTIVES = r"(all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(?:-start)?\("
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
FAST = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=FAST)


def problem(packed=False):
    """A problem with every operand that its layout can have."""
    rng = np.random.default_rng(0)
    sizes = {"head_dim": 8, "bias": "bn", "causal": "bottom_right"}
    if not packed:
        lengths = {"query_lengths": [2, 1, 2], "kv_lengths": [6, 4, 0]}
        return cases.dense(rng, **lengths, **sizes)
    return cases.packed(
        rng,
        query_bounds=[0, 2, 5],
        kv_bounds=[1, 4, 8],
        query_tokens=6,
        kv_tokens=8,
        max_q_len=3,
        max_kv_len=4,
        query_lengths=[2, 2],
        kv_lengths=[3, 3],
        **sizes,
    )


def arrays_of(x):
    return {name: jnp.asarray(array) for name, array in x.arrays.items()}


def attention(x, implementation=None):
    options = {**x.options, "return_lse": True, "implementation": implementation}
    return lambda arrays: cases.call(arrays, **options)


def loss_of(x, implementation=None):
    def loss(arrays):
        out, lse = attention(x, implementation)(arrays)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isneginf(lse), 0, jnp.cos(lse)))

    return loss


def gradients_of(x, implementation=None, names=("query", "key", "value", "bias")):
    def gradients(arrays):
        floats = {name: arrays[name] for name in names}
        return jax.grad(lambda floats: loss_of(x, implementation)(arrays | floats))(floats)

    return gradients


def assert_trees_close(actual, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **{**CLOSE, **tolerance}), actual, expected
    )


def variants(x, name, count=2):
    """Other values of an operand that are as valid."""
    array = jnp.asarray(x.arrays[name])
    if name.endswith("lengths"):
        return [jnp.maximum(array - i, 0) for i in range(count)]
    if name.endswith("seqlens"):
        return [
            array - i * jnp.asarray(np.arange(array.shape[0]) == 1, jnp.int32) for i in range(count)
        ]
    return [array * (1 - 0.3 * i) for i in range(count)]


def one_by_one(function, x, names, count=2):
    function, arrays = jit(function), arrays_of(x)
    results = [
        function(arrays | {name: variants(x, name, count)[i] for name in names})
        for i in range(count)
    ]
    return jax.tree.map(lambda *parts: np.stack(parts), *results)


def stacked(x, names, rng):
    arrays = arrays_of(x)
    axes = dict.fromkeys(arrays)
    for name in names:
        axes[name] = int(rng.integers(arrays[name].ndim + 1))
        arrays[name] = jnp.stack(variants(x, name), axes[name])
    return arrays, axes


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_eager_equals_jit(packed, implementation):
    x = problem(packed)
    function, arrays = attention(x, implementation), arrays_of(x)
    assert_trees_close(function(arrays), jax.jit(function)(arrays), rtol=0, atol=0)


# ---- vmap


@needs_native
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_vmap_of_operands_is_one_call_each_way(packed):
    x, rng = problem(packed), np.random.default_rng(1)
    singles = [[name] for name in x.arrays]
    subsets = [rng.permutation(list(x.arrays))[: rng.integers(2, 6)] for _ in range(2)]
    for names in [*singles, *subsets, list(x.arrays)]:
        arrays, axes = stacked(x, names, rng)

        def both(arrays):
            return attention(x)(arrays), gradients_of(x)(arrays)

        mapped = jax.jit(jax.vmap(both, in_axes=(axes,))).lower(arrays)
        compiled = mapped.compile(compiler_options=FAST)
        text = compiled.as_text()
        assert text.count(f'custom_call_target="{cases.TARGET}"') == 1
        assert text.count(f'custom_call_target="{cases.GRADIENT_TARGET}"') == 1
        assert " while(" not in text
        assert_trees_close(compiled(arrays), one_by_one(both, x, names), err_msg=str(names))


@pytest.mark.parametrize("names", [["query", "kv_lengths"], ["key", "bias"]])
def test_vmap_of_the_reference(names):
    x, rng = problem(), np.random.default_rng(2)
    arrays, axes = stacked(x, names, rng)
    function = gradients_of(x, "xla")
    actual = jit(jax.vmap(function, in_axes=(axes,)))(arrays)
    assert_trees_close(actual, one_by_one(function, x, names))


def test_nested_vmap_of_different_operands():
    x = problem()
    outer, inner = ["query", "bias"], ["value", "kv_lengths"]
    arrays = arrays_of(x) | {n: jnp.stack(variants(x, n)) for n in (*inner, *outer)}
    axes = [{n: 0 if n in names else None for n in arrays} for names in (inner, outer)]
    function = gradients_of(x)
    mapped = jax.vmap(jax.vmap(function, in_axes=(axes[0],)), in_axes=(axes[1],))
    actual, function = jit(mapped)(arrays), jit(function)
    for i, j in itertools.product(range(2), range(2)):
        indices = dict.fromkeys(outer, i) | dict.fromkeys(inner, j)
        one = arrays | {n: arrays[n][index] for n, index in indices.items()}
        assert_trees_close(jax.tree.map(lambda a, i=i, j=j: a[i, j], actual), function(one))


def test_gradients_of_vmap():
    x, rng = problem(), np.random.default_rng(4)
    arrays, axes = stacked(x, ["query", "kv_lengths"], rng)
    names = ("query", "key", "bias")
    floats = {name: arrays[name] for name in names}

    def total(floats):
        return jnp.sum(jax.vmap(loss_of(x), in_axes=(axes,))(arrays | floats))

    def total_of_loop(floats):
        merged = arrays | floats
        parts = [
            {n: a if axes[n] is None else jnp.take(a, i, axes[n]) for n, a in merged.items()}
            for i in range(2)
        ]
        return sum(loss_of(x)(part) for part in parts)

    assert_trees_close(*(jit(jax.grad(f))(floats) for f in (total, total_of_loop)))


def test_jacobian():
    x = problem()
    arrays = arrays_of(x)

    def few(bias):
        return attention(x)(arrays | {"bias": bias})[0][0, 1, :2, :3]

    jacobian = jit(jax.jacrev(few))(arrays["bias"])
    assert jacobian.shape == (2, 3, *arrays["bias"].shape)
    step = 1e-2
    for index in [(0, 0, 0, 1), (0, 1, 0, 3), (1, 0, 0, 0)]:
        moved = jnp.zeros_like(arrays["bias"]).at[index].set(step)
        difference = few(arrays["bias"] + moved) - few(arrays["bias"] - moved)
        np.testing.assert_allclose(
            jacobian[:, :, *index], difference / (2 * step), atol=1e-4, err_msg=str(index)
        )


# ---- Control flow, export


def test_scan_and_remat():
    x = problem()
    arrays = arrays_of(x)

    def looped(query, wrap):
        def step(carry, _):
            out, _ = wrap(lambda q: attention(x)(arrays | {"query": q}))(carry)
            return carry + out, None

        return jnp.sum(jnp.sin(jax.lax.scan(step, query, length=3)[0]))

    def unrolled(query):
        for _ in range(3):
            query = query + attention(x)(arrays | {"query": query})[0]
        return jnp.sum(jnp.sin(query))

    expected = jit(jax.value_and_grad(unrolled))(arrays["query"])
    for wrap in (lambda f: f, jax.checkpoint):
        found = jit(jax.value_and_grad(functools.partial(looped, wrap=wrap)))(arrays["query"])
        assert_trees_close(found, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_export_round_trip(packed):
    x = problem(packed)
    arrays = arrays_of(x)
    function = jax.jit(gradients_of(x))
    checks = jax_attn.ffi.export_checks()
    exported = jax.export.export(function, disabled_checks=checks)(arrays)
    for target in (cases.TARGET, cases.GRADIENT_TARGET):
        assert (f"custom_call @{target}(" in exported.mlir_module()) == NATIVE
    loaded = jax.export.deserialize(exported.serialize())
    assert_trees_close(loaded.call(arrays), function(arrays), rtol=0, atol=0)


def test_export_with_a_symbolic_batch_uses_the_reference():
    x = problem()
    arrays = arrays_of(x)
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = {n: jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for n, a in arrays.items()}
    function = jax.jit(gradients_of(x))
    exported = jax.export.export(function)(shapes)
    assert "custom_call @jax_attn" not in exported.mlir_module()
    assert_trees_close(exported.call(arrays), function(arrays))
    with pytest.raises(NotImplementedError, match=r"symbolic|not installed"):
        jax.export.export(jax.jit(attention(x, "native")))(shapes)


@pytest.mark.parametrize(
    "platform, reason",
    [
        ("cuda", "the CUDA kernels are not installed, or too new for this jaxlib"),
        ("rocm", "the ROCm kernels are not installed, or too new for this jaxlib"),
        ("tpu", "there is no kernel for small_seq_attention on tpu"),
    ],
)
def test_lowering_for_a_platform_that_is_absent(platform, reason):
    if platform in jax_attn.platforms():
        pytest.skip(f"this build has kernels for {platform}")
    x = problem()
    traced = jax.jit(gradients_of(x)).trace(arrays_of(x))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "custom_call @jax_attn" not in text
    traced = jax.jit(attention(x, "native")).trace(arrays_of(x))
    message = (
        f'small_seq_attention: implementation="native" cannot be used on {platform}: {reason}. '
        "Use implementation=None"
    )
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        traced.lower(lowering_platforms=(platform,))


# ---- Meshes

BATCH, HEADS, KV_HEADS = 4, 8, 4
SPECS = {
    "query": "b.h.",
    "key": "b.h.",
    "value": "b.h.",
    "bias": "bh..",
    "query_lengths": "b",
    "kv_lengths": "b",
}
PACKED_SPECS = {
    "query": ".h.",
    "key": ".h.",
    "value": ".h.",
    "bias": ".h..",
    "query_cu_seqlens": ".",
    "kv_cu_seqlens": ".",
}


@functools.cache
def mesh_problem(packed, kv_heads=KV_HEADS):
    rng = np.random.default_rng(0)
    heads = {"num_q_heads": HEADS, "num_kv_heads": kv_heads, "bias": "bn", "head_dim": 8}
    if packed:
        sizes = {"query_bounds": [0, 3, 5], "kv_bounds": [0, 2, 6], "query_tokens": 6}
        return cases.packed(rng, **sizes, kv_tokens=8, max_q_len=3, max_kv_len=4, **heads)
    lengths = {"query_lengths": [2, 1, 2, 0], "kv_lengths": [5, 6, 0, 3]}
    return cases.dense(rng, batch=BATCH, **lengths, **heads)


@functools.cache
def unsharded(packed, kv_heads=KV_HEADS):
    x = mesh_problem(packed, kv_heads)
    found = jit(attention(x))(arrays_of(x)), jit(gradients_of(x))(arrays_of(x))
    return jax.tree.map(np.asarray, found)


def mesh_of(kind):
    types = {"auto": (AxisType.Auto,) * 2, "explicit": (AxisType.Explicit,) * 2}
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=types[kind], devices=jax.devices()[:4])


def run_sharded(kind, packed, batch, heads, kv_heads=KV_HEADS):
    """Results, gradients, and the collectives of both programs."""
    x, mesh = mesh_problem(packed, kv_heads), mesh_of(kind)
    letters = {"b": batch, "h": heads, ".": None}
    table = PACKED_SPECS if packed else SPECS
    specs = {name: P(*[letters[c] for c in text]) for name, text in table.items()}
    if kv_heads < 2:
        specs |= dict.fromkeys(("key", "value"), P(batch))
    found = []
    with jax.set_mesh(mesh):
        placed = {
            name: jax.device_put(a, NamedSharding(mesh, specs[name]))
            for name, a in arrays_of(x).items()
        }
        for function in (attention(x), gradients_of(x)):
            compiled = jax.jit(function).lower(placed).compile(compiler_options=FAST)
            text = compiled.as_text()
            assert text.count(f'custom_call_target="{cases.TARGET}"') == NATIVE
            found += [compiled(placed), re.findall(COLLECTIVES, text)]
    return found


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize(
    "packed, batch, heads",
    [(False, "x", None), (False, None, "y"), (False, "x", "y"), (True, None, "x")],
)
def test_batch_and_heads_are_sharded_without_collectives(kind, packed, batch, heads):
    results, collectives, gradients, gradient_collectives = run_sharded(kind, packed, batch, heads)
    assert collectives == gradient_collectives == []
    assert_trees_close((results, gradients), unsharded(packed))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_query_heads_of_one_kv_head_are_sharded_forward(kind):
    results, collectives, gradients, gradient_collectives = run_sharded(kind, False, "x", "y", 1)
    assert collectives == []
    assert gradient_collectives != []  # the gradients of a kv head are sums over its query heads
    assert_trees_close((results, gradients), unsharded(False, 1))


def test_gradients_of_a_bias_that_sequences_share_are_summed():
    x, mesh = mesh_problem(False), mesh_of("auto")
    shared = x.replace(bias=x.arrays["bias"][:1])
    expected = jit(gradients_of(shared))(arrays_of(shared))
    placed = {
        name: jax.device_put(a, NamedSharding(mesh, P("x" if name != "bias" else None)))
        for name, a in arrays_of(shared).items()
    }
    compiled = jax.jit(gradients_of(shared)).lower(placed).compile(compiler_options=FAST)
    found = set(re.findall(COLLECTIVES, compiled.as_text()))
    assert found == {"all-reduce"}
    assert_trees_close(compiled(placed), expected)


def test_second_derivative_on_an_explicit_mesh():
    x = mesh_problem(False)

    def slope(arrays):
        gradients = gradients_of(x, names=("query", "key"))(arrays)
        return sum(jnp.sum(jnp.sin(g)) for g in gradients.values())

    def second(arrays):
        return jax.grad(lambda q: slope(arrays | {"query": q}))(arrays["query"])

    expected = jit(second)(arrays_of(x))
    mesh = mesh_of("explicit")
    with jax.set_mesh(mesh):
        placed = {
            name: jax.device_put(a, NamedSharding(mesh, P("x"))) for name, a in arrays_of(x).items()
        }
        assert_trees_close(jit(second)(placed), expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    x = mesh_problem(False)
    mesh = mesh_of("auto")
    arrays = arrays_of(x)
    shared = ("bias",)
    arrays["bias"] = arrays["bias"][:1]
    specs = {name: P() if name in shared else P("x") for name in arrays}

    def attend(arrays):
        return attention(x)(arrays)[0]

    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=P("x"),
                           check_vma=check_vma)  # fmt: skip

    def gradients(function):
        floats = {name: arrays[name] for name in ("query", "key", "bias")}
        return jax.grad(lambda floats: jnp.sum(jnp.sin(function(arrays | floats))))(floats)

    found, expected = (jit(lambda f=f: (f(arrays), gradients(f)))() for f in (mapped, attend))
    assert_trees_close(found, expected)


# ---- explain


def test_explain_forward_and_backward():
    x = problem()
    arrays = arrays_of(x)
    forward, backward = jax_attn.explain(gradients_of(x))(arrays)
    assert forward.op == "small_seq_attention"
    assert backward.op == "small_seq_attention_backward"
    # Of 4 bytes: queries 3 x 2 x 4 x 8, keys and values 3 x 6 x 2 x 8, bias 3 x 4 x 1 x 6, lse
    # 3 x 2 x 4, lengths 2 x 3. The gradient of the bias is not summed yet: 3 x 4 x 2 x 6.
    inputs = 192 + 2 * 288 + 72 + 6
    assert forward.bytes_moved == 4 * (inputs + 192 + 24)
    assert backward.bytes_moved == 4 * (inputs + 24 + 192 + 24 + 192 + 2 * 288 + 144)
    for call in (forward, backward):
        assert call.num_splits is None
        if not NATIVE:
            continue
        assert call.implementation == "native"
        assert call.variant == support.vector_variant()
        assert call.scratch_bytes == 0
        assert call.refused == {"xla": "the native kernel takes this case"}
        assert str(call).startswith(f"{call.op} on cpu: native ({call.variant})\n")
    (call,) = jax_attn.explain(attention(x, "xla"))(arrays)
    assert call.implementation == "xla" and call.variant is None
    assert call.refused == {"native": 'implementation="xla" was asked for'}
