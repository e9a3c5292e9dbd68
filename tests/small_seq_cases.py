# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Problems of `small_seq_attention`: built at random, run by the package, solved by the oracle."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import small_seq_oracle
import support

import jax_attn
from jax_attn._src.small_seq_attention import primitive

TARGET, GRADIENT_TARGET = primitive.TARGET, primitive.GRADIENT_TARGET

INTS = ("query_lengths", "kv_lengths", "query_cu_seqlens", "kv_cu_seqlens")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call, and the cotangents that its gradients are taken with.

    Attributes:
      arrays: NumPy arrays by argument name.
      options: The static options.
      cotangents: "dout" and "dlse".
    """

    arrays: dict[str, np.ndarray]
    options: dict[str, Any]
    cotangents: dict[str, np.ndarray]

    def run(self, implementation: str | None) -> dict[str, np.ndarray]:
        """Returns "out", "lse" and gradients by the name of the operand."""
        arrays, cotangents = (
            {n: jnp.asarray(a) for n, a in of.items()} for of in (self.arrays, self.cotangents)
        )
        options = {"implementation": implementation, **self.options}
        found = _compiled(arrays, cotangents, tuple(sorted(options.items(), key=str)), _variant)
        return {name: np.asarray(array) for name, array in found.items()}

    def solve(self) -> small_seq_oracle.Solution:
        """Returns what the oracle says."""
        return small_seq_oracle.solve(**self.arrays, **self.options, **self.cotangents)

    def check(self, implementation: str | None) -> dict[str, np.ndarray]:
        """Asserts that results and gradients agree with the oracle; returns them."""
        found, expected = self.run(implementation), self.solve()
        try:
            assert_close(found, expected, self.arrays["query"].dtype)
        except AssertionError as error:
            error.add_note(repr(self))
            raise
        return found

    def replace(self, **changes: Any) -> "Problem":
        """Returns the problem with some arrays or options changed, or removed by None."""
        arrays, options = dict(self.arrays), dict(self.options)
        for name, value in changes.items():
            target = arrays if name in (*_FLOATS, *INTS) else options
            target.pop(name, None)
            if value is not None:
                target[name] = value
        return Problem(arrays, options, self.cotangents)

    def __repr__(self) -> str:
        shapes = {k: f"{v.dtype}{list(v.shape)}" for k, v in self.arrays.items()}
        ints = {k: v.tolist() for k, v in self.arrays.items() if k in INTS}
        return f"Problem({shapes}, {ints}, {self.options})"


_variant = ""  # instruction set of the kernels, part of what programs are cached by

_FLOATS = ("query", "key", "value", "bias")


def call(arrays: dict[str, Any], **options: Any) -> Any:
    """Calls the operation on operands by name."""
    return jax_attn.small_seq_attention(**arrays, **options)


def _results_and_gradients(
    arrays: dict[str, jax.Array], cotangents: dict[str, jax.Array], options: tuple, variant: str
) -> dict[str, jax.Array]:
    del variant  # see use_variant
    floats = {name: arrays[name] for name in _FLOATS if name in arrays}

    def attend(floats: dict[str, jax.Array]) -> Any:
        return call(arrays | floats, return_lse=True, **dict(options))

    (out, lse), pull = jax.vjp(attend, floats)
    (gradients,) = pull((cotangents["dout"], cotangents["dlse"]))
    return {"out": out, "lse": lse, **gradients}


_compiled = functools.partial(
    jax.jit, static_argnums=(2, 3), compiler_options={"xla_backend_optimization_level": 0}
)(_results_and_gradients)


def assert_close(
    found: dict[str, np.ndarray], expected: small_seq_oracle.Solution, dtype: Any
) -> None:
    """Asserts dtypes, shapes and values; what is zero or infinite must be so exactly."""
    assert found.keys() == expected.values.keys()
    for name, value in expected.values.items():
        actual, magnitude = found[name], expected.magnitudes[name]
        assert actual.shape == value.shape, name
        kind = "float32" if name == "lse" else np.dtype(dtype).name
        assert actual.dtype == jnp.dtype(kind), name
        relative = support.TOLERANCES[kind] + support.PER_LOGIT * expected.largest_logit
        bound = np.where(magnitude > 0, support.ABSOLUTE[kind] + relative * magnitude, 0)
        if name == "lse":
            finite = np.where(np.isinf(value), 0, np.abs(value))
            bound = support.LSE_ABSOLUTE + support.LSE_RELATIVE * finite
        support.assert_within(name, actual.astype(np.float64), value, bound)


def dense(
    rng: np.random.Generator,
    *,
    batch: int = 3,
    query_len: int = 2,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    v_head_dim: int | None = None,
    kv_len: int = 6,
    dtype: str = "float32",
    bias: str | None = None,
    bias_dtype: str | None = None,
    query_lengths: Any = None,
    kv_lengths: Any = None,
    **options: Any,
) -> Problem:
    """Builds a dense problem of standard normal numbers; `bias` names its full dimensions."""
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    rows, keys = (batch, query_len, num_q_heads), (batch, kv_len, num_kv_heads)
    arrays = {
        "query": support.normal(rng, (*rows, head_dim), dtype),
        "key": support.normal(rng, (*keys, head_dim), dtype),
        "value": support.normal(rng, (*keys, v_head_dim), dtype),
    }
    if bias is not None:
        full = {"b": batch, "n": num_q_heads, "t": query_len}
        shape = (*(size if name in bias else 1 for name, size in full.items()), kv_len)
        arrays["bias"] = support.normal(rng, shape, bias_dtype or dtype)
    for name, lengths in (("query_lengths", query_lengths), ("kv_lengths", kv_lengths)):
        if lengths is not None:
            arrays[name] = np.asarray(lengths, np.int32)
    cotangents = {
        "dout": support.normal(rng, (*rows, v_head_dim), dtype),
        "dlse": support.normal(rng, rows, "float32"),
    }
    return Problem(arrays, options, cotangents)


def packed(
    rng: np.random.Generator,
    *,
    query_bounds: Any,
    kv_bounds: Any,
    query_tokens: int,
    kv_tokens: int,
    max_q_len: int,
    max_kv_len: int,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    bias: str | None = None,
    **sizes: Any,
) -> Problem:
    """Builds a packed problem: bounds are `cu_seqlens`, and there may be more tokens than used."""
    lengths = {name: sizes.pop(name, None) for name in ("query_lengths", "kv_lengths")}
    heads = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads}
    one = dense(rng, batch=1, query_len=query_tokens, kv_len=kv_tokens, **heads, **sizes)
    arrays = {name: array[0] for name, array in one.arrays.items()}
    if bias is not None:
        full = {"b": len(query_bounds) - 1, "n": num_q_heads, "t": max_q_len}
        shape = (*(size if name in bias else 1 for name, size in full.items()), max_kv_len)
        arrays["bias"] = support.normal(rng, shape, arrays["query"].dtype)
    for name, ints in {
        **lengths,
        "query_cu_seqlens": query_bounds,
        "kv_cu_seqlens": kv_bounds,
    }.items():
        if ints is not None:
            arrays[name] = np.asarray(ints, np.int32)
    cotangents = {name: array[0] for name, array in one.cotangents.items()}
    options = {**one.options, "max_q_len": max_q_len, "max_kv_len": max_kv_len}
    return Problem(arrays, options, cotangents)


def poison(problem: Problem) -> Problem:
    """Puts NaN wherever it cannot change a result: padding, holes, and keys that nothing sees."""
    solution = problem.solve()
    arrays, cotangents = dict(problem.arrays), dict(problem.cotangents)

    def spoil(array: np.ndarray, used: np.ndarray) -> np.ndarray:
        return np.where(used, array, np.array(np.nan, array.dtype))

    used = solution.magnitudes["lse"].any(-1, keepdims=True)
    arrays["query"] = spoil(arrays["query"], used[..., None])
    seen = solution.magnitudes["value"].any((-1, -2), keepdims=True)
    arrays |= {name: spoil(arrays[name], seen) for name in ("key", "value")}
    if "bias" in arrays:
        arrays["bias"] = spoil(arrays["bias"], solution.magnitudes["bias"] > 0)
    cotangents["dlse"] = spoil(cotangents["dlse"], used)
    cotangents["dout"] = spoil(cotangents["dout"], used[..., None])
    return Problem(arrays, problem.options, cotangents)


def random_problem(seed: int) -> Problem:
    """A problem from the whole space of shapes, dtypes, layouts and options, with poison."""
    rng = np.random.default_rng(seed)

    def one_of(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    def sometimes(*choices: Any) -> Any:
        return one_of(*choices) if rng.random() < 0.3 else None

    heads, kv_heads = one_of((1, 1), (4, 2), (5, 1), (3, 3), (6, 3), (16, 16), (10, 2))
    batch = one_of(0, 1, 2, 3, 7) if rng.random() < 0.7 else one_of(13, 31)
    most_queries, most_keys = one_of(1, 1, 2, 3, 5, 16, 32), one_of(1, 2, 4, 6, 7, 12, 16, 33, 64)
    sizes = {
        "num_q_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": one_of(8, 16, 24, 64, 72, 128),
        "v_head_dim": sometimes(8, 40, 64),
        "dtype": one_of(*support.FLOATS),
        "bias": sometimes("", "b", "n", "t", "bnt", "nt"),
        "scale": sometimes(0.3, -0.2, 0.0),
        "causal": one_of(None, None, "bottom_right", "top_left"),
        "logits_soft_cap": sometimes(0.5, 30.0),
    }
    sizes = {name: value for name, value in sizes.items() if value is not None}
    if rng.random() < 0.5:
        lengths = {}
        for name, most in (("query_lengths", most_queries), ("kv_lengths", most_keys)):
            if rng.random() < 0.6:
                lengths[name] = rng.integers(-1, most + 3, batch)
        shape = {"batch": batch, "query_len": most_queries, "kv_len": most_keys}
        return poison(dense(rng, **shape, **lengths, **sizes))
    sides = {}
    for side, most in (("query", most_queries), ("kv", most_keys)):
        lengths = rng.integers(0, most + 1, batch)
        room = lengths + rng.integers(0, 4, batch) * (rng.random(batch) < 0.3)  # holes
        bounds = np.concatenate([[0], np.cumsum(room)]) + rng.integers(0, 3)
        sides[f"{side}_tokens"] = int(bounds[-1] + rng.integers(0, 5))
        if rng.random() < 0.1 and batch:  # mistakes have a defined result as well
            bounds[rng.integers(batch + 1)] += one_of(-20, 20)
        sides[f"{side}_bounds"] = bounds
        if rng.random() < 0.5:
            sides[f"{side}_lengths"] = lengths
    # Lengths above the hints are clamped to them.
    hints = {"max_q_len": most_queries, "max_kv_len": most_keys}
    return poison(packed(rng, **sides, **hints, **sizes))


def use_variant(variant: str, patch: Any) -> None:
    """Makes all calls use a variant of the kernel."""
    attend = primitive.attend

    def attend_with(operands: Any, options: Any, **kwargs: Any) -> Any:
        return attend(operands, dataclasses.replace(options, variant=variant), **kwargs)

    patch.setattr(primitive, "attend", attend_with)
    patch.setattr(sys.modules[__name__], "_variant", variant)
