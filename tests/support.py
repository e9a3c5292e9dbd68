# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Attention problems for tests: built at random, run by the package, solved by the oracle."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_attn
from jax_attn._src.fused_qkv_rope_cache import primitive as fused_qkv
from jax_attn._src.split_kv_attention import primitive

INT_MAX = np.iinfo(np.int32).max

FLOATS = ("float32", "bfloat16", "float16")
QUANTIZED = ("int8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2")

# Error of the output, relative to the sum of |probability * value| over the keys of its row.
TOLERANCES = {
    # Sums of float32 products, in the logits and over the keys: some ulp (2**-24) each.
    "float32": 1e-5,
    # One rounding of the output (2**-9) and one of the probabilities, which matrix instructions
    # take in the dtype of the values (2**-9), with a factor of 2 for the sum of both.
    "bfloat16": 2.0**-7,
    # The same with 2**-12. Outputs below the normal range round to multiples of 2**-24.
    "float16": 2.0**-10,
}
# A logit is rounded to float32 a few times, which exp makes a relative error of probabilities.
PER_LOGIT = 4 * 2.0**-24
ABSOLUTE = {"float32": 1e-7, "bfloat16": 1e-7, "float16": 2.0**-24}

# The log-sum-exp is float32 whatever the dtype of the operands: their products are exact.
LSE_ABSOLUTE = 1e-5
LSE_RELATIVE = 1e-6

# Where tests run: the default backend, as lowering names it.
PLATFORM = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
_platforms = jax_attn.platforms()
IMPLEMENTATIONS = [
    pytest.param("xla", id="xla"),
    pytest.param(
        "native",
        id="native",
        marks=[]
        if PLATFORM in _platforms
        else [pytest.mark.skip(reason=f"this build of jax_attn has no kernels for {PLATFORM}")],
    ),
]

# The FFI target of split_kv_attention and paged_attention.
TARGET = "jax_attn_split_kv_attention"
VARIANTS = jax_attn.ffi.variants("cpu") if "cpu" in _platforms and PLATFORM == "cpu" else []

