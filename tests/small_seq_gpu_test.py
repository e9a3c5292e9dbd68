# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of `small_seq_attention`: the CPU kernels' tests, sizes, and capture in graphs.

Skipped where there is no GPU; tests/small_seq_gpu_source_test.py runs some of them without one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_seq_attention_test as values
import small_seq_cases as cases
import small_seq_errors_test as errors
import small_seq_transforms_test as transforms
import support

import jax_attn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        support.PLATFORM == "cpu" or support.PLATFORM not in jax_attn.platforms(),
        reason="no GPU that this build of jax_attn has kernels for",
    ),
]
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


@pytest.fixture
def native():
    """The kernels of the GPU; other tests of the same names put others in their place."""


# ---- The CPU kernels' tests


@pytest.mark.parametrize("seeds", [range(i, i + 10) for i in range(0, 60, 10)])
def test_random_problems(native, seeds):
    for seed in seeds:
        try:
            cases.random_problem(seed).check("native")
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise


@pytest.mark.parametrize("sizes", values.EDGES.values(), ids=values.EDGES)
def test_edges(native, sizes):
    values.test_edges(sizes, "native")


@pytest.mark.parametrize("bounds", values.PACKED_EDGES.values(), ids=values.PACKED_EDGES)
def test_packed_edges(native, bounds):
    values.test_packed_edges(bounds, "native")


@pytest.mark.parametrize("tokens", [(0, 5), (5, 0), (0, 0)])
def test_packed_arrays_without_tokens(native, tokens):
    values.test_packed_arrays_without_tokens(tokens, "native")


@pytest.mark.parametrize("name", ["scale", "causal", "logits_soft_cap", "bias", "kv_lengths"])
def test_every_option_has_an_effect(native, name):
    values.test_every_option_has_an_effect(name, "native")


@pytest.mark.parametrize("dtype", support.FLOATS)
def test_large_logits(native, dtype):
    values.test_large_logits(None, dtype)


@pytest.mark.parametrize(
    "test",
    [
        values.test_infinite_bias_hides_keys,
        values.test_a_nan_stays_in_its_row,
        functools.partial(values.test_packed_is_dense_without_its_padding, "native"),
        lambda _: values.test_repeated_calls_give_the_same_bits(),
    ],
    ids=["infinite_bias", "nan", "packed_is_dense", "same_bits"],
)
def test_numbers(native, test):
    if isinstance(test, functools.partial):
        test()
    else:
        test(None)


def test_gradients_of_all_orders(native):
    values.test_check_grads("native")
    values.test_second_derivative_is_that_of_the_reference()


@LAYOUTS
def test_eager_equals_jit(native, packed):
    transforms.test_eager_equals_jit(packed, "native")


@LAYOUTS
def test_vmap_of_operands_is_one_call_each_way(native, packed):
    transforms.test_vmap_of_operands_is_one_call_each_way(packed)


def test_nested_vmap_of_different_operands(native):
    transforms.test_nested_vmap_of_different_operands()


def test_gradients_of_vmap(native):
    transforms.test_gradients_of_vmap()


def test_scan_and_remat(native):
    transforms.test_scan_and_remat()


@pytest.mark.parametrize(
    "function, base, changes, message",
    [(errors.call_handler, errors.DENSE, *case) for case in errors.FORWARD_ERRORS]
    + [(errors.call_handler, errors.PACKED_CALL, *case) for case in errors.PACKED_HANDLER_ERRORS]
    + [(errors.call_backward, errors.DENSE, *case) for case in errors.BACKWARD_ERRORS],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)
def test_handler_refuses(function, base, changes, message):
    errors.test_handler_refuses(function, base, changes, message)


# ---- Every kernel


