# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Split-KV attention as JAX sees it: result types, gradients, sharding and choice of kernel."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn._src import primitives, registration
from jax_attn._src.description import Description
from jax_attn._src.implementation import refuse_fallback
from jax_attn._src.split_kv_attention import backward, declaration, reference, shards
from jax_attn._src.split_kv_attention.problem import (
    OPERAND_NAMES,
    GradientOptions,
    Operands,
    Options,
)

NAME = "split_kv_attention"
TARGET = "jax_attn_split_kv_attention"

_CAUSAL_CODE = {None: 0, "bottom_right": 1, "top_left": 2}
_LAYOUT_CODE = {None: 0, "NHD": 1, "HND": 2}

# What the gradients are computed from besides the operands.
_RESULTS = ("out", "lse", "d_out", "d_lse")


def attend(operands: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """Computes checked operands: the output and the lse."""
    return _attend(options, primitives.varying_alike(operands.present()))


def attend_to_shards(
    operands: Operands, options: Options, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """The same inside `shard_map`, where the contexts are sharded over `axes`."""

    def bind(shard: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return attend(Operands(**shard), options)

    sharded = "kv_len" if options.page_layout is None else "page_index"
    return shards.attend_and_merge(bind, operands.present(), options, {sharded: axes})


def _attend_on_mesh(options: Options, operands: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    return operation.sharded(operands, options)


_attend: Any = jax.custom_vjp(_attend_on_mesh, nondiff_argnums=(0,))


def _attend_forward(options: Options, operands: dict[str, jax.Array]) -> Any:
    out, lse = _attend(options, operands)
    return (out, lse), (operands, out, lse)


def _attend_backward(options: Options, residuals: Any, cotangents: Any) -> Any:
    operands, out, lse = residuals
    has_gradient = {name: jnp.issubdtype(x.dtype, jnp.inexact) for name, x in operands.items()}
    wanted = tuple(name for name in OPERAND_NAMES if has_gradient.get(name))
    results = {"out": out, "lse": lse, "d_out": cotangents[0], "d_lse": cotangents[1]}
    found = gradient.sharded(operands | results, GradientOptions(options, wanted))
    gradients = {
        name: primitives.shard_like(operands[name], x)
        for name, x in zip(wanted, found, strict=True)
    }
    return ({name: gradients.get(name) for name in operands},)


_attend.defvjp(_attend_forward, _attend_backward)


def _results(avals: Mapping[str, Any], options: Options) -> Sequence[Any]:
    query = avals["query"]
    b, t, n, _ = query.shape[-4:]
    rows = (*primitives.batch_shape(avals, options), b, t, n)
    return (
        primitives.result_like(query, (*rows, avals["value"].shape[-1]), query.dtype),
        primitives.result_like(query, rows, jnp.float32),
    )


def _gradient_results(avals: Mapping[str, Any], options: GradientOptions) -> Sequence[Any]:
    batch = primitives.batch_shape(avals, options)
    wanted = [(avals[name], options.rank(name)) for name in options.wanted]
    return [
        primitives.result_like(avals["query"], (*batch, *a.shape[a.ndim - rank :]), a.dtype)
        for a, rank in wanted
    ]


def _reference(operands: Mapping[str, jax.Array], options: Options) -> Sequence[jax.Array]:
    return reference.reference(Operands(**operands), options)


def _gradient_reference(
    operands: Mapping[str, jax.Array], options: GradientOptions
) -> Sequence[jax.Array]:
    attention = dict(operands)
    results = [attention.pop(name) for name in _RESULTS]
    found = backward.gradients(Operands(**attention), options.attention, *results)
    return [found[name] for name in options.wanted]


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
        return "a dimension is symbolic, and the kernel's workspace needs its size"
    query, key = avals["query"], avals["key"]
    out_shape = results[0].shape
    reason = module.refusal(
        NAME,
        query_dtype=query.dtype.name,
        cache_dtype=key.dtype.name,
        head_dim=query.shape[-1],
        v_head_dim=out_shape[-1],
        num_batch_dims=len(out_shape) - 3,
    )
    if reason:
        return reason
    plan = kernel_plan(platform, module, avals, out_shape, options)
    attributes = {
        "operands": ",".join(list(avals)[3:]),
        "variant": options.variant,
        "scale": np.float32(options.scale),
        "causal": np.int32(_CAUSAL_CODE[options.causal]),
        "sliding_window": np.int64(options.sliding_window or 0),
        "logits_soft_cap": np.float32(options.logits_soft_cap or 0),
        "num_splits": np.int64(options.num_splits or 0),
        "split_size": np.int64(options.split_size or 0),
        "lse_includes_sinks": bool(options.lse_includes_sinks),
        "page_layout": np.int32(_LAYOUT_CODE[options.page_layout]),
        "k_scale_rank": np.int32(options.k_scale_rank),
        "v_scale_rank": np.int32(options.v_scale_rank),
    }
    return TARGET, [((plan["workspace_size"],), np.dtype(np.float32))], attributes


def kernel_plan(
    platform: str,
    module: Any,
    avals: Mapping[str, Any],
    out_shape: Sequence[int],
    options: Options,
) -> dict[str, Any]:
    """Asks the native module how it cuts a problem of these shapes."""
    key = avals["key"].shape
    heads_first = options.page_layout == "HND"
    tokens, kv_heads = key[-3:-1] if not heads_first else key[-3:-1][::-1]
    kv_len = tokens
    if options.page_layout is not None:
        kv_len = avals["page_table"].shape[-1] * tokens
    return module.split_kv_plan(
        batch=math.prod(out_shape[:-3]),
        query_len=out_shape[-3],
        num_q_heads=out_shape[-2],
        num_kv_heads=kv_heads,
        head_dim=key[-1],
        v_head_dim=out_shape[-1],
        kv_len=kv_len,
        heads_first=heads_first,
        num_splits=options.num_splits or 0,
        split_size=options.split_size or 0,
        **({} if platform == "cpu" else _features(avals, out_shape, options)),
    )


def _features(
    avals: Mapping[str, Any], out_shape: Sequence[int], options: Options
) -> dict[str, Any]:
    """What a GPU plan depends on besides shapes: it chooses the kernel, and sees no lengths."""
    token_axis = -2 if options.page_layout == "HND" else -3
    page_size = avals["key"].shape[token_axis] if options.page_layout is not None else 0
    per_token = 3 + options.has_layers
    token_scales = {
        name: name in avals and options.rank(name) == per_token for name in ("k_scale", "v_scale")
    }
    extras = ("bias", "mask", "alibi_slopes")
    return {
        "query_dtype": avals["query"].dtype.name,
        "cache_dtype": avals["key"].dtype.name,
        "variant": options.variant,
        "causal": _CAUSAL_CODE[options.causal],
        "sliding_window": options.sliding_window or 0,
        "num_batch_dims": len(out_shape) - 3,
        "page_size": page_size,
        "has_lengths": "kv_lengths" in avals,
        "has_query_offset": "query_offset" in avals,
        "has_extras": any(name in avals for name in extras)
        or any(token_scales.values())
        or options.logits_soft_cap is not None,
        "has_scales": "k_scale" in avals or "v_scale" in avals,
        "has_v_token_scale": token_scales["v_scale"],
    }


def describe(
    platform: str, avals: Mapping[str, Any], results: Sequence[Any], options: Options
) -> Description:
    """Describes a call on a platform; variant and splits only where it has kernels."""
    query, key, value = (avals[name] for name in ("query", "key", "value"))
    kv_len = key.shape[-3]
    context_sizes = [math.prod(a.shape) * a.dtype.itemsize for a in (key, value)]
    if options.page_layout is not None:
        # What the page tables list, rather than the pool that sequences share.
        token_axis = -2 if options.page_layout == "HND" else -3
        kv_len = avals["page_table"].shape[-1] * key.shape[token_axis]
        heads = key.shape[-3 if options.page_layout == "HND" else -2]
        tokens = math.prod(query.shape[:-3]) * kv_len
        context_sizes = [tokens * heads * a.shape[-1] * a.dtype.itemsize for a in (key, value)]
    rows = sum(math.prod(a.shape) * a.dtype.itemsize for a in (query, *results))
    module = registration.native_module(platform)
    is_static = all(isinstance(size, int) for a in avals.values() for size in a.shape)
    plan = {}
    if module and is_static:
        plan = kernel_plan(platform, module, avals, results[0].shape, options)
    variant = None
    if module:
        variant = plan.get("variant") or options.variant or module.variants()[0]
    return Description(
        op=_public_name(options),
        bytes_moved=sum(context_sizes) + rows,
        variant=variant,
        num_splits=plan.get("num_splits"),
        caches=(key, value),
    )


def _public_name(options: Options) -> str:
    return "paged_attention" if options.page_layout is not None else NAME


def _refuse_fallback(options: Options, platform: str, reason: str) -> None:
    refuse_fallback(_public_name(options), options.implementation, platform, reason)


operation = primitives.Operation(
    NAME,
    operands=OPERAND_NAMES,
    results=_results,
    reference=_reference,
    call=declaration.call,
    kernels={p: functools.partial(_kernel, p) for p in registration.VENDORS},
    refuse_fallback=_refuse_fallback,
    on_shards=shards.attend,
)

gradient = primitives.Operation(
    f"{NAME}_gradient",
    operands=(*OPERAND_NAMES, *_RESULTS),
    results=_gradient_results,
    reference=_gradient_reference,
    call=declaration.gradient_call,
    kernels={},
    refuse_fallback=lambda *_: None,
    on_shards=shards.gradients,
)