_ARRAYS = (
    *("query", "key", "value", "bias", "mask", "kv_lengths", "page_table", "layer"),
    *("alibi_slopes", "sinks", "k_scale", "v_scale"),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call of `split_kv_attention`, or of `paged_attention` if `layout` is given.

    Attributes:
      arrays: NumPy arrays by argument name; `key` and `value` are the pages of a cache.
      options: The static options.
      layout: Layout of the cache; None for dense keys and values.
    """

    arrays: dict[str, np.ndarray]
    options: dict[str, Any]
    layout: str | None = None

    def replace(self, **changes: Any) -> "Problem":
        """Returns the problem with some arguments changed, or removed by None."""
        arrays, options = dict(self.arrays), dict(self.options)
        layout = changes.pop("layout", self.layout)
        for name, value in changes.items():
            target = arrays if name in _ARRAYS else options
            target.pop(name, None)
            if value is not None:
                target[name] = value
        return Problem(arrays, options, layout)

    def __getattr__(self, name: str) -> Any:
        if name in _ARRAYS:
            return self.arrays.get(name)
        raise AttributeError(name)

    def run(self, implementation: str | None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the output and the lse."""
        arrays = {name: jnp.asarray(array) for name, array in self.arrays.items()}
        # The reference is many small operations, each of which eager JAX would compile.
        run = _compiled if implementation == "xla" else _call
        options = {"implementation": implementation, **self.options}
        out, lse = run(arrays, self.layout, tuple(sorted(options.items())))
        return np.asarray(out), np.asarray(lse)

    def solve(self) -> oracle.Attention:
        """Returns what the oracle says."""
        speed_only = ("num_splits", "split_size")
        options = {k: v for k, v in self.options.items() if k not in speed_only}
        return oracle.attention(**self.arrays, layout=self.layout, **options)

    def check(self, implementation: str | None) -> tuple[np.ndarray, np.ndarray]:
        """Asserts that a run agrees with the oracle; returns the output and the lse."""
        out, lse = self.run(implementation)
        try:
            assert_close(out, lse, self.solve(), self.query.dtype)
        except AssertionError as error:
            error.add_note(repr(self))
            raise
        return out, lse

    def seen(self) -> np.ndarray:
        """Which keys each query row sees, bool `[B, N, T, S]`."""
        batch, query_len, num_q_heads, _ = self.query.shape
        return oracle.visible_keys(
            batch,
            num_q_heads,
            query_len,
            oracle.Storage(self.key, None, self.page_table, self.layout, self.layer).kv_len,
            mask=self.mask,
            kv_lengths=self.kv_lengths,
            causal=self.options.get("causal"),
            sliding_window=self.options.get("sliding_window"),
        )

    def __repr__(self) -> str:
        shapes = {k: f"{v.dtype}{list(v.shape)}" for k, v in self.arrays.items()}
        return f"Problem({shapes}, {self.options}, layout={self.layout!r})"


def call(arrays: dict[str, Any], layout: str | None, **options: Any) -> Any:
    """Calls the operation that `arrays` are for."""
    arrays = dict(arrays)
    query, key, value = (arrays.pop(name) for name in ("query", "key", "value"))
    if layout is None:
        return jax_attn.split_kv_attention(query, key, value, **arrays, **options)
    scales = {name: arrays.pop(name, None) for name in ("k_scale", "v_scale")}
    cache = jax_attn.PagedKVCache(key, value, **scales, layout=layout)
    table, lengths = arrays.pop("page_table"), arrays.pop("kv_lengths")
    return jax_attn.paged_attention(query, cache, table, lengths, **arrays, **options)


def _call(arrays: dict[str, Any], layout: str | None, options: tuple) -> Any:
    return call(arrays, layout, return_lse=True, **dict(options))


_compiled = functools.partial(
    jax.jit,
    static_argnums=(1, 2),
    # A third of the time to compile; a test runs a program once.
    compiler_options={"xla_backend_optimization_level": 0},
)(_call)


def assert_close(out: np.ndarray, lse: np.ndarray, expected: oracle.Attention, dtype: Any) -> None:
    """Asserts dtypes, shapes and values; what is zero or infinite must be so exactly."""
    name = np.dtype(dtype).name
    assert out.dtype == dtype
    assert out.shape == expected.out.shape
    assert lse.dtype == np.float32
    assert lse.shape == expected.lse.shape
    assert_within(
        "lse",
        lse.astype(np.float64),
        expected.lse,
        LSE_ABSOLUTE + LSE_RELATIVE * np.abs(np.where(np.isinf(expected.lse), 0, expected.lse)),
    )
    # Nothing visible: the magnitude is 0, and so must be the output.
    relative = TOLERANCES[name] + PER_LOGIT * expected.largest_logit[..., None]
    tolerance = np.where(expected.magnitude > 0, ABSOLUTE[name] + relative * expected.magnitude, 0)
    assert_within("out", out.astype(np.float64), expected.out, tolerance)


def assert_within(
    what: str, actual: np.ndarray, expected: np.ndarray, tolerance: np.ndarray
) -> None:
    same = actual == expected
    with np.errstate(invalid="ignore"):  # inf - inf, where both are infinite
        error = np.abs(actual - expected)
        bad = ~(same | (error <= tolerance))
    if bad.any():
        worst = np.unravel_index(
            np.argmax(np.where(bad, error / (tolerance + 1e-30), -1)), bad.shape
        )
        nans = np.isnan(actual).sum()
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} values differ ({nans} are NaN); at "
            f"{tuple(map(int, worst))} got {actual[worst]}, expected {expected[worst]} "
            f"within {tolerance[worst]:.3g}."
        )


