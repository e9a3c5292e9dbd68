# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Split-KV and paged attention under JAX's transformations; gradients have a file of their own."""

import functools
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from jax import lax

import jax_attn

TARGET = "jax_attn_split_kv_attention"
NATIVE = "cpu" in jax_attn.platforms()

# Values that may depend on how XLA fuses: a few ulp of sums of numbers around 1.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}

# Half the time to compile; a test runs a program once.
FAST = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=FAST)

LAYOUTS = {"dense": (None, None), "NHD": ("NHD", None), "HND": ("HND", None), "layers": ("NHD", 3)}


def problem(layout="dense", seed=0, scales=("token", "head"), **options):
    """A problem with every operand that its layout can have."""
    rng = np.random.default_rng(seed)
    sizes = {"batch": 2, "query_len": 2, "head_dim": 8, "kv_len": 16, "lengths": [16, 9]}
    arrays = {"bias": "n", "mask": "bt", "alibi": True, "sinks": True}
    k_scale, v_scale = scales
    options = {"k_scale": k_scale, "v_scale": v_scale, "causal": "bottom_right", **options}
    x = support.dense(rng, **sizes, **arrays, **options)
    layout, num_layers = LAYOUTS[layout]
    if layout is not None:
        x = support.paged(x, rng, 4, layout, num_layers, scale_per_layer=num_layers is not None)
        table = x.page_table.clip(0, x.key.shape[-4] - 1)  # so that longer contexts are finite
        clean = {n: np.nan_to_num(a) for n, a in x.arrays.items() if a.dtype == np.float32}
        x = x.replace(**clean, page_table=table)
    return x


def arrays_of(x):
    return {name: jnp.asarray(array) for name, array in x.arrays.items()}


def attention(x, implementation=None):
    """A function of all operands by name, to the output and the lse."""
    return lambda arrays: support.call(
        arrays, x.layout, return_lse=True, implementation=implementation, **x.options
    )


def loss(x, implementation=None):
    def of(arrays):
        out, lse = attention(x, implementation)(arrays)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isneginf(lse), 0, jnp.cos(lse)))

    return of


def assert_trees_close(actual, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **{**CLOSE, **tolerance}), actual, expected
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eager_equals_jit(layout, implementation):
    x = problem(layout)
    function, arrays = attention(x, implementation), arrays_of(x)
    assert_trees_close(function(arrays), jax.jit(function)(arrays), rtol=0, atol=0)


# vmap


def variants(x, name, count=3):
    """Other values of an operand that are as valid."""
    array = jnp.asarray(x.arrays[name])
    if name == "kv_lengths":
        return [array - 2 * i for i in range(count)]
    if name == "layer":
        return [(array + i) % x.key.shape[0] for i in range(count)]
    if name in ("mask", "page_table"):
        return [jnp.roll(array, i, -1) for i in range(count)]
    return [array * (1 - 0.3 * i) for i in range(count)]


def stacked(x, names, rng, count=3):
    """Operands of which `names` are stacked along a random axis, and their `in_axes`."""
    arrays = arrays_of(x)
    axes = dict.fromkeys(arrays)
    for name in names:
        axes[name] = int(rng.integers(arrays[name].ndim + 1))
        arrays[name] = jnp.stack(variants(x, name, count), axes[name])
    return arrays, axes


def one_by_one(function, x, names, count=3):
    """Results for each of the variants of `names`, stacked."""
    function, arrays = jit(function), arrays_of(x)
    results = [
        function(arrays | {name: variants(x, name, count)[i] for name in names})
        for i in range(count)
    ]
    return jax.tree.map(lambda *parts: np.stack(parts), *results)


def compiled_once(function, *args):
    """Runs a jitted function; its program must be one kernel and no loop."""
    compiled = jax.jit(function).lower(*args).compile(compiler_options=FAST)
    text = compiled.as_text()
    assert text.count(f'custom_call_target="{TARGET}"') == 1
    assert " while(" not in text
    return compiled(*args)


OPERANDS = ("query", "key", "value", "bias", "mask", "kv_lengths", "alibi_slopes", "sinks")
OPERANDS += ("k_scale", "v_scale", "page_table", "layer")


