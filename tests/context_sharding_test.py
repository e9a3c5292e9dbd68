# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Contexts sharded over mesh axes: values, gradients, and what crosses devices."""

import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_attn
from jax_attn._src import fused_qkv_rope_cache, small_seq_attention
from jax_attn._src.split_kv_attention import declaration, primitive
from jax_attn._src.split_kv_attention.problem import Options

TARGET = "jax_attn_split_kv_attention"
NATIVE = "cpu" in jax_attn.platforms()
COLLECTIVES = "all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter"

# Half the time to compile; the partitioner does the same.
FAST = {"xla_backend_optimization_level": 0}

BATCH, QUERY_LEN, KV_HEADS, HEADS, HEAD_DIM, V_HEAD_DIM = 4, 2, 2, 4, 8, 16
KV_LEN, PAGE_SIZE = 32, 4
MAX_PAGES, NUM_PAGES = KV_LEN // PAGE_SIZE, BATCH * KV_LEN // PAGE_SIZE
# Ends inside the first of eight shards, at the last key, nowhere, and in the middle.
LENGTHS = np.array([3, 32, 0, 17], np.int32)

# Options of positions and of what is merged; each is in some case of each kind of mesh.
PLAIN = {}
WINDOW = {"causal": "bottom_right", "sliding_window": 6, "lse_includes_sinks": False}
TOP_LEFT = {"causal": "top_left", "logits_soft_cap": 3.0}
LAST = {"causal": "bottom_right", "sliding_window": 20}


def page_ids():
    return np.random.default_rng(1).permutation(NUM_PAGES).reshape(BATCH, MAX_PAGES)