def dense(
    rng: np.random.Generator,
    *,
    batch: int = 2,
    query_len: int = 1,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    v_head_dim: int | None = None,
    kv_len: int = 48,
    dtype: str = "float32",
    cache_dtype: str | None = None,
    lengths: Any = None,
    bias: str | None = None,
    mask: str | None = None,
    alibi: bool = False,
    sinks: bool = False,
    k_scale: str | None = None,
    v_scale: str | None = None,
    **options: Any,
) -> Problem:
    """Builds a problem of standard normal queries, keys and values.

    Args:
      rng: Source of all numbers.
      batch: Sequences.
      query_len: Queries of each.
      num_q_heads: Heads of queries.
      num_kv_heads: Heads of keys and values.
      head_dim: Size of queries and keys.
      v_head_dim: Size of values, `head_dim` if None.
      kv_len: Keys of the buffer.
      dtype: Dtype of queries and bias.
      cache_dtype: Dtype of keys and values, `dtype` if None; quantised ones get a scale.
      lengths: `kv_lengths`.
      bias: Which dimensions of the bias are full, of "b", "n", "t"; None for no bias.
      mask: The same for the mask.
      alibi: Whether to give ALiBi slopes.
      sinks: Whether to give sinks.
      k_scale: "scalar", "head" or "token"; None for none.
      v_scale: The same for values.
      **options: Static options of the operation.
    """
    cache_dtype = cache_dtype or dtype
    if cache_dtype in QUANTIZED:
        k_scale, v_scale = k_scale or "scalar", v_scale or "scalar"
    keys = (batch, kv_len, num_kv_heads)
    rows = {"b": batch, "n": num_q_heads, "t": query_len}

    def row_shape(full: str) -> tuple[int, ...]:
        return (*(size if name in full else 1 for name, size in rows.items()), kv_len)

    arrays: dict[str, Any] = {
        "query": normal(rng, (batch, query_len, num_q_heads, head_dim), dtype)
    }
    for name, scale, size in (
        ("key", k_scale, head_dim),
        ("value", v_scale, head_dim if v_head_dim is None else v_head_dim),
    ):
        numbers = rng.standard_normal((*keys, size))
        if scale is not None:
            # Stored numbers of up to 100 or so use the range of every quantised format.
            shape = {"scalar": (), "head": keys[2:], "token": keys}[scale]
            factor = rng.uniform(0.5, 1.5, shape).astype(np.float32) / np.float32(32)
            numbers = numbers / (factor[..., None] if scale != "scalar" else factor)
            arrays[f"{name[0]}_scale"] = np.asarray(factor)
        if cache_dtype in QUANTIZED:
            limits = jnp.iinfo if cache_dtype == "int8" else jnp.finfo
            numbers = np.clip(numbers, limits(cache_dtype).min, limits(cache_dtype).max)
        if cache_dtype == "int8":
            numbers = np.rint(numbers)
        arrays[name] = numbers.astype(jnp.dtype(cache_dtype))
    if lengths is not None:
        arrays["kv_lengths"] = np.asarray(lengths, np.int32)
    if bias is not None:
        arrays["bias"] = normal(rng, row_shape(bias), dtype)
    if mask is not None:
        arrays["mask"] = rng.random(row_shape(mask)) < 0.7
    if alibi:
        arrays["alibi_slopes"] = rng.uniform(0, 0.5, num_q_heads).astype(np.float32)
    if sinks:
        arrays["sinks"] = normal(rng, (num_q_heads,), dtype)
    return Problem(arrays, options)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Returns standard normal numbers."""
    return rng.standard_normal(shape).astype(jnp.dtype(dtype))


def nothing(array: np.ndarray) -> Any:
    """The value of `array`'s dtype that does most harm where it must not be read."""
    return 127 if array.dtype == np.int8 else np.nan


