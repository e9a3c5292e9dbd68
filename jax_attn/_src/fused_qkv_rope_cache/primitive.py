# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The fused QKV pass as JAX sees it: result types, gradients, sharding and choice of kernel."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_attn._src import primitives, registration, sharding
from jax_attn._src.description import Description
from jax_attn._src.fused_qkv_rope_cache import reference
from jax_attn._src.fused_qkv_rope_cache.problem import OPERAND_NAMES, Operands, Options
from jax_attn._src.implementation import refuse_fallback

NAME = "fused_qkv_rope_cache"
TARGET = "jax_attn_fused_qkv_rope_cache"

_GATE_CODE = {None: 0, "interleaved": 1, "blocked": 2}
_LAYOUT_CODE = {"NHD": 1, "HND": 2}
_SCOPE_CODE = {"head": 1, "all_heads": 2}

_QUERIES = "token (kv_head group) head_dim"
_ARRAYS = {
    "qkv": "token column",  # a part of the columns is not a part of the heads
    "slot_mapping": "token",
    "layer": "",
    "offsets": "token",
    "cos": "position table_column",
    "sin": "position table_column",
    "q_weight": "q_weight_dim",
    "k_weight": "k_weight_dim",
    "query": _QUERIES,
    "gate": _QUERIES,
    "key": "token kv_head head_dim",
    "value": "token kv_head v_head_dim",
}
_PAGES = {
    "NHD": "layer_index page slot kv_head",
    "HND": "layer_index page kv_head slot",
}


def compute(operands: Operands, options: Options) -> dict[str, jax.Array]:
    """Computes checked operands: the results by name."""
    results = _compute(options, primitives.varying_alike(operands.present()))
    return dict(zip(options.result_names, results, strict=True))