@pytest.mark.skipif(not NATIVE, reason="no kernel to count calls of")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_of_each_operand_is_one_call(layout):
    x = problem(layout)
    rng = np.random.default_rng(1)
    singles = [[name] for name in OPERANDS if name in x.arrays]
    subsets = [rng.permutation(list(x.arrays))[: rng.integers(2, 9)] for _ in range(3)] + [
        list(x.arrays)
    ]
    for names in [*singles, *subsets]:
        arrays, axes = stacked(x, names, rng)
        actual = compiled_once(jax.vmap(attention(x), in_axes=(axes,)), arrays)
        assert_trees_close(actual, one_by_one(attention(x), x, names), err_msg=str(names))


@pytest.mark.parametrize("scales", [("head", "scalar"), ("scalar", "token")])
@pytest.mark.parametrize("layout", ["dense", "HND", "layers"])
def test_vmap_of_subsets(layout, scales, implementation):
    x = problem(layout, scales=scales)
    rng = np.random.default_rng(2)
    names = rng.permutation(list(x.arrays))[: rng.integers(1, 7)]
    arrays, axes = stacked(x, names, rng)
    actual = jit(jax.vmap(attention(x, implementation), in_axes=(axes,)))(arrays)
    expected = one_by_one(attention(x, implementation), x, names)
    assert_trees_close(actual, expected, err_msg=str(names))


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (["query"], ["value"]),
        (["kv_lengths", "key"], ["query", "sinks"]),
        (["layer", "k_scale"], ["page_table", "mask"]),
        (["page_table"], ["page_table", "layer", "bias", "v_scale"]),
    ],
)
def test_nested_vmap_of_different_operands(outer, inner, implementation):
    x = problem("layers")
    function = attention(x, implementation)
    both = [name for name in outer if name in inner]
    arrays = arrays_of(x) | {n: jnp.stack(variants(x, n, 2)) for n in (*inner, *outer)}
    for name in both:
        arrays[name] = jnp.stack([arrays[name], jnp.roll(arrays[name], 1, -1)])
    axes = [{n: 0 if n in names else None for n in arrays} for names in (inner, outer)]
    mapped = jax.vmap(jax.vmap(function, in_axes=(axes[0],)), in_axes=(axes[1],))
    actual = compiled_once(mapped, arrays) if implementation == "native" else jit(mapped)(arrays)

    function = jit(function)
    for i, j in itertools.product(range(2), range(2)):
        indices = {n: (i, j) if n in both else i if n in outer else j for n in (*inner, *outer)}
        one = arrays | {n: arrays[n][index] for n, index in indices.items()}
        expected = function(one)
        assert_trees_close(jax.tree.map(lambda a, i=i, j=j: a[i, j], actual), expected)


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("dense", ["query", "kv_lengths", "bias", "k_scale"]),
        ("dense", ["key", "sinks", "mask"]),
        ("layers", ["layer", "page_table", "value", "alibi_slopes"]),
        ("HND", ["key", "v_scale", "kv_lengths"]),
    ],
)
def test_vmap_of_gradients(layout, names):
    x = problem(layout)
    arrays, axes = stacked(x, names, np.random.default_rng(3), count=2)

    def gradients(arrays):
        floats = {n: a for n, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.inexact)}
        return jax.grad(lambda floats: loss(x)(arrays | floats))(floats)

    actual = jit(jax.vmap(gradients, in_axes=(axes,)))(arrays)
    assert_trees_close(actual, one_by_one(gradients, x, names, count=2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "names"),
    [("dense", ["query", "kv_lengths"]), ("layers", ["layer", "key", "sinks", "bias"])],
)
def test_gradients_of_vmap(layout, names):
    x = problem(layout)
    arrays, axes = stacked(x, names, np.random.default_rng(4), count=2)
    floats = {n: a for n, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.inexact)}

    def total(floats):
        return jnp.sum(jax.vmap(loss(x), in_axes=(axes,))(arrays | floats))

    def total_of_loop(floats):
        merged = arrays | floats
        parts = [
            {n: a if axes[n] is None else jnp.take(a, i, axes[n]) for n, a in merged.items()}
            for i in range(2)
        ]
        return sum(loss(x)(part) for part in parts)

    actual, expected = (jit(jax.grad(f))(floats) for f in (total, total_of_loop))
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["dense", "NHD"])
def test_jacrev(layout):
    x = problem(layout)
    arrays = arrays_of(x)

    def one_head(sinks):
        return attention(x)(arrays | {"sinks": sinks})[0][0, :, 1, :3]

    jacobian = jit(jax.jacrev(one_head))(arrays["sinks"])
    assert jacobian.shape == (2, 3, 4)
    step = 1e-2
    for n in range(4):
        moved = jnp.zeros(4).at[n].set(step)
        difference = one_head(arrays["sinks"] + moved) - one_head(arrays["sinks"] - moved)
        np.testing.assert_allclose(jacobian[..., n], difference / (2 * step), atol=1e-4)