def poison(problem: Problem) -> Problem:
    """Overwrites keys, values, scales and bias of a dense problem wherever nothing sees them."""
    seen = problem.seen()
    batch, heads, query_len, kv_len = seen.shape
    num_kv_heads = problem.key.shape[2]
    by_group = seen.reshape(batch, num_kv_heads, heads // num_kv_heads, query_len, kv_len)
    read = by_group.any((2, 3)).swapaxes(1, 2)  # [B, S, K]
    changes = {}
    for name in ("key", "value"):
        array = problem.arrays[name]
        changes[name] = np.where(read[..., None], array, np.array(nothing(array), array.dtype))
        scale = problem.arrays.get(f"{name[0]}_scale")
        if scale is not None and scale.ndim == 3:
            changes[f"{name[0]}_scale"] = np.where(read, scale, np.float32(np.nan))
    if problem.bias is not None:
        for axis, size in enumerate(problem.bias.shape[:3]):
            if size == 1:
                seen = seen.any(axis, keepdims=True)
        changes["bias"] = np.where(seen, problem.bias, np.array(np.nan, problem.bias.dtype))
    return problem.replace(**changes)


def paged(
    problem: Problem,
    rng: np.random.Generator,
    page_size: int,
    layout: str = "NHD",
    num_layers: int | None = None,
    spare_pages: int = 2,
    scale_per_layer: bool = False,
) -> Problem:
    """Moves the keys and values of a dense problem to shuffled pages of a cache.

    Whatever no page of a context holds is poison: unused pages, other layers, their scales. Table
    entries past the context or wholly before the window are rubbish.
    """
    batch, kv_len, num_kv_heads, _ = problem.key.shape
    assert kv_len % page_size == 0
    max_pages = kv_len // page_size
    num_pages = batch * max_pages + spare_pages
    lengths = [oracle.context_length(b, kv_len, problem.kv_lengths) for b in range(batch)]
    ids = rng.permutation(num_pages)[: batch * max_pages].reshape(batch, max_pages)
    layer = None if num_layers is None else int(rng.integers(num_layers))

    used = np.zeros((batch, max_pages), bool)
    for b, length in enumerate(lengths):
        first = 0
        if (window := problem.options.get("sliding_window")) is not None:
            causal = problem.options.get("causal")
            position = oracle.query_position(0, problem.query.shape[1], length, causal)
            first = max(0, position - window + 1) // page_size
        used[b, first : -(-length // page_size)] = True

    def store(array: np.ndarray) -> np.ndarray:
        """Pages of `[B, S, K, ...]`."""
        tail = array.shape[3:]
        shape = (num_pages, page_size, num_kv_heads, *tail)
        pages = np.full(shape, nothing(array), array.dtype)
        pages[ids[used]] = array.reshape(batch, max_pages, *shape[1:])[used]
        return of_layer(pages if layout == "NHD" else pages.swapaxes(1, 2))

    def of_layer(array: np.ndarray) -> np.ndarray:
        if num_layers is None:
            return array
        layers = np.full((num_layers, *array.shape), nothing(array), array.dtype)
        layers[layer] = array
        return layers

    rubbish = rng.choice([-1, INT_MAX, -INT_MAX - 1, num_pages, 1 << 20], used.shape)
    changes = {
        "key": store(problem.key),
        "value": store(problem.value),
        "page_table": np.where(used, ids, rubbish).astype(np.int32),
        "kv_lengths": np.asarray(
            lengths if problem.kv_lengths is None else problem.kv_lengths, np.int32
        ),
        "layer": None if layer is None else np.asarray(layer, np.int32),
    }
    for name in ("k_scale", "v_scale"):
        scale = problem.arrays.get(name)
        if scale is not None and scale.ndim == 3:
            changes[name] = store(scale)
        elif scale is not None and scale.ndim == 1 and scale_per_layer:
            changes[name] = of_layer(scale)
    return problem.replace(**changes, layout=layout)


def vector_variant():
    """Returns the CPU variant of operations without kernels that have matrix instructions."""
    variant = jax_attn.ffi.variants("cpu")[0]
    return "avx512" if variant == "amx" else variant


def use_variant(variant, patch):
    """Makes all calls use a variant of the kernel."""
    for module, name in ((primitive, "attend"), (fused_qkv, "compute")):
        patch.setattr(
            module, name, functools.partial(_call_variant, getattr(module, name), variant)
        )


def _call_variant(function, variant, operands, options):
    return function(operands, dataclasses.replace(options, variant=variant))


def struct(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
