# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""What split-KV and paged attention promise, for every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import support

import jax_attn

ALL = {"bias": "bnt", "mask": "nt", "alibi": True, "sinks": True, "logits_soft_cap": 5.0}
FEATURES = {
    "plain": {},
    "lengths": {"lengths": [48, 19]},
    "bottom_right": {"causal": "bottom_right", "lengths": [48, 19]},
    "top_left": {"causal": "top_left", "lengths": [48, 1]},
    "window": {"sliding_window": 9, "lengths": [48, 19]},
    "causal window": {"sliding_window": 1, "causal": "bottom_right", "lengths": [48, 19]},
    "top_left window": {"sliding_window": 2, "causal": "top_left"},
    "soft cap": {"logits_soft_cap": 0.7},
    "alibi": {"alibi": True, "lengths": [48, 19]},
    "alibi top_left": {"alibi": True, "causal": "top_left"},
    "bias": {"bias": "bnt"},
    "mask": {"mask": "bnt"},
    "sinks": {"sinks": True, "lengths": [48, 2]},
    "lse without sinks": {"sinks": True, "lengths": [48, 0], "lse_includes_sinks": False},
    "scales": {"k_scale": "token", "v_scale": "head"},
    "all": {**ALL, "lengths": [48, 19], "causal": "bottom_right", "sliding_window": 30},
}


def random(*key):
    """Numbers that depend on nothing but the test's own parameters."""
    return np.random.default_rng(list("/".join(map(str, key)).encode()))


@pytest.mark.parametrize("feature", FEATURES)
def test_feature(implementation, feature):
    rng = random(feature)
    dtypes, layouts = support.FLOATS, ("NHD", "HND")
    if implementation == "xla":  # compiling dominates, and the fuzz test samples the rest
        dtypes, layouts = dtypes[:1], layouts[: feature == "all"]
    for dtype in dtypes:
        problem = support.dense(rng, query_len=3, dtype=dtype, **FEATURES[feature])
        problem.check(implementation)
        for layout in layouts:
            support.paged(problem, rng, 16, layout).check(implementation)


@pytest.mark.parametrize("cache_dtype", [*support.FLOATS, *support.QUANTIZED])
@pytest.mark.parametrize("dtype", support.FLOATS)
def test_dtype(implementation, dtype, cache_dtype):
    rng = random(dtype, cache_dtype)
    problem = support.dense(rng, dtype=dtype, cache_dtype=cache_dtype, lengths=[48, 31])
    if dtype == "bfloat16":
        problem = support.paged(problem, rng, 16)
    problem.check(implementation)


@pytest.mark.parametrize("cache_dtype", support.QUANTIZED)
def test_every_stored_byte_means_its_number(implementation, cache_dtype):
    # One-hot values and a single visible key show each of the 256 patterns as an output.
    stored = np.arange(256, dtype=np.uint8).view(jnp.dtype(cache_dtype))
    numbers = stored.astype(np.float32)
    stored = stored[np.isfinite(numbers)]
    key = np.zeros((len(stored), 1, 1, 8), stored.dtype)
    problem = support.Problem(
        {
            "query": np.zeros((len(stored), 1, 1, 8), np.float32),
            "key": key,
            "value": np.broadcast_to(stored[:, None, None, None], key.shape),
        },
        {},
    )
    out, _ = problem.run(implementation)
    np.testing.assert_array_equal(out[:, 0, 0, 0], stored.astype(np.float32))


@pytest.mark.parametrize("scale", ["scalar", "head", "token"])
@pytest.mark.parametrize("layout", ["dense", "NHD", "HND"])
def test_scale_shape(implementation, layout, scale):
    rng = random(scale, layout)
    problem = support.dense(rng, cache_dtype="int8", k_scale=scale, v_scale=scale, lengths=[48, 9])
    if layout != "dense":
        problem = support.paged(problem, rng, 8, layout, num_layers=2 if layout == "HND" else None)
    problem.check(implementation)


def test_scale_of_each_layer(implementation):
    rng = random("layer scale")
    problem = support.dense(rng, cache_dtype="int8", k_scale="head", v_scale="head")
    problem = support.paged(problem, rng, 16, num_layers=3, scale_per_layer=True)
    assert problem.k_scale.shape == problem.v_scale.shape == (3, 2)
    problem.check(implementation)