# Control flow


@pytest.mark.parametrize("loop", ["scan", "while", "fori"])
def test_loops_over_the_layers_of_a_cache(loop, implementation):
    x = problem("layers")
    arrays = arrays_of(x)
    num_layers = x.key.shape[0]
    query, key, value = (arrays.pop(name) for name in ("query", "key", "value"))

    def step(layer, carry):
        query, key, value = carry
        operands = arrays | {"query": query, "key": key, "value": value, "layer": layer}
        out, _ = attention(x, implementation)(operands)
        return query + out, key, value

    def looped(carry):
        if loop == "scan":
            layers = jnp.arange(num_layers, dtype=jnp.int32)
            return lax.scan(lambda carry, i: (step(i, carry), None), carry, layers)[0]
        if loop == "fori":
            return lax.fori_loop(0, num_layers, step, carry)
        first = jnp.int32(0), carry
        more = lambda state: state[0] < num_layers  # noqa: E731
        return lax.while_loop(more, lambda s: (s[0] + 1, step(*s)), first)[1]

    expected = query, key, value
    for layer in range(num_layers):
        expected = jit(step)(jnp.int32(layer), expected)
    assert_trees_close(jit(looped)((query, key, value)), expected)


@pytest.mark.skipif(not NATIVE, reason="jax.numpy gathers the pages")
def test_scan_over_layers_copies_no_cache():
    shape = jax.ShapeDtypeStruct
    pages = shape((8, 64, 16, 2, 64), jnp.float32)
    cache_size = 2 * np.prod(pages.shape) * 4

    def decode(query, cache, table, lengths):
        def body(carry, layer):
            query, cache = carry
            out = jax_attn.paged_attention(query, cache, table, lengths, layer=layer)
            return (query + out, cache), None

        return lax.scan(body, (query, cache), jnp.arange(8, dtype=jnp.int32))[0]

    cache = jax_attn.PagedKVCache(pages, pages)
    tables = shape((4, 16), jnp.int32), shape((4,), jnp.int32)
    query = shape((4, 1, 4, 64), jnp.float32)
    compiled = jax.jit(decode, donate_argnums=1).lower(query, cache, *tables).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache_size / 8


@pytest.mark.parametrize("layout", ["dense", "layers"])
def test_remat(layout):
    x = problem(layout)
    arrays = arrays_of(x)

    def gradients(wrap):
        function = wrap(loss(x))
        return jit(jax.grad(lambda q: function(arrays | {"query": q})))(arrays["query"])

    assert_trees_close(gradients(jax.checkpoint), gradients(lambda f: f))


# Export


def exported_gradients(x):
    """Exports a function of the query that has the kernel and its gradient in it."""
    arrays = arrays_of(x)
    function = jax.jit(lambda query: attention(x)(arrays | {"query": query}))
    checks = jax_attn.ffi.export_checks()
    return function, arrays["query"], jax.export.export(function, disabled_checks=checks)