@functools.cache
def operands(layout):
    """Operands by name, where nothing that is outside a context is a number."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    x = {"query": normal(BATCH, QUERY_LEN, HEADS, HEAD_DIM), "sinks": normal(HEADS)}
    x |= {"kv_lengths": LENGTHS, "alibi_slopes": np.float32(0.1) * np.arange(HEADS, dtype="f4")}
    x["bias"] = normal(1, HEADS, 1, KV_LEN)
    inside = np.arange(KV_LEN)[None, :] < LENGTHS[:, None]
    stored = {
        "key": normal(BATCH, KV_LEN, KV_HEADS, HEAD_DIM),
        "value": normal(BATCH, KV_LEN, KV_HEADS, V_HEAD_DIM),
        "v_scale": normal(BATCH, KV_LEN, KV_HEADS),
    }
    for name, a in stored.items():
        stored[name] = np.where(inside.reshape(BATCH, KV_LEN, *[1] * (a.ndim - 2)), a, np.nan)
    if layout == "dense":
        return x | stored
    x["mask"] = rng.random((BATCH, 1, QUERY_LEN, KV_LEN)) < 0.8
    table = page_ids()
    for name, a in stored.items():
        pages = np.empty((NUM_PAGES, PAGE_SIZE, *a.shape[2:]), np.float32)
        pages[table] = a.reshape(BATCH, MAX_PAGES, PAGE_SIZE, *a.shape[2:])
        x[name] = pages
    used = np.arange(MAX_PAGES) * PAGE_SIZE < LENGTHS[:, None]
    return x | {"page_table": np.where(used, table, 1 << 30).astype(np.int32)}


def attend(x, **options):
    """The output and the lse of operands of either layout."""
    x = dict(x)
    query, key, value = (x.pop(name) for name in ("query", "key", "value"))
    if "page_table" not in x:
        return jax_attn.split_kv_attention(query, key, value, **x, return_lse=True, **options)
    cache = jax_attn.PagedKVCache(key, value, v_scale=x.pop("v_scale", None))
    table, lengths = x.pop("page_table"), x.pop("kv_lengths")
    return jax_attn.paged_attention(query, cache, table, lengths, **x, return_lse=True, **options)


def everything(attend):
    """Makes `attend` return the gradients of a loss as well."""

    def run(x):
        floats = {name: a for name, a in x.items() if jnp.issubdtype(a.dtype, jnp.inexact)}

        def loss(floats):
            out, lse = attend(x | floats)
            finite = jnp.where(jnp.isneginf(lse), 0, lse)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(finite)), (out, lse)

        return jax.grad(loss, has_aux=True)(floats)

    return run


def choose(layout, *left_out):
    """Operands that are not left out, and their names."""
    x = {name: a for name, a in operands(layout).items() if name not in left_out}
    if "kv_lengths" in left_out:  # all keys are seen
        x = {n: np.nan_to_num(a) if a.dtype == np.float32 else a for n, a in x.items()}
    return x, tuple(x)


@functools.cache
def expected(layout, names, options):
    x = {n: jnp.asarray(a) for n, a in choose(layout, *set(operands(layout)) - {*names})[0].items()}
    run = everything(functools.partial(attend, **dict(options)))
    return jax.tree.map(np.asarray, jax.jit(run, compiler_options=FAST)(x))


def compile_and_run(function, x, num_calls=1):
    """Results of a jitted function; the kinds of its collectives, and the numbers they exchange."""
    compiled = jax.jit(function).lower(x).compile(compiler_options=FAST)
    text = compiled.as_text()
    assert text.count(f'custom_call_target="{TARGET}"') == NATIVE * num_calls
    found = re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", text)
    shapes = [re.findall(r"\[([\d,]*)\]", result) for result, _ in found]
    size = sum(math.prod(int(n) for n in s.split(",") if n) for ss in shapes for s in ss)
    return compiled(x), [kind for _, kind in found], size


def mesh_of(kind, shape=(2, 2, 2)):
    types = {"auto": (AxisType.Auto,) * 3, "explicit": (AxisType.Explicit,) * 3}
    types["mixed"] = (AxisType.Explicit, AxisType.Auto, AxisType.Auto)
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, ("x", "y", "z"), axis_types=types[kind], devices=devices)


def specs(layout, context, batch=None, heads=None, pages=None):
    """Shardings of all operands by the axes of contexts, sequences, heads, and pages of a pool."""
    pool = (pages, None, heads) if layout == "paged" else (batch, context, heads)
    return {
        "query": P(batch, None, heads),
        "key": P(*pool),
        "value": P(*pool),
        "v_scale": P(*pool),
        "bias": P(None, heads, None, context),
        "mask": P(batch, None, None, context),
        "page_table": P(batch, context),
        "kv_lengths": P(batch),
        "alibi_slopes": P(heads),
        "sinks": P(heads),
    }


def place(x, mesh, wanted):
    return {name: jax.device_put(a, NamedSharding(mesh, wanted[name])) for name, a in x.items()}


def check(actual, names, layout, options, order=None):
    """Compares with one device; `order` is that of the pool's pages."""
    (gradients, (out, lse)) = expected(layout, names, tuple(options.items()))
    if order is not None:
        stored = ("key", "value", "v_scale")
        gradients = {n: g[order] if n in stored else g for n, g in gradients.items()}
    # Per name, for a message that says which.
    for name, a in {**actual[0], "out": actual[1][0], "lse": actual[1][1]}.items():
        b = {**gradients, "out": out, "lse": lse}[name]
        assert not np.isnan(b).any()
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=name)


def check_traffic(kinds, size, x, axes):
    """Out and lse cross devices once, and gradients of what devices share; never keys or pages."""
    assert set(kinds) == {"all-reduce"}
    of_device = {"bias"} if "batch" not in axes and "pages" not in axes else set()
    if "page_table" not in x or set(axes) <= {"pages", "heads"}:
        of_device |= {"key", "value", "v_scale"}
    shared = [a for n, a in x.items() if n not in of_device and a.dtype == np.float32]
    exchanged = BATCH * QUERY_LEN * HEADS * (V_HEAD_DIM + 2)
    assert size <= exchanged + sum(a.size for a in shared)


BIAS = ("alibi_slopes",)
ALIBI = ("bias", "mask")
# layout, axes by what they shard, options, operands that are left out
CASES = [
    ("dense", {"context": "x"}, WINDOW, BIAS),
    ("dense", {"context": ("x", "y", "z")}, TOP_LEFT, ALIBI),
    ("dense", {"context": ("z", "y"), "batch": "x"}, LAST, ALIBI),
    ("dense", {"context": "y", "batch": "z", "heads": "x"}, PLAIN, ("kv_lengths", *BIAS)),
    ("paged", {"context": ("y", "x")}, WINDOW, ALIBI),
    ("paged", {"context": "z", "batch": "y", "heads": "x"}, TOP_LEFT, BIAS),
    ("paged", {"pages": ("x", "y", "z")}, LAST, ALIBI),
    ("paged", {"pages": "y", "context": "x", "heads": "z"}, WINDOW, BIAS),
]