def test_agrees_with_jax_nn(implementation):
    rng = random("jax.nn")
    problem = support.dense(rng, query_len=48, num_q_heads=4, lengths=[48, 40], bias="nt")
    x = problem.arrays
    # On GPUs XLA's products of float32 are rounded to TF32 unless told otherwise.
    with jax.default_matmul_precision("highest"):
        expected, lse = jax.jit(
            functools.partial(
                jax.nn.dot_product_attention,
                scale=0.2,
                is_causal=True,
                local_window_size=(12, 0),
                return_residual=True,
            )
        )(
            x["query"],
            x["key"],
            x["value"],
            x["bias"],
            key_value_seq_lengths=x["kv_lengths"],
        )
    problem = problem.replace(scale=0.2, causal="top_left", sliding_window=13)
    out, our_lse = problem.run(implementation)
    # Where queries follow the context by more than the window, no key is left: there jax.nn
    # returns a mean of values.
    some = np.isfinite(our_lse)
    assert some.sum() == some.size  # keys 39 and before are in the window of query 47
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(our_lse, lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (5, 1), (16, 2), (16, 1)], ids=str)
def test_group_of_query_heads(implementation, heads):
    num_q_heads, num_kv_heads = heads
    rng = random(heads)
    support.dense(
        rng,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        query_len=2,
        dtype="bfloat16",
        lengths=[48, 7],
        causal="bottom_right",
    ).check(implementation)


HEAD_DIMS = [8, 64, 72, 80, 96, 128, 192, 256, 512, (192, 128), (64, 80), (128, 512)]


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
def test_head_dim(implementation, dims):
    head_dim, v_head_dim = (dims, dims) if isinstance(dims, int) else dims
    rng = random(dims)
    problem = support.dense(
        rng, head_dim=head_dim, v_head_dim=v_head_dim, dtype="bfloat16", lengths=[48, 33]
    )
    if head_dim % 3:
        problem = support.paged(problem, rng, 16, "HND")
    problem.check(implementation)


@pytest.mark.parametrize("head_dim, v_head_dim", [(7, 3), (8, 0), (0, 8), (520, 8)])
def test_unusual_head_dim(implementation, head_dim, v_head_dim):
    # With no dimensions at all, every logit is 0 and the output is the mean of the values.
    problem = support.dense(
        random(head_dim), head_dim=head_dim, v_head_dim=v_head_dim, lengths=[48, 5]
    )
    if implementation == "native":
        message = r"split_kv_attention: .*head_dim \d+ is not a multiple of 8 up to 512"
        with pytest.raises(NotImplementedError, match=message):
            problem.run("native")
        implementation = None  # which falls back
    problem.check(implementation)


@pytest.mark.parametrize("query_len", [1, 2, 5, 17, 64])
@pytest.mark.parametrize("causal", ["bottom_right", "top_left"])
def test_query_len(implementation, query_len, causal):
    # Contexts shorter and longer than the queries, which leaves rows without keys.
    support.poison(
        support.dense(
            random(query_len, causal),
            batch=4,
            query_len=query_len,
            num_kv_heads=1,
            lengths=[33, query_len, max(query_len - 1, 0), 1],
            kv_len=67,
            causal=causal,
            sliding_window=21,
        )
    ).check(implementation)


def test_prime_sizes(implementation):
    problem = support.dense(
        random("primes"),
        batch=3,
        query_len=7,
        num_q_heads=22,
        num_kv_heads=11,
        head_dim=8 * 13,
        v_head_dim=8 * 11,
        kv_len=101,
        lengths=[101, 97, 2],
        causal="bottom_right",
    )
    problem.check(implementation)


@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize("causal", [None, "bottom_right"])
def test_length_around_a_page(implementation, page_size, causal):
    rng = random(page_size, causal)
    edges = [0, 1, page_size - 1, page_size, page_size + 1, 8 * page_size]
    problem = support.dense(
        rng, batch=6, query_len=2, kv_len=8 * page_size, lengths=edges, causal=causal
    )
    problem = support.paged(problem, rng, page_size, "NHD" if causal else "HND")
    out, lse = problem.check(implementation)
    assert not out[0].any()
    assert np.all(lse[0] == -np.inf)