@pytest.mark.parametrize("dtype", support.FLOATS)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256, 512])
def test_one_query(native, dtype, head_dim):
    # The number of keys chooses the kernel; lengths leave out some of them.
    rng = np.random.default_rng(head_dim)
    for kv_len in (1, 2, 3, 4, 8, 11, 16, 17):
        x = cases.dense(
            rng,
            query_len=1,
            num_q_heads=3,
            num_kv_heads=3,
            head_dim=head_dim,
            v_head_dim=head_dim - 8 if head_dim > 256 else head_dim,
            kv_len=kv_len,
            kv_lengths=[kv_len, kv_len // 2, 0],
            dtype=dtype,
            bias="n" if kv_len == 3 else None,
        )
        cases.poison(x).check("native")


@pytest.mark.parametrize("dtype", support.FLOATS)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256, 512])
def test_many_queries(native, dtype, head_dim):
    rng = np.random.default_rng(head_dim)
    for query_len, kv_len, causal in ((16, 16, "bottom_right"), (3, 64, None), (9, 5, "top_left")):
        x = cases.dense(
            rng,
            batch=2,
            query_len=query_len,
            num_q_heads=6,
            head_dim=head_dim,
            v_head_dim=head_dim + 8 if head_dim < 256 else head_dim,
            kv_len=kv_len,
            kv_lengths=[kv_len, kv_len - 3],
            dtype=dtype,
            causal=causal,
        )
        cases.poison(x).check("native")


# What chooses between kernels on matrix instructions: queries, query heads of a kv head, keys.
TILES = [(2, 1, 3), (5, 1, 8), (1, 8, 8), (4, 4, 4), (9, 1, 7), (16, 1, 16), (3, 5, 11), (6, 3, 16)]
# Those of which several heads share a tile.
FEW = [(2, 1, 2), (1, 2, 1), (2, 1, 3), (1, 4, 4), (2, 2, 1)]


def tile_problem(sizes, dtype, head_dim, **options):
    """A problem of these sizes with sequences of every kind of length."""
    query_len, group, kv_len = sizes
    x = cases.dense(
        np.random.default_rng(head_dim),
        query_len=query_len,
        num_q_heads=3 * group,
        num_kv_heads=3,
        kv_len=kv_len,
        query_lengths=[query_len, query_len // 2, query_len],
        kv_lengths=[kv_len, kv_len, kv_len // 2],
        head_dim=head_dim,
        dtype=dtype,
        **options,
    )
    return cases.poison(x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 200, 512])
def test_tiles(native, dtype, head_dim):
    for sizes in TILES + FEW:
        v_head_dim = head_dim - 8 if sizes[0] == 5 and head_dim > 8 else head_dim
        x = tile_problem(sizes, dtype, head_dim, v_head_dim=v_head_dim)
        found, again = x.check("native"), x.run("native")
        for name, array in found.items():
            np.testing.assert_array_equal(again[name].view(np.uint8), array.view(np.uint8), name)


@pytest.mark.parametrize("sizes", [(2, 1, 2), (2, 2, 3), (4, 4, 4), (16, 1, 16), (12, 2, 9)])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": "bottom_right"},
        {"causal": "top_left", "logits_soft_cap": 2.0},
        {"bias": "nt", "scale": -0.7},
    ],
    ids=str,
)
def test_tiles_with_options(native, sizes, options):
    tile_problem(sizes, "bfloat16", 64, **options).check("native")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 4, 4)])
def test_heads_of_a_tile_keep_apart(native, sizes, dtype):
    # What is beside the squares of the heads has weight 0, by which NaN is not to be multiplied;
    # and numbers of 16 bits are brought near 1 for each head by itself.
    query_len, group, kv_len = sizes
    x = cases.dense(
        np.random.default_rng(0),
        batch=5,
        query_len=query_len,
        num_q_heads=3 * group,
        num_kv_heads=3,
        kv_len=kv_len,
        head_dim=64,
        dtype=dtype,
    )
    expected = x.check("native")
    for name in ("query", "key", "value", "dout"):
        for wrong in (np.nan, np.inf, 500.0):
            arrays, cotangents = dict(x.arrays), dict(x.cotangents)
            changed = cotangents if name == "dout" else arrays
            changed[name] = changed[name].copy()
            changed[name][2, 0, 1, 40] = wrong
            found = cases.Problem(arrays, x.options, cotangents).run("native")
            own = 1 // group if changed is cotangents or name == "query" else 1  # its kv head
            for result, array in found.items():
                before, after = (
                    a.reshape(*a.shape[:2], 3, -1).copy() for a in (expected[result], array)
                )
                before[2, :, own] = after[2, :, own] = 0
                np.testing.assert_array_equal(after, before, f"{name}, {wrong}, {result}")
            assert not np.array_equal(found["query"][2], expected["query"][2])