# Explicit meshes have the same plans, so every other case.
@pytest.mark.parametrize(
    ("kind", "layout", "axes", "options", "left_out"),
    [("auto", *case) for case in CASES]
    + [("explicit", *case) for case in CASES[1::2]]
    + [("mixed", *CASES[0])],
    ids=str,
)
def test_contexts_in_shards(kind, layout, axes, options, left_out):
    x, names = choose(layout, *left_out)
    mesh = mesh_of(kind)
    wanted = specs(layout, **{"context": None, **axes})
    placed = place(x, mesh, wanted)
    with jax.set_mesh(mesh):
        run = everything(functools.partial(attend, **options))
        (gradients, results), kinds, size = compile_and_run(run, placed)
    check((gradients, results), names, layout, options)
    check_traffic(kinds, size, x, axes)
    for name, gradient in gradients.items():
        expected_sharding = NamedSharding(mesh, wanted[name])
        assert gradient.sharding.is_equivalent_to(expected_sharding, gradient.ndim), name


# By hand


def own_pools(x, num_shards):
    """A pool in which the pages of a shard's part of all contexts are together, and local ids."""
    parts = np.split(page_ids(), num_shards, axis=1)
    order = np.concatenate([part.reshape(-1) for part in parts])
    local = np.tile(np.arange(parts[0].size, dtype=np.int32).reshape(BATCH, -1), num_shards)
    pools = {n: x[n][order] for n in ("key", "value", "v_scale") if n in x}
    return x | pools | {"page_table": np.where(x["page_table"] < NUM_PAGES, local, -5)}, order


@pytest.mark.parametrize(
    ("layout", "axes", "options", "check_vma"),
    [
        ("dense", ("y",), WINDOW, True),
        ("dense", ("x", "z"), TOP_LEFT, False),
        ("paged", ("z", "y"), WINDOW, True),
        ("paged", ("x",), LAST, False),
    ],
    ids=str,
)
def test_axis_name(layout, axes, options, check_vma):
    """Every device gives its part of the contexts; `heads` is sharded too."""
    x, names = choose(layout, *ALIBI)
    order = None
    if layout == "paged":
        x, order = own_pools(x, 2 ** len(axes))
    heads = next(axis for axis in "xyz" if axis not in axes)
    wanted = specs(layout, axes, None, heads, pages=axes)
    local = functools.partial(attend, axis_name=axes if len(axes) > 1 else axes[0], **options)
    rows = wanted["query"]
    sharded = jax.shard_map(
        local,
        mesh=mesh_of("auto"),
        in_specs=({name: wanted[name] for name in x},),
        out_specs=(rows, rows),
        check_vma=check_vma,
    )
    actual, kinds, _ = compile_and_run(everything(sharded), x)
    assert set(kinds) == {"all-reduce"}
    check(actual, names, layout, options, order)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_fewer_devices(num_devices):
    x, names = choose("dense", *ALIBI)
    mesh = mesh_of("auto", (num_devices, 1, 1))
    with jax.set_mesh(mesh):
        placed = place(x, mesh, specs("dense", "x"))
        out, kinds, size = compile_and_run(functools.partial(attend, **WINDOW), placed)
    check(({}, out), names, "dense", WINDOW)
    rows = BATCH * QUERY_LEN * HEADS
    assert kinds == ["all-reduce"] * (2 if num_devices > 1 else 0)
    assert size == (rows * (V_HEAD_DIM + 2) if num_devices > 1 else 0)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_remat_scan_and_vmap(kind):
    """Two vmapped queries over shared contexts, in a rematerialised loop over layers."""
    x, _ = choose("dense", *ALIBI)
    mesh = mesh_of(kind)
    wanted = specs("dense", ("x", "z"), "y")
    queries = np.stack([x["query"], -x["query"]])

    def loss(queries, x):
        def layer(queries, _):
            out = jax.vmap(lambda query: attend(x | {"query": query}, **WINDOW)[0])(queries)
            return queries + out[..., :HEAD_DIM], None

        queries, _ = jax.lax.scan(jax.checkpoint(layer), queries, length=2)
        return jnp.sum(jnp.sin(queries))

    function = jax.jit(jax.value_and_grad(loss), compiler_options=FAST)
    expected = function(queries, {name: jnp.asarray(a) for name, a in x.items()})
    with jax.set_mesh(mesh):
        placed = jax.device_put(queries, NamedSharding(mesh, P(None, "y")))
        actual, kinds, _ = compile_and_run(
            lambda args: jax.value_and_grad(loss)(*args), (placed, place(x, mesh, wanted)), 2
        )
    assert set(kinds) == {"all-reduce"}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), actual, expected
    )