def test_straggler_does_not_disturb_its_batch(implementation):
    lengths = [30, 3000, 0, 7]
    rng = random("straggler")
    problem = support.dense(rng, batch=4, num_kv_heads=1, kv_len=3072, lengths=lengths)
    problem.check(implementation)
    support.paged(problem, rng, 64).check(implementation)


def test_lengths_are_clipped_to_the_buffer(implementation):
    rng = random("clip")
    wild = [-3, 49, support.INT_MAX, -support.INT_MAX - 1]
    problem = support.dense(rng, batch=4, query_len=2, lengths=wild, causal="bottom_right")
    result = problem.check(implementation)
    clipped = problem.replace(kv_lengths=np.array([0, 48, 48, 0], np.int32))
    assert_same(result, clipped.run(implementation))
    problem = support.paged(clipped, rng, 16).replace(kv_lengths=np.array(wild, np.int32))
    problem.check(implementation)


def test_page_ids_outside_the_pool_are_clipped(implementation):
    rng = random("page ids")
    problem = support.paged(support.dense(rng), rng, 16)
    # Reading stray pages is the caller's error, but it reads pages.
    problem = problem.replace(key=np.nan_to_num(problem.key), value=np.nan_to_num(problem.value))
    wild = problem.page_table.copy()
    wild[0, 1], wild[1, 0] = support.INT_MAX, -7
    problem.replace(page_table=wild).check(implementation)


@pytest.mark.parametrize(
    "options",
    [
        {"lengths": [20, 3]},
        {"lengths": [20, 64], "sliding_window": 4, "causal": "bottom_right"},
        {"lengths": [60, 33], "sliding_window": 5},
        {"causal": "top_left"},
        {"mask": "bn"},
        {"mask": "bnt", "bias": "bnt", "sliding_window": 20, "lengths": [50, 40]},
    ],
    ids=str,
)
def test_what_is_not_seen_cannot_change_the_result(implementation, options):
    rng = random(options)
    for cache_dtype in ("float32", "float8_e4m3fn"):
        scale = "token" if cache_dtype == "float8_e4m3fn" else None
        problem = support.dense(
            rng,
            query_len=2,
            kv_len=64,
            cache_dtype=cache_dtype,
            k_scale=scale,
            v_scale=scale,
            **options,
        )
        poisoned = support.poison(problem)
        assert np.isnan(poisoned.key.astype(np.float32)).any()
        poisoned.check(implementation)
        layouts = ("HND",) if implementation == "xla" else ("NHD", "HND")
        for layout in layouts:
            support.paged(poisoned, rng, 8, layout, num_layers=2).check(implementation)


def test_nan_that_is_seen_is_not_hidden(implementation):
    problem = support.dense(random("nan"), lengths=[48, 20])
    key = problem.key.copy()
    key[1, 19, 1] = np.nan
    out, lse = problem.replace(key=key).run(implementation)
    touched = np.zeros(lse.shape, bool)
    touched[1, :, 2:] = True  # the query heads of kv head 1
    np.testing.assert_array_equal(np.isnan(lse), touched)
    np.testing.assert_array_equal(np.isnan(out).all(-1), touched)
    np.testing.assert_array_equal(np.isnan(out).any(-1), touched)


def test_pages_may_be_shared(implementation):
    rng = random("shared")
    problem = support.dense(rng, batch=3, kv_len=64, lengths=[40, 64, 5])
    problem = support.paged(problem, rng, 16)
    table = problem.page_table.copy()
    table[0, :2] = table[2, 0] = table[1, 0]
    problem.replace(page_table=table).check(implementation)


@pytest.mark.parametrize("zero", ["batch", "query_len", "kv_len", "num_q_heads"])
def test_zero_sizes(implementation, zero):
    sizes = {"batch": 2, "query_len": 3, "kv_len": 32, zero: 0}
    lengths = [sizes["kv_len"], 0][: sizes["batch"]]
    rng = random(zero)
    problem = support.dense(rng, lengths=lengths, sinks=True, **sizes)
    problem.check(implementation)
    if zero in ("batch", "kv_len"):
        spare_pages = 1 if zero == "batch" else 0
        support.paged(problem, rng, 16, spare_pages=spare_pages).check(implementation)