@pytest.mark.parametrize("sizes", [(2, 1, 2), (2, 1, 3), (16, 1, 16), (12, 2, 9)])
def test_tiles_of_packed_sequences(native, sizes):
    query_len, group, kv_len = sizes
    lengths = np.arange(40) % (query_len + 1), np.arange(40) * 7 % (kv_len + 2)
    bounds = [np.concatenate([[1], 1 + np.cumsum(x)]) for x in lengths]
    x = cases.packed(
        np.random.default_rng(0),
        query_bounds=bounds[0],
        kv_bounds=bounds[1],
        query_tokens=int(bounds[0][-1]) + 3,
        kv_tokens=int(bounds[1][-1]) + 2,
        max_q_len=query_len,
        max_kv_len=kv_len,
        num_q_heads=2 * group,
        num_kv_heads=2,
        head_dim=64,
        dtype="bfloat16",
        bias="bnt",
    )
    cases.poison(x).check("native")


@pytest.mark.parametrize("num_heads", [1, 170])
def test_packed_blocks_with_parts_of_a_sequence_and_with_several(native, num_heads):
    # Few cores, of many heads, come back to a sequence that they had before.
    lengths = np.array([[3, 0, 2, 3], [6, 5, 0, 6]]).repeat(10 if num_heads == 1 else 1, axis=1)
    query_bounds, kv_bounds = (np.concatenate([[2], 2 + np.cumsum(x)]) for x in lengths)
    query_bounds[2] -= 2  # as if it were the one before
    x = cases.packed(
        np.random.default_rng(0),
        query_bounds=query_bounds,
        kv_bounds=kv_bounds,
        query_tokens=int(query_bounds[-1]) + 1,
        kv_tokens=int(kv_bounds[-1]) + 1,
        max_q_len=3,
        max_kv_len=6,
        num_q_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=8,
        dtype="bfloat16",
    )
    cases.poison(x).check("native")


@pytest.mark.parametrize("size", [1e-3, 2e3])
@pytest.mark.parametrize("sizes", [(2, 1, 3), (16, 1, 16), (12, 2, 9)])
def test_gradients_of_logits_beyond_float16(native, sizes, size):
    # They are factors of matrix products, and are far smaller or larger than the gradients.
    query_len, group, kv_len = sizes
    x = cases.dense(
        np.random.default_rng(0),
        query_len=query_len,
        num_q_heads=2 * group,
        num_kv_heads=2,
        kv_len=kv_len,
        head_dim=64,
        dtype="float16",
    )
    factors = {"query": 0.02, "key": 0.02, "value": 20}
    arrays = {n: (factors[n] * a.astype(np.float32)).astype(a.dtype) for n, a in x.arrays.items()}
    dout = x.cotangents["dout"]
    dout = (size * np.clip(dout.astype(np.float32), -4, 4)).astype(dout.dtype)
    cotangents = {"dout": dout, "dlse": np.zeros_like(x.cotangents["dlse"])}
    found = cases.Problem(arrays, x.options, cotangents).check("native")
    assert all(np.isfinite(array.astype(np.float32)).all() for array in found.values())


def test_weights_that_do_not_fit_in_shared_memory(native):
    x = cases.dense(
        np.random.default_rng(0),
        batch=2,
        query_len=32,
        num_q_heads=36,
        kv_len=63,
        causal="top_left",
    )
    x.check("native")


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_large_batch(native, packed):
    # More heads than the device takes at once; each is computed as it is in a small batch.
    copies = 400
    small = cases.dense(
        np.random.default_rng(0),
        batch=16,
        query_len=1,
        num_q_heads=16,
        num_kv_heads=16,
        head_dim=64,
        kv_len=8,
        dtype="bfloat16",
    )
    expected = small.run("native")
    arrays = {n: np.tile(a, (copies, 1, 1, 1)) for n, a in small.arrays.items()}
    cotangents = {
        n: np.tile(a, (copies,) + (1,) * (a.ndim - 1)) for n, a in small.cotangents.items()
    }
    options = dict(small.options)
    if packed:
        batch = len(arrays["query"])
        arrays = {n: a.reshape(-1, *a.shape[2:]) for n, a in arrays.items()}
        cotangents = {n: a.reshape(-1, *a.shape[2:]) for n, a in cotangents.items()}
        arrays["query_cu_seqlens"] = np.arange(batch + 1, dtype=np.int32)
        arrays["kv_cu_seqlens"] = 8 * arrays["query_cu_seqlens"]
        options |= {"max_q_len": 1, "max_kv_len": 8}
    found = cases.Problem(arrays, options, cotangents).run("native")
    for name, array in found.items():
        all_copies = array.reshape(copies, *expected[name].shape)
        assert (all_copies == expected[name]).all(), name