def test_single_last_query_needs_no_positions():
    """The kernel that every backend has is enough for decoding."""
    x, _ = choose("dense", "alibi_slopes")
    x = {n: a[:, -1:] if n == "query" else a for n, a in x.items() if n != "bias"}
    mesh = mesh_of("auto")
    function = jax.jit(functools.partial(attend, causal="bottom_right"))
    expected = function(x)
    with jax.set_mesh(mesh):
        compiled = function.lower(place(x, mesh, specs("dense", ("x", "y")))).compile()
        text = compiled.as_text()
        actual = compiled(place(x, mesh, specs("dense", ("x", "y"))))
    assert ('operands = "kv_lengths,v_scale"' in text) == NATIVE
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected
    )


# What JAX cannot do


def test_export():
    """Of what a shard_map makes, by hand or by an explicit mesh; not of what XLA partitions."""
    x, names = choose("dense", *ALIBI)
    wanted = specs("dense", ("x", "y"), heads="z")
    for kind in ("explicit", "auto"):
        mesh = mesh_of(kind)
        with jax.set_mesh(mesh):
            placed = place(x, mesh, wanted)
            function = jax.jit(functools.partial(attend, **WINDOW))
            checks = [jax.export.DisabledSafetyCheck.custom_call(TARGET)]
            export = jax.export.export(function, disabled_checks=checks)
            if kind == "auto":
                with pytest.raises(NotImplementedError, match=r"jax\.export cannot.*shard_map"):
                    export(placed)
                continue
            loaded = jax.export.deserialize(export(placed).serialize())
            out = jax.jit(loaded.call)(placed)
        check(({}, out), names, "dense", WINDOW)


def test_without_shardy():
    """An error, where XLA would end the process."""
    x, _ = choose("dense", *ALIBI)
    mesh = mesh_of("auto")
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match="only Shardy can"):
            jax.jit(attend).lower(place(x, mesh, specs("dense", "x")))
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)


def test_refusal_of_a_kernel_on_a_mesh():
    x, _ = choose("dense", *ALIBI)
    x = x | {"query": x["query"][..., :7], "key": x["key"][..., :7]}
    mesh = mesh_of("auto")
    function = jax.jit(functools.partial(attend, implementation="native"))
    with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match="cannot be used on cpu: "):
        function.lower(place(x, mesh, specs("dense", "x")))


@pytest.mark.parametrize(
    ("kind", "option", "hits"),
    [("auto", False, 0), ("auto", True, 1), ("explicit", False, 1)],
    ids=str,
)
def test_persistent_compilation_cache(kind, option, hits, tmp_path, monkeypatch):
    """The address of a callback is in the key of what XLA partitions, unless an option removes it.

    In another process it is another: here, after the callbacks are made anew.
    """
    found = []
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_remove_custom_partitioning_ptr_from_cache_key": option,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    x, _ = choose("dense", *ALIBI)
    mesh = mesh_of(kind)
    x = place(x, mesh, specs("dense", "x"))
    jax.monitoring.register_event_listener(listener := lambda event, **_: found.append(event))
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        kept = []
        for _ in range(2):
            found.clear()
            with jax.set_mesh(mesh):
                jax.jit(lambda x: attend(x)[0]).lower(x).compile()
            kept.append(primitive.operation._partitioned)
            monkeypatch.setattr(
                primitive.operation,
                "_partitioned",
                functools.cache(
                    functools.partial(
                        type(primitive.operation)._partitioned.__wrapped__, primitive.operation
                    )
                ),
            )
    finally:
        jax.monitoring.unregister_event_listener(listener)
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert found.count("/jax/compilation_cache/cache_hits") == hits