@pytest.mark.parametrize("sink", [np.inf, -np.inf, 80.0])
@pytest.mark.parametrize("lse_includes_sinks", [True, False])
def test_extreme_sinks(implementation, sink, lse_includes_sinks):
    problem = support.dense(
        random("sinks"), sinks=True, lengths=[48, 0], lse_includes_sinks=lse_includes_sinks
    )
    sinks = np.array([sink, 0.5, -1.0, sink], np.float32)
    problem.replace(sinks=sinks).check(implementation)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_sinks_count_once(implementation, num_splits):
    # One sink of logit 0 beside n keys of logit 0 is one more key of value 0.
    ones = np.ones((1, 40, 1, 8), np.float32)
    out, lse = support.Problem(
        {"query": 0 * ones[:, :1], "key": ones, "value": ones, "sinks": np.zeros(1, np.float32)},
        {"num_splits": num_splits},
    ).run(implementation)
    np.testing.assert_allclose(out, 40 / 41, rtol=1e-6)
    np.testing.assert_allclose(lse, np.log(41), rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.5, 7])
def test_scale(implementation, scale):
    problem = support.dense(random("scale"), head_dim=8, lengths=[48, 20], scale=scale)
    # Small integers, for which even large logits are exact.
    small = {n: np.round(problem.arrays[n]) for n in ("query", "key")}
    problem.replace(**small).check(implementation)


def test_logits_far_outside_the_range_of_exp(implementation):
    problem = support.dense(random("range"), query_len=4, dtype="bfloat16", scale=1.0)
    for shift in (1000.0, -1000.0):
        bias = np.full((1, 1, 1, 48), shift, np.float32)
        small = {n: np.round(problem.arrays[n].astype("f4")).astype("f4") for n in ("query", "key")}
        case = problem.replace(**small, value=problem.value.astype("f4"), bias=bias)
        out, lse = case.check(implementation)
        assert np.all(np.abs(lse) > 900)
        assert np.abs(out).max() > 0.1


@pytest.mark.parametrize("sinks", [False, True])
def test_bias_of_minus_infinity_hides_keys(implementation, sinks):
    problem = support.dense(random("-inf"), query_len=3, bias="bnt", sinks=sinks)
    bias = problem.bias.copy()
    bias[0, 1] = -np.inf  # rows without any key
    bias[1, :, :, 7:] = -np.inf
    problem.replace(bias=bias).check(implementation)


def test_rows_without_keys_are_zero_within_a_batch_of_others(implementation):
    problem = support.dense(
        random("empty"), batch=3, query_len=6, lengths=[0, 4, 48], causal="bottom_right"
    )
    out, lse = support.poison(problem).check(implementation)
    empty = ~problem.seen().any(-1).transpose(0, 2, 1)
    assert empty.sum() == 4 * (6 + 2)
    assert not out[empty].any()
    assert not np.signbit(out[empty]).any()
    assert np.all(lse[empty] == -np.inf)


def test_first_and_last_layer(implementation):
    rng = random("layers")
    dense = support.dense(rng, dtype="bfloat16", lengths=[48, 9])
    problem = support.paged(dense, rng, 16, "HND", num_layers=3)
    key, value = problem.key[problem.layer], problem.value[problem.layer]
    expected = problem.replace(key=key, value=value, layer=None).run(implementation)
    for layer in (0, 2):
        pages = {}
        for name, one in (("key", key), ("value", value)):
            pages[name] = np.full_like(problem.arrays[name], np.nan)
            pages[name][layer] = one
        moved = problem.replace(**pages, layer=np.asarray(layer, np.int32))
        assert_same(moved.run(implementation), expected)
        arrays = {k: jnp.asarray(v) for k, v in moved.arrays.items()} | {"layer": layer}
        assert_same(
            support.call(arrays, "HND", return_lse=True, implementation=implementation), expected
        )


def test_repeated_calls_give_the_same_bits(implementation):
    rng = random("bits")
    problem = support.dense(
        rng, batch=3, query_len=2, dtype="bfloat16", kv_len=512, lengths=[512, 100, 3], num_splits=4
    )
    for case in (problem, support.paged(problem, rng, 32)):
        first = case.run(implementation)
        for _ in range(5):
            assert_same(case.run(implementation), first)