# ---- Dispatch and capture


def test_explain(native):
    x = transforms.problem()
    calls = jax_attn.explain(transforms.gradients_of(x))(transforms.arrays_of(x))
    assert [c.op for c in calls] == ["small_seq_attention", "small_seq_attention_backward"]
    for call in calls:
        assert (call.platform, call.implementation) == (support.PLATFORM, "native")
        assert (call.variant, call.scratch_bytes) == ("vector", 0)


@pytest.mark.parametrize(
    "sizes, dtype, packed, variant",
    [
        ((16, 1, 16), "bfloat16", False, "matrix"),
        ((1, 2, 4), "float16", True, "matrix"),
        ((32, 8, 16), "bfloat16", False, "matrix"),
        ((1, 1, 4), "bfloat16", False, "vector"),
        ((16, 1, 17), "bfloat16", False, "vector"),
        ((16, 1, 16), "float32", True, "vector"),
    ],
)
def test_chosen_variant(native, sizes, dtype, packed, variant):
    query_len, group, kv_len = sizes
    shapes = {"query": (query_len, 2 * group), "key": (kv_len, 2), "value": (kv_len, 2)}
    options = {}
    if packed:
        options = {"max_q_len": query_len, "max_kv_len": kv_len}
        bounds = jax.ShapeDtypeStruct((4,), "int32")
        options |= {"query_cu_seqlens": bounds, "kv_cu_seqlens": bounds}
    arrays = {
        name: jax.ShapeDtypeStruct(shape if packed else (3, *shape), dtype)
        for name, shape in ((n, (*s, 64)) for n, s in shapes.items())
    }
    static = {n: options.pop(n) for n in ("max_q_len", "max_kv_len") if n in options}

    def loss(arrays, bounds):
        return jnp.sum(cases.call(arrays | bounds, implementation="native", **static))

    calls = jax_attn.explain(jax.grad(loss))(arrays, options)
    assert [call.variant for call in calls] == [variant, variant]


@pytest.mark.parametrize(
    "variant, changes",
    [("matrix", {"dtype": "float32"}), ("matrix", {"query_len": 1, "num_q_heads": 2})],
    ids=["float32", "one row"],
)
def test_variant_without_a_kernel(monkeypatch, variant, changes):
    cases.use_variant(variant, monkeypatch)
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"INVALID_ARGUMENT.*'{variant}' cannot"):
        cases.dense(np.random.default_rng(0), **{"dtype": "bfloat16", **changes}).run("native")


@pytest.mark.parametrize("sizes", TILES[-3:])
def test_vector_kernels_of_16_bits(monkeypatch, sizes):
    cases.use_variant("vector", monkeypatch)
    tile_problem(sizes, "bfloat16", 128).check("native")


def test_unknown_variant(monkeypatch):
    cases.use_variant("sse9", monkeypatch)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*'sse9' cannot"):
        cases.dense(np.random.default_rng(0)).run("native")


@LAYOUTS
def test_captured_and_replayed(packed):
    # From the second call on the loop's body is a graph that XLA replays; from the third nothing
    # but the graph runs.
    x = transforms.problem(packed)
    arrays = transforms.arrays_of(x)

    def descend(arrays):
        def step(query, _):
            gradients = transforms.gradients_of(x)(arrays | {"query": query})
            return query - 0.1 * gradients["query"], gradients["key"]

        return jax.lax.scan(step, arrays["query"], length=4)

    jitted = jax.jit(descend, compiler_options={"xla_gpu_graph_min_graph_size": 1})
    first = jax.tree.map(np.asarray, jitted(arrays))
    for _ in range(6):
        again = jax.tree.map(np.asarray, jitted(arrays))
        jax.tree.map(np.testing.assert_array_equal, again, first)
        # Lengths are read by the kernels, so a replay sees new ones.
        shorter = jitted(arrays | {"kv_lengths": jnp.ones_like(arrays["kv_lengths"])})
        assert not np.array_equal(np.asarray(shorter[1]), first[1])