@pytest.mark.parametrize("layout", ["dense", "layers"])
def test_export_round_trip(layout, tmp_path):
    function, query, export = exported_gradients(problem(layout))
    exported = export(query)
    assert (f"custom_call @{TARGET}" in exported.mlir_module()) == NATIVE
    serialized = exported.serialize(vjp_order=1)
    loaded = jax.export.deserialize(serialized)
    expected = function(query)
    assert_trees_close(jax.jit(loaded.call)(query), expected, rtol=0, atol=0)
    gradients = [
        jax.grad(lambda q, f=f: jnp.sum(jnp.sin(f(q)[0])))(query) for f in (function, loaded.call)
    ]
    assert_trees_close(*gradients)
    if layout == "dense":
        return

    # A process that runs the program without tracing any operation of the package.
    (tmp_path / "program").write_bytes(serialized)
    np.save(tmp_path / "query.npy", query)
    script = (
        "import jax, numpy as np, jax_attn; jax_attn.ffi.register();"
        "call = jax.export.deserialize(bytearray(open('program', 'rb').read())).call;"
        "np.save('out.npy', call(np.load('query.npy'))[0])"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected[0])


@pytest.mark.parametrize("layout", ["dense", "HND"])
def test_export_with_a_symbolic_batch_uses_the_reference(layout):
    x = problem(layout, scales=("head", "scalar"))
    arrays = arrays_of(x)
    (batch,) = jax.export.symbolic_shape("batch")
    with_batch = {"query", "mask", "kv_lengths", "page_table"}
    with_batch |= {"key", "value"} if layout == "dense" else set()
    shapes = {
        n: jax.ShapeDtypeStruct((batch, *a.shape[1:]) if n in with_batch else a.shape, a.dtype)
        for n, a in arrays.items()
    }
    function = jax.jit(attention(x))
    exported = jax.export.export(function)(shapes)
    assert f"custom_call @{TARGET}" not in exported.mlir_module()
    loaded = jax.export.deserialize(exported.serialize(vjp_order=1))
    twice = {n: jnp.tile(a, (2,) + (1,) * (a.ndim - 1)) for n, a in arrays.items()}
    arguments = arrays | {n: twice[n] for n in with_batch if n in arrays}
    assert_trees_close(loaded.call(arguments), function(arguments))

    def gradient(function):
        return jit(jax.grad(lambda q: jnp.sum(function(arguments | {"query": q})[0])))

    assert_trees_close(*(gradient(f)(arguments["query"]) for f in (loaded.call, function)))
    native = jax.jit(attention(x, "native"))
    with pytest.raises(NotImplementedError, match=r"symbolic|not installed"):
        jax.export.export(native)(shapes)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
@pytest.mark.parametrize("layout", ["dense", "layers"])
def test_lowering_for_a_platform_that_is_absent(layout, platform):
    x = problem(layout)

    def lower(implementation):
        traced = jax.jit(attention(x, implementation)).trace(arrays_of(x))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    for implementation in (None, "xla"):
        assert "custom_call" not in lower(implementation)
    with pytest.raises(NotImplementedError, match=f'implementation="native".* on {platform}'):
        lower("native")


# Settings of JAX


@pytest.mark.parametrize("layout", ["dense", "layers"])
@pytest.mark.parametrize("setting", ["enable_x64", "debug_nans", "checking_leaks"])
def test_settings(setting, layout):
    # With causal and 2 queries, a context of 1 key has an empty row.
    x = problem(layout).replace(kv_lengths=np.array([16, 1], np.int32))
    x = x.replace(mask=np.ones_like(x.mask))
    settings = {
        "enable_x64": functools.partial(jax.enable_x64, True),
        "debug_nans": functools.partial(jax.debug_nans, True),
        "checking_leaks": jax.checking_leaks,
    }
    arrays = arrays_of(x)

    def run(arrays):
        floats = {n: a for n, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.inexact)}
        gradients = jit(jax.grad(lambda floats: loss(x)(arrays | floats)))(floats)
        results = [jit(attention(x, i))(arrays) for i in (None, "xla")]
        return *results, gradients

    with settings[setting]():
        actual = run(arrays)
    expected = run(arrays)
    assert jax.tree.map(lambda a: a.dtype, actual) == jax.tree.map(lambda a: a.dtype, expected)
    assert np.isneginf(actual[0][1]).sum() == 0  # the sinks are included
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-4)