def test_any_number_of_splits_gives_the_same_result(implementation):
    rng = random("num_splits")
    problem = support.dense(
        rng, batch=3, query_len=2, kv_len=96, lengths=[96, 50, 0], sinks=True, causal="bottom_right"
    )
    problem = support.paged(problem, rng, 16)
    few = (1, 2) if implementation == "xla" else (1, 2, 3, 4, 5, 6, 7, 100)
    for num_splits in few:
        problem.replace(num_splits=num_splits).check(implementation)
    for split_size in few[1:]:
        problem.replace(split_size=split_size).check(implementation)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_split_size_makes_a_sequence_independent_of_its_batch(implementation, dtype):
    rng = random("batch", dtype)
    lengths = [256, 100, 3, 0]
    problem = support.dense(rng, batch=4, kv_len=256, dtype=dtype, lengths=lengths, split_size=64)
    out, lse = problem.run(implementation)
    for b in (0, 1, 3):
        others = np.arange(4) != b
        changed = {name: x.copy() for name, x in problem.arrays.items()}
        for name in ("query", "key", "value"):
            changed[name][others] *= 2
        changed["kv_lengths"][others] = [0, 256, 77]
        new_out, new_lse = problem.replace(**changed).run(implementation)
        assert_same((new_out[b], new_lse[b]), (out[b], lse[b]))
        if implementation != "xla":  # whose matrix products depend on the shape of the batch
            alone = problem.replace(**{name: x[b : b + 1] for name, x in problem.arrays.items()})
            assert_same(alone.run(implementation), (out[b : b + 1], lse[b : b + 1]))