@pytest.mark.parametrize("function", ["dense", "paged", "merge"])
def test_axis_names_that_are_no_axes(function):
    x, _ = choose("dense" if function == "merge" else function, *ALIBI)
    out, lse = np.zeros((1, 1, 1, 1), "f4"), np.zeros((1, 1, 1), "f4")

    def run(axis_name):
        if function == "merge":
            return jax_attn.merge_attention([out], [lse], axis_name=axis_name)
        return attend(x, axis_name=axis_name)

    with pytest.raises(ValueError, match=r"'x', which is no manual mesh axis here.*shard_map"):
        run("x")
    with pytest.raises(ValueError, match="different mesh axes"):
        run(())
    with pytest.raises(ValueError, match="different mesh axes"):
        run(("x", "x"))
    with pytest.raises(TypeError, match="str or a tuple of str"):
        run(3)


# The docs


def documented_specs():
    """The declaration of each operation with all operands, and those that are not public."""
    for op, layout in (("split_kv_attention", None), ("paged_attention", "NHD")):
        options = Options(scale=1.0, page_layout=layout, has_layers=layout is not None)
        shape = (1, 1, 1, 2, 1) if layout else (1, 1, 2, 1)
        absent = () if layout else ("page_table", "layer")
        yield op, declaration.spec({"key": shape}, options), ("query_offset", *absent)
    fused = fused_qkv_rope_cache.problem.Options(2, page_layout="NHD", has_layers=True)
    yield "fused_qkv_rope_cache", fused_qkv_rope_cache.primitive.spec(fused), ()
    for packed in (False, True):
        options = small_seq_attention.problem.Options(1.0, max_q_len=1 if packed else None)
        absent = [f"{x}_{'lengths' if packed else 'cu_seqlens'}" for x in ("query", "kv")]
        op = f"small_seq_attention{', packed' if packed else ''}"
        yield op, small_seq_attention.primitive.spec(2, options), absent


def table_of_dimensions():
    """What docs/sharding.md says of dimensions that stay sharded, from the declarations."""
    lines = ["| operation | dimension | of | what crosses devices |", "|---|---|---|---|"]
    for op, spec, hidden in documented_specs():
        of = {}
        for array, dims in spec.arrays.items():
            # Scales are addressed like what they scale, gradients like what they are of.
            if array in (*hidden, "k_scale", "v_scale") or array.startswith("d"):
                continue
            for name in dims.replace("(", " ").replace(")", " ").split():
                of.setdefault(name, []).append(f"`{array}`")
        for name, arrays in of.items():
            if name in spec.shardable + spec.merged:
                crosses = "nothing" if name in spec.shardable else "results, to be merged"
                lines.append(f"| `{op}` | `{name}` | {', '.join(arrays)} | {crosses} |")
    return "\n".join(lines) + "\n"


PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "sharding.md").read_text()


def test_the_table_in_the_docs():
    assert table_of_dimensions() in PAGE


def test_the_code_in_the_docs():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    x, names = choose("paged", *ALIBI, *BIAS, "sinks", "v_scale")
    x, _ = own_pools(x, 1)
    # Sequences and their pages are together; each half of a context is in a pool of its own.
    order = np.arange(NUM_PAGES).reshape(2, BATCH // 2, 2, -1).swapaxes(1, 2).reshape(-1)
    local = np.arange(NUM_PAGES // 4, dtype=np.int32).reshape(BATCH // 2, -1)
    scope = {
        **{"functools": functools, "jax": jax, "jax_attn": jax_attn, "P": P},
        **{"PagedKVCache": jax_attn.PagedKVCache, "query": x["query"]},
        "cache": jax_attn.PagedKVCache(x["key"][order], x["value"][order]),
        "page_table": np.tile(local, (2, 2)),
        "kv_lengths": x["kv_lengths"],
    }
    axes = ("data", "heads", "context")
    with jax.set_mesh(jax.make_mesh((2, 2, 2), axes, axis_types=(AxisType.Auto,) * 3)):
        exec(compile(code, "sharding.md", "exec"), scope)
    (out, _) = expected("paged", names, ())[1]
    np.testing.assert_allclose(scope["out"], out, rtol=1e-4, atol=2e-5)