def _compute_on_mesh(options: Options, operands: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    return operation.sharded(operands, options)


_compute: Any = jax.custom_vjp(_compute_on_mesh, nondiff_argnums=(0,))


def _forward(options: Options, operands: dict[str, jax.Array]) -> Any:
    # The pages are no residuals: they could not be updated in place.
    saved = {name: x for name, x in operands.items() if name not in ("k_pages", "v_pages")}
    return _compute(options, operands), saved


def _backward(options: Options, saved: dict[str, jax.Array], cotangents: Any) -> Any:
    cotangents = dict(zip(options.result_names, cotangents, strict=True))
    gradients: Any = functools.partial(_gradients, options)
    _, axes = primitives.explicit_axes()
    if axes:
        like = saved | {name: cotangents[name] for name in ("k_pages", "v_pages")}
        specs = {
            name: jax.typeof(x).sharding.spec
            for name, x in like.items()
            if jnp.issubdtype(x.dtype, jnp.inexact)
        }
        gradients = jax.sharding.auto_axes(gradients, axes=tuple(axes), out_sharding=specs)
    found = gradients(saved, cotangents)
    return ({name: found.get(name) for name in (*saved, "k_pages", "v_pages")},)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(
    options: Options, saved: dict[str, jax.Array], cotangents: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Gradients of the floating-point operands.

    The results are linear in the pages, so their gradients do not depend on what the pages hold.
    """
    differentiable = {n: x for n, x in saved.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    fixed = {name: x for name, x in saved.items() if name not in differentiable}
    for name in ("k_pages", "v_pages"):
        cotangent = cotangents[name]
        if cotangent.dtype == jax.dtypes.float0:  # of integers
            fixed[name] = jnp.zeros(cotangent.shape, jnp.int8)
        else:
            differentiable[name] = jnp.zeros_like(cotangent)
    wanted = [n for n in options.result_names if cotangents[n].dtype != jax.dtypes.float0]

    def results(differentiable: dict[str, jax.Array]) -> list[jax.Array]:
        found = _reference(fixed | differentiable, options)
        named = dict(zip(options.result_names, found, strict=True))
        return [named[name] for name in wanted]

    _, pull_back = jax.vjp(results, differentiable)
    return pull_back([cotangents[name] for name in wanted])[0]


_compute.defvjp(_forward, _backward)


def _reference(operands: Mapping[str, jax.Array], options: Options) -> Sequence[jax.Array]:
    results = reference.reference(Operands(**operands), options)
    return [results[name] for name in options.result_names]


def _results(avals: Mapping[str, Any], options: Options) -> Sequence[Any]:
    qkv, k_pages = avals["qkv"], avals["k_pages"]
    batch = primitives.batch_shape(avals, options)
    tokens, n, h = qkv.shape[-2], options.num_q_heads, k_pages.shape[-1]
    k = k_pages.shape[-2 if options.page_layout == "NHD" else -3]
    shapes = {
        "query": (tokens, n, h),
        "gate": (tokens, n, h),
        "key": (tokens, k, h),
        "value": (tokens, k, avals["v_pages"].shape[-1]),
    }

    def result(name: str) -> Any:
        if name in shapes:
            return primitives.result_like(qkv, (*batch, *shapes[name]), qkv.dtype)
        updated = avals[name]
        core = updated.shape[updated.ndim - options.rank(name) :]
        return primitives.result_like(updated, (*batch, *core), updated.dtype)

    return [result(name) for name in options.result_names]


def _aliases(options: Options) -> dict[str, int]:
    updated = ("k_pages", "v_pages", "k_scale", "v_scale")
    return {name: i for i, name in enumerate(options.result_names) if name in updated}


def _on_shards(
    bind: Callable[..., Any],
    shards: Mapping[str, jax.Array],
    options: Options,
    call: sharding.Call,
    plan: Mapping[str, sharding.Axes],
) -> Sequence[jax.Array]:
    """Takes the columns of the heads of a device out of qkv, and the slots of its pages."""
    del call
    operands = dict(shards)
    if "page" in plan:
        operands["slot_mapping"] = _own_slots(operands, options, plan["page"])
    count = sharding.num_shards(plan, "kv_head")
    if count == 1:
        return bind(operands)
    k_pages, v_pages = operands["k_pages"], operands["v_pages"]  # shards already
    h = k_pages.shape[-1]
    k = k_pages.shape[-2 if options.page_layout == "NHD" else -3]
    n, index = options.num_q_heads // count, lax.axis_index(plan["kv_head"])
    query_sizes = {None: [h], "interleaved": [2 * h], "blocked": [h, h]}[options.gate]
    columns, begin = [], 0
    for size in (*(n * size for size in query_sizes), k * h, k * v_pages.shape[-1]):
        own = begin + index * size
        columns.append(lax.dynamic_slice_in_dim(operands["qkv"], own, size, axis=-1))
        begin += size * count
    operands["qkv"] = jnp.concatenate(columns, axis=-1)
    return bind(operands, dataclasses.replace(options, num_q_heads=n))


def _own_slots(
    operands: Mapping[str, jax.Array], options: Options, axes: sharding.Axes
) -> jax.Array:
    """Counts slots from the first page of a device; those on other devices become -1."""
    k_pages, slots = operands["k_pages"], operands["slot_mapping"]
    num_pages = k_pages.shape[-4]
    page_size = k_pages.shape[-3 if options.page_layout == "NHD" else -2]
    # By page, since the first slot of a device may not fit in the dtype of the slots.
    page = slots // page_size - lax.axis_index(axes) * num_pages
    return jnp.where((page >= 0) & (page < num_pages), page * page_size + slots % page_size, -1)


def spec(options: Options) -> sharding.ShardingSpec:
    """Declares the dimensions of a call."""
    pages = _PAGES[options.page_layout].removeprefix("" if options.has_layers else "layer_index ")
    arrays = dict(_ARRAYS) | {"k_pages": f"{pages} head_dim", "v_pages": f"{pages} v_head_dim"}
    arrays["positions"] = "token" if options.mrope_sections is None else "position_axis token"
    for name in ("k_scale", "v_scale"):
        is_per_token = options.rank(name) == len(pages.split())
        per_head = ["layer_index", "kv_head"][2 - options.rank(name) :]
        arrays[name] = pages if is_per_token else " ".join(per_head)
    normalizes_across = options.epsilon is not None and options.norm_scope == "all_heads"
    return sharding.ShardingSpec(arrays, ("page",) if normalizes_across else ("page", "kv_head"))


def _call(
    shapes: Mapping[str, tuple[int, ...]], results: Sequence[tuple[int, ...]], options: Options
) -> sharding.Call:
    kv_heads = shapes["k_pages"][-2 if options.page_layout == "NHD" else -3]
    return sharding.Call(
        spec=spec(options),
        operands=shapes,
        results=dict(zip(options.result_names, results, strict=True)),
        num_batch_dims=len(results[0]) - 3,
        sizes={"kv_head": kv_heads, "group": options.num_q_heads // kv_heads},
    )


def _kernel(
    platform: str, avals: Mapping[str, Any], results: Sequence[Any], options: Options
) -> Any:
    """What a platform's kernel is called with: target, extra results, attributes; or a reason."""
    if options.implementation == "xla":
        return 'implementation="xla" was asked for'
    module = registration.native_module(platform)
    if module is None:
        return registration.missing(platform)
    qkv, k_pages, v_pages = (avals[name] for name in ("qkv", "k_pages", "v_pages"))
    reason = module.refusal(
        NAME,
        query_dtype=qkv.dtype.name,
        cache_dtype=k_pages.dtype.name,
        head_dim=k_pages.shape[-1],
        v_head_dim=v_pages.shape[-1],
        num_batch_dims=len(results[0].shape) - 2,
    )
    if reason:
        return reason
    temporal, height, width = options.mrope_sections or (0, 0, 0)
    attributes = {
        "operands": ",".join(list(avals)[4:]),
        "variant": options.variant,
        "gate": np.int32(_GATE_CODE[options.gate]),
        "page_layout": np.int32(_LAYOUT_CODE[options.page_layout]),
        "rotary_dim": np.int64(options.rotary_dim or 0),
        "interleaved": bool(options.interleaved),
        "nope_first": bool(options.nope_first),
        "full_width_table": options.table_width == "full",
        "mrope_interleaved": bool(options.mrope_interleaved),
        "mrope_temporal": np.int64(temporal),
        "mrope_height": np.int64(height),
        "mrope_width": np.int64(width),
        "norm_scope": np.int32(0 if options.epsilon is None else _SCOPE_CODE[options.norm_scope]),
        "normalize_v": bool(options.normalize_v),
        "epsilon": np.float32(options.epsilon or 0),
        "weight_offset": np.float32(options.weight_offset),
        "dynamic_scales": bool(options.dynamic_scales),
        "k_scale_rank": np.int32(options.k_scale_rank),
        "v_scale_rank": np.int32(options.v_scale_rank),
    }
    return TARGET, [], attributes


def describe(
    platform: str, avals: Mapping[str, Any], results: Sequence[Any], options: Options
) -> Description:
    """Describes a call on a platform; the variant only where it has kernels."""
    named = dict(zip(options.result_names, results, strict=True))
    tokens = math.prod(named["key"].shape[:-1])  # of all kv heads
    bytes_moved = _size(avals["qkv"]) + sum(
        _size(named[name]) for name in ("query", "gate", "key", "value") if name in named
    )
    # Rows that are stored, of all tokens; scales that are written are a float each.
    for pages in (avals["k_pages"], avals["v_pages"]):
        row = pages.shape[-1] * pages.dtype.itemsize + (4 if options.dynamic_scales else 0)
        bytes_moved += tokens * row
    return Description(
        op=NAME,
        bytes_moved=bytes_moved,
        variant=registration.variant_of(platform, options.variant),
        num_splits=None,
        caches=(avals["k_pages"], avals["v_pages"]),
    )


def _size(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


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
    aliases=_aliases,
    only_for_aliases=("k_pages", "v_pages", "slot_mapping", "layer", "k_scale", "v_scale"),
    on_shards=_on_shards,
)