def test_paged_equals_dense(implementation):
    rng = random("paged")
    problem = support.dense(
        rng, query_len=2, lengths=[48, 30], causal="bottom_right", split_size=16
    )
    dense = problem.run(implementation)
    for layout in ("NHD", "HND"):
        out, lse = support.paged(problem, rng, 16, layout).run(implementation)
        np.testing.assert_allclose(out, dense[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(lse, dense[1], rtol=1e-6, atol=1e-6)


def test_parts_of_a_context_merge_to_the_whole(implementation):
    rng = random("parts")
    lengths = np.array([64, 40, 16, 3, 0], np.int32)
    whole = support.dense(
        rng, batch=5, query_len=2, kv_len=64, lengths=lengths, sinks=True, dtype="bfloat16"
    )
    parts = []
    for start in range(0, 64, 16):
        part = {n: whole.arrays[n][:, start : start + 16] for n in ("key", "value")}
        # Float32 queries keep the parts exact enough to test the merge itself.
        part |= {"kv_lengths": np.clip(lengths - start, 0, 16), "sinks": None}
        part["query"] = whole.query.astype(np.float32)
        parts.append(whole.replace(**part).run(implementation))
    outs, lses = (list(map(jnp.asarray, each)) for each in zip(*parts, strict=True))
    whole = whole.replace(query=whole.query.astype(np.float32))
    out, lse = jax_attn.merge_attention(outs, lses, sinks=jnp.asarray(whole.sinks))
    support.assert_close(np.asarray(out), np.asarray(lse), whole.solve(), np.float32)
    out, lse = jax_attn.merge_attention(jnp.stack(outs), jnp.stack(lses))
    expected = whole.replace(sinks=None).solve()
    support.assert_close(np.asarray(out), np.asarray(lse), expected, np.float32)


def test_lse_without_sinks_leaves_the_output_alone(implementation):
    problem = support.dense(random("lse"), sinks=True, lengths=[48, 0])
    out, lse = problem.run(implementation)
    out_too, lse_of_keys = problem.replace(lse_includes_sinks=False).run(implementation)
    np.testing.assert_array_equal(out_too, out)
    np.testing.assert_array_equal(lse_of_keys[1], -np.inf)
    with_sinks = np.logaddexp(lse_of_keys.astype(np.float64), problem.sinks)
    np.testing.assert_allclose(lse, with_sinks, rtol=1e-6)


def test_result_without_lse_is_the_output(implementation):
    problem = support.dense(random("return_lse"))
    arrays = {k: jnp.asarray(v) for k, v in problem.arrays.items()}
    call = jax.jit(lambda x: support.call(x, None, implementation=implementation))
    np.testing.assert_array_equal(call(arrays), problem.run(implementation)[0])


def test_numpy_arguments(implementation):
    rng = random("numpy")
    dense = support.dense(rng, sinks=True, mask="b", alibi=True)
    for problem in (dense, support.paged(dense, rng, 16, num_layers=2)):
        out = support.call(problem.arrays, problem.layout, implementation=implementation)
        assert isinstance(out, jax.Array)
        np.testing.assert_allclose(out, problem.solve().out, rtol=1e-4, atol=1e-5)


def test_default_implementation_agrees():
    rng = random("default")
    problem = support.dense(rng, **ALL, query_len=2, lengths=[48, 19])
    problem.check(None)
    support.paged(problem, rng, 16).check(None)


@pytest.mark.parametrize("setting", [jax.enable_x64, jax.debug_nans])
def test_settings_of_jax_do_not_matter(implementation, setting):
    # With rows that see nothing, and no NaN among the inputs.
    problem = support.dense(
        random("settings"), **ALL, query_len=3, lengths=[48, 1], causal="bottom_right"
    )
    with setting(True):
        problem.check(implementation)


EFFECTS = {
    "query": lambda x: x + x.dtype.type(1),
    "key": lambda x: x[..., ::-1],
    "value": lambda x: x + x.dtype.type(1),
    "bias": lambda x: x[..., ::-1],
    "mask": np.logical_not,
    "kv_lengths": lambda x: x - 1,
    "page_table": lambda x: x[:, ::-1],
    "layer": lambda x: 1 - x,
    "alibi_slopes": lambda x: x + x.dtype.type(0.3),
    "sinks": lambda x: x + x.dtype.type(1),
    "k_scale": lambda x: x * x.dtype.type(2),
    "v_scale": lambda x: x * x.dtype.type(2),
    "scale": lambda _: 0.5,
    "causal": lambda _: "top_left",
    "sliding_window": lambda x: x + 1,
    "logits_soft_cap": lambda x: x + 1,
    "lse_includes_sinks": lambda _: False,
}


@pytest.mark.parametrize("layout", [None, "NHD"])
def test_every_argument_has_an_effect(implementation, layout):
    problem = support.dense(
        random("effect"),
        query_len=2,
        **ALL,
        causal="bottom_right",
        sliding_window=20,
        k_scale="head",
        v_scale="head",
        kv_len=32,
        lengths=[30, 29],
    )
    problem = problem.replace(scale=0.2, lse_includes_sinks=True)
    if layout:
        problem = support.paged(
            problem, random("effect"), 8, layout, 2, spare_pages=0, scale_per_layer=True
        )
        # All pages and both layers hold numbers, so that no change is hidden by NaN.
        for name in ("key", "value"):
            pages = problem.arrays[name]
            filled = np.random.default_rng(0).standard_normal(pages.shape).astype(pages.dtype)
            problem = problem.replace(**{name: np.where(np.isnan(pages), filled, pages)})
        table = np.arange(8, dtype=np.int32).reshape(2, 4)
        scales = {}
        for name in ("k_scale", "v_scale"):
            of_layer = problem.arrays[name][problem.layer]
            scales[name] = np.stack([of_layer, 2 * of_layer])
        problem = problem.replace(page_table=table, **scales)
    arguments = {**problem.arrays, **problem.options}
    assert arguments.keys() == EFFECTS.keys() - ({"page_table", "layer"} if layout is None else ())
    out, lse = problem.run(implementation)
    for name, change in EFFECTS.items():
        if name not in arguments:
            continue
        changed = problem.replace(**{name: change(arguments[name])}).run(implementation)
        assert not (np.array_equal(changed[0], out) and np.array_equal(changed[1], lse)), name


@pytest.mark.parametrize("causal", ["bottom_right", "top_left", None])
def test_oracle_positions_by_hand(causal):
    # Two queries, contexts of 1 and 3 keys in a buffer of 4, a window of 2 keys.
    seen = oracle.visible_keys(
        2, 1, 2, 4, kv_lengths=np.array([1, 3]), causal=causal, sliding_window=2
    )
    expected = {
        "bottom_right": ["....", "x...", "xx..", ".xx."],
        "top_left": ["x...", "x...", "x...", "xx.."],
        None: ["x...", "x...", "xxx.", ".xx."],
    }[causal]
    drawn = ["".join(".x"[int(key)] for key in row) for row in seen.reshape(4, 4)]
    assert drawn == expected


def assert_same(actual, expected):
    """The same bits, also of zeros, infinities and NaN."""
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert a.dtype == e.dtype
        assert a.tobytes() == e.tobytes()
