# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Small-sequence attention as JAX sees it: result types, gradients, sharding, choice of kernel."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn._src import primitives, registration, sharding
from jax_attn._src.description import Description
from jax_attn._src.implementation import refuse_fallback
from jax_attn._src.small_seq_attention import reference
from jax_attn._src.small_seq_attention.problem import (
    GRADIENT_OPERAND_NAMES,
    OPERAND_NAMES,
    Operands,
    Options,
)

NAME = "small_seq_attention"
GRADIENT_NAME = "small_seq_attention_backward"
TARGET = f"jax_attn_{NAME}"
GRADIENT_TARGET = f"jax_attn_{GRADIENT_NAME}"

_CAUSAL_CODE = {None: 0, "bottom_right": 1, "top_left": 2}

_QUERY = {"dense": "batch query_len", "packed": "query_token"}
_KEY = {"dense": "batch kv_len", "packed": "kv_token"}


def attend(
    operands: Operands, options: Options, *, with_lse: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Computes checked operands: the output, and the lse if it is wanted.

    Without it the backward pass has no cotangent of the lse to read.
    """
    present = primitives.varying_alike(operands.present())
    if with_lse:
        return _attend_with_lse(options, present)
    return _attend(options, present), None


# ---- Gradients


def _attend_on_mesh(options: Options, operands: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    return operation.sharded(operands, options)


def _attend_on_mesh_without_lse(options: Options, operands: dict[str, jax.Array]) -> jax.Array:
    return operation.sharded(operands, options)[0]


_attend: Any = jax.custom_vjp(_attend_on_mesh_without_lse, nondiff_argnums=(0,))
_attend_with_lse: Any = jax.custom_vjp(_attend_on_mesh, nondiff_argnums=(0,))


def _forward(options: Options, operands: dict[str, jax.Array]) -> Any:
    out, lse = _attend_with_lse(options, operands)  # may be differentiated once more
    return (out, lse), (operands, lse)


def _forward_without_lse(options: Options, operands: dict[str, jax.Array]) -> Any:
    (out, _), residuals = _forward(options, operands)
    return out, residuals


def _backward(options: Options, residuals: Any, cotangents: Any) -> Any:
    operands, lse = residuals
    dout, dlse = cotangents
    found = _gradients(options, operands | {"lse": lse, "dout": dout, "dlse": dlse})
    return ({name: found.get(name) for name in operands},)


def _backward_without_lse(options: Options, residuals: Any, dout: Any) -> Any:
    operands, lse = residuals
    found = _gradients(options, operands | {"lse": lse, "dout": dout})
    return ({name: found.get(name) for name in operands},)


_attend.defvjp(_forward_without_lse, _backward_without_lse)
_attend_with_lse.defvjp(_forward, _backward)


def _gradients_on_mesh(options: Options, operands: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The cotangents of the operands that are floating point, by name."""
    names = _gradient_names(operands)
    found = dict(zip(names, gradient_operation.sharded(operands, options), strict=True))
    if "bias" in found:
        bias = operands["bias"]
        shared = tuple(i for i, size in enumerate(bias.shape) if size == 1)
        found["bias"] = jnp.sum(found["bias"], axis=shared, keepdims=True).astype(bias.dtype)
    _, axes = primitives.explicit_axes()
    if axes:
        specs = {name: jax.typeof(operands[name]).sharding.spec for name in found}
        found = {name: jax.sharding.reshard(a, specs[name]) for name, a in found.items()}
    return found


_gradients: Any = jax.custom_vjp(_gradients_on_mesh, nondiff_argnums=(0,))


def _gradients_forward(options: Options, operands: dict[str, jax.Array]) -> Any:
    return _gradients(options, operands), operands


def _gradients_backward(options: Options, operands: Any, cotangents: Any) -> Any:
    """The second derivative, through the reference.

    The gradient is taken as a function of everything but the lse, which follows from the others.
    """
    floats = [n for n, a in operands.items() if jnp.issubdtype(a.dtype, jnp.inexact) and n != "lse"]

    def local(operands: Any, cotangents: Any) -> dict[str, jax.Array]:
        def gradients(floats: dict[str, jax.Array]) -> dict[str, jax.Array]:
            x = operands | floats
            problem = Operands(**{n: x[n] for n in OPERAND_NAMES if n in x})
            found = reference.gradients(problem, options, x["dout"], x.get("dlse"))
            if "bias" in found:
                shape, dtype = x["bias"].shape, x["bias"].dtype
                shared = tuple(i for i, size in enumerate(shape) if size == 1)
                found["bias"] = jnp.sum(found["bias"], axis=shared, keepdims=True).astype(dtype)
            return found

        _, pull = jax.vjp(gradients, {name: operands[name] for name in floats})
        return pull(cotangents)[0]

    second: Any = local
    _, axes = primitives.explicit_axes()
    if axes:
        specs = {name: jax.typeof(operands[name]).sharding.spec for name in floats}
        second = jax.sharding.auto_axes(local, axes=tuple(axes), out_sharding=specs)
    found = second(operands, cotangents)
    lse = operands["lse"]
    return ({n: found.get(n, jnp.zeros_like(lse) if n == "lse" else None) for n in operands},)


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _gradient_names(operands: Mapping[str, Any]) -> tuple[str, ...]:
    return ("query", "key", "value", *(("bias",) if "bias" in operands else ()))


# ---- Types and meanings


def _batch_dims(avals: Mapping[str, Any], options: Options) -> tuple[int, ...]:
    """The dimensions of vmap."""
    shapes = [a.shape[: len(a.shape) - options.rank(name)] for name, a in avals.items()]
    return np.broadcast_shapes(*shapes)


def _results(avals: Mapping[str, Any], options: Options) -> Sequence[Any]:
    query = avals["query"]
    rows = query.shape[len(query.shape) - options.rank("query") : -1]
    shape = (*_batch_dims(avals, options), *rows)
    return (
        primitives.result_like(query, (*shape, avals["value"].shape[-1]), query.dtype),
        primitives.result_like(query, shape, jnp.float32),
    )


def _gradient_results(avals: Mapping[str, Any], options: Options) -> Sequence[Any]:
    batch, query = _batch_dims(avals, options), avals["query"]
    results = []
    for name in ("query", "key", "value"):
        aval = avals[name]
        shape = (*batch, *aval.shape[len(aval.shape) - options.rank(name) :])
        results.append(primitives.result_like(query, shape, aval.dtype))
    if "bias" in avals:
        shape = (*batch, *_logits_shape(avals, options))
        results.append(primitives.result_like(query, shape, jnp.float32))
    return results


def _logits_shape(avals: Mapping[str, Any], options: Options) -> tuple[Any, ...]:
    """[B, N, T, S]."""
    num_q_heads = avals["query"].shape[-2]
    if options.packed:
        num_sequences = avals["query_cu_seqlens"].shape[-1] - 1
        return (num_sequences, num_q_heads, options.max_q_len, options.max_kv_len)
    return (avals["query"].shape[-4], num_q_heads, avals["query"].shape[-3], avals["key"].shape[-3])


def _reference(operands: Mapping[str, jax.Array], options: Options) -> Sequence[jax.Array]:
    return reference.reference(Operands(**operands), options)


def _gradient_reference(operands: Mapping[str, jax.Array], options: Options) -> Sequence[jax.Array]:
    problem = Operands(**{name: operands[name] for name in OPERAND_NAMES if name in operands})
    found = reference.gradients(problem, options, operands["dout"], operands.get("dlse"))
    return tuple(found[name] for name in _gradient_names(operands))


# ---- Sharding


def _arrays(options: Options) -> dict[str, str]:
    """Names of the dimensions of every operand and result."""
    layout = "packed" if options.packed else "dense"
    sequence = "sequence" if options.packed else "batch"
    rows, keys = _QUERY[layout], _KEY[layout]
    named = {
        "query": f"{rows} (kv_head group) head_dim",
        "key": f"{keys} kv_head head_dim",
        "value": f"{keys} kv_head v_head_dim",
        "bias": f"{sequence} (kv_head group) query_step kv_step",
        "query_lengths": sequence,
        "kv_lengths": sequence,
        "query_cu_seqlens": "bound",
        "kv_cu_seqlens": "bound",
        "out": f"{rows} (kv_head group) v_head_dim",
        "lse": f"{rows} (kv_head group)",
    }
    return named | {f"d{name}": text for name, text in named.items()}


def _sharding_call(
    shapes: Mapping[str, tuple[int, ...]],
    results: Mapping[str, tuple[int, ...]],
    options: Options,
    spec: sharding.ShardingSpec,
) -> sharding.Call:
    kv_heads, heads = shapes["key"][-2], shapes["query"][-2]
    first_name, first = next(iter(results.items()))
    rank = options.rank("query" if first_name in ("out", "dquery") else first_name)
    return sharding.Call(
        spec=spec,
        operands=shapes,
        results=results,
        num_batch_dims=len(first) - rank,
        sizes={"kv_head": kv_heads, "group": heads // kv_heads},
    )


def spec(num_kv_heads: int, options: Options) -> sharding.ShardingSpec:
    """Declares the dimensions of a call."""
    # With one kv head any split of the query heads is a problem with one kv head.
    heads = "kv_head" if num_kv_heads > 1 else "group"
    return sharding.ShardingSpec(_arrays(options), ("batch", heads))


def _call(
    shapes: Mapping[str, tuple[int, ...]], results: Sequence[tuple[int, ...]], options: Options
) -> sharding.Call:
    named: dict[str, tuple[int, ...]] = dict(zip(("out", "lse"), results, strict=True))
    return _sharding_call(shapes, named, options, spec(shapes["key"][-2], options))


def _gradient_call(
    shapes: Mapping[str, tuple[int, ...]], results: Sequence[tuple[int, ...]], options: Options
) -> sharding.Call:
    # A kv head's gradient is a sum over all its query heads.
    names = [f"d{name}" for name in _gradient_names(shapes)]
    named = dict(zip(names, results, strict=True))
    own = sharding.ShardingSpec(_arrays(options), ("batch", "kv_head"))
    return _sharding_call(shapes, named, options, own)


# ---- Kernels


def _kernel(
    platform: str, avals: Mapping[str, Any], results: Sequence[Any], options: Options
) -> Any:
    """What a platform's kernel is called with: target, extra results, attributes; or a reason."""
    if options.implementation == "xla":
        return 'implementation="xla" was asked for'
    module = registration.native_module(platform)
    if module is None:
        return registration.missing(platform)
    shapes = [a.shape for a in (*avals.values(), *results)]
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return "a dimension is symbolic, and a call of a kernel needs its size"
    query, value = avals["query"], avals["value"]
    _, _, query_len, kv_len = _logits_shape(avals, options)
    reason = module.refusal(
        NAME,
        query_dtype=query.dtype.name,
        cache_dtype=value.dtype.name,
        head_dim=query.shape[-1],
        v_head_dim=value.shape[-1],
        num_batch_dims=len(_batch_dims(avals, options)) + 1,
        query_len=query_len,
        kv_len=kv_len,
    )
    if reason:
        return reason
    attributes = {
        "operands": ",".join(list(avals)[3:]),
        "variant": options.variant,
        "scale": np.float32(options.scale),
        "causal": np.int32(_CAUSAL_CODE[options.causal]),
        "logits_soft_cap": np.float32(options.logits_soft_cap or 0),
        "max_q_len": np.int64(options.max_q_len or 0),
        "max_kv_len": np.int64(options.max_kv_len or 0),
    }
    return TARGET if "dout" not in avals else GRADIENT_TARGET, [], attributes


def describe(
    platform: str, avals: Mapping[str, Any], results: Sequence[Any], options: Options
) -> Description:
    """Describes a call on a platform; the variant only where it has kernels."""
    arrays = (*avals.values(), *results)
    return Description(
        op=GRADIENT_NAME if "dout" in avals else NAME,
        bytes_moved=sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays),
        variant=_variant(platform, avals, options),
        num_splits=None,
        caches=(),
    )


def _variant(platform: str, avals: Mapping[str, Any], options: Options) -> str | None:
    """Which of a platform's kernels a call would run; those of GPUs depend on its shapes."""
    module = registration.native_module(platform)
    query, key, value = avals["query"], avals["key"], avals["value"]
    _, _, query_len, kv_len = _logits_shape(avals, options)
    sizes = {
        "max_q_len": query_len,
        "max_kv_len": kv_len,
        "num_q_heads": query.shape[-2],
        "num_kv_heads": key.shape[-2],
        "head_dim": query.shape[-1],
        "v_head_dim": value.shape[-1],
    }
    known = all(isinstance(size, int) for size in sizes.values())
    if not known or module is None or not hasattr(module, "small_seq_variant"):
        return registration.variant_of(platform, options.variant)
    return module.small_seq_variant(
        **sizes,
        dtype=query.dtype.name,
        packed="query_cu_seqlens" in avals,
        variant=options.variant,
        backward="dout" in avals,
    )


def _refuse_fallback(options: Options, platform: str, reason: str) -> None:
    refuse_fallback(NAME, options.implementation, platform, reason)


operation = primitives.Operation(
    NAME,
    operands=OPERAND_NAMES,
    results=_results,
    reference=_reference,
    call=_call,
    kernels={p: functools.partial(_kernel, p) for p in registration.VENDORS},
    refuse_fallback=_refuse_fallback,
)

gradient_operation = primitives.Operation(
    GRADIENT_NAME,
    operands=GRADIENT_OPERAND_NAMES,
    results=_gradient_results,
    reference=_gradient_reference,
    call=_gradient_call,
    kernels={p: functools.partial(_kernel, p) for p in registration.VENDORS},
    refuse_fallback=_refuse_fallback,
)
