# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""One pass over the packed QKV projection: split, norm, rotation and cache write."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_attn._src import checks, dtypes
from jax_attn._src.fused_qkv_rope_cache import primitive
from jax_attn._src.fused_qkv_rope_cache.problem import GATE_LAYOUTS, GateLayout, Operands, Options
from jax_attn._src.implementation import IMPLEMENTATIONS, Implementation
from jax_attn._src.kv_cache import PagedKVCache, check_cache
from jax_attn._src.qk_norm import NORM_SCOPES, WEIGHT_OFFSETS, QKNorm
from jax_attn._src.rope import TABLE_WIDTHS, Rope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FusedQKV:
    """What `fused_qkv_rope_cache` returns.

    Attributes:
      query: `[tokens, num_q_heads, head_dim]`, normalised and rotated, dtype of qkv.
      gate: `[tokens, num_q_heads, head_dim]` as it came, without sigmoid; None without a gate.
      key: `[tokens, num_kv_heads, head_dim]`, normalised and rotated, not divided by a scale.
      value: `[tokens, num_kv_heads, v_head_dim]`, not divided by a scale.
      cache: The cache with keys and values of these tokens.
    """

    query: jax.Array
    gate: jax.Array | None
    key: jax.Array
    value: jax.Array
    cache: PagedKVCache


def fused_qkv_rope_cache(
    qkv: jax.Array,
    cache: PagedKVCache,
    slot_mapping: jax.Array,
    *,
    num_q_heads: int,
    positions: jax.Array | None = None,
    offsets: jax.Array | None = None,
    rope: Rope | None = None,
    qk_norm: QKNorm | None = None,
    gate: GateLayout | None = None,
    layer: jax.Array | int | None = None,
    dynamic_scales: bool = False,
    implementation: Implementation | None = None,
) -> FusedQKV:
    """Splits a QKV projection, normalises and rotates queries and keys, and fills the cache.

    Everything is computed in float32 and rounded once to the dtype of `qkv`. The cache gets the
    rounded keys and values, `quantise(key / k_scale)`, so cached keys equal returned keys bit
    for bit when the dtypes agree and there is no scale. Quantised formats saturate; NaN stays
    NaN in float8 and becomes 0 in int8. float32, bfloat16 and float16 caches overflow to
    infinity like any cast.

    A token whose slot is negative or past the cache is not stored, but its query, gate, key and
    value are returned. Of tokens with the same slot, the last is stored. The cache is updated in
    place when it is donated (`donate_argnums`) or carried by a scan, and copied once otherwise,
    as by every call outside `jit`; `jax_attn.explain` counts the copies.

    Gradients flow to `qkv`, the norm weights, the tables, the scales and the pages, and through
    the returned pages to what was stored; not through int8 pages.

    Args:
      qkv: `[tokens, columns]`, float32, bfloat16 or float16. The columns are queries, keys and
        values, each head by head: `num_q_heads * head_dim`, `num_kv_heads * head_dim` and
        `num_kv_heads * v_head_dim`. Head counts and sizes are those of `cache`.
      cache: Pages of keys and values, and their scales.
      slot_mapping: int32 or int64 `[tokens]`, `page * page_size + offset` of each token in the
        cache (of its layer); see `PagedKVCache.slots`.
      num_q_heads: Heads of queries.
      positions: int32 `[tokens]`, or `[3, tokens]` (temporal, height, width) if `rope` has
        `mrope_sections`. Needed if and only if there is a rope. Positions outside its table are
        clipped to the table.
      offsets: int32 `[tokens]`, added to the positions before they are clipped.
      rope: Rotary position embedding of queries and keys, None for none.
      qk_norm: RMSNorm of queries and keys before the rotation, None for none.
      gate: Where the columns of an output gate are, as many as of queries. "interleaved": the
        gate of each head follows its query (Qwen3-Next). "blocked": all gates follow all
        queries. None: there is no gate.
      layer: int32 index into the cache's layer axis; needed if and only if it has one. It may
        be traced; a traced layer outside the cache stores nothing.
      dynamic_scales: Choose the scale of every stored row, the largest magnitude in it over the
        largest number of the cache's dtype, and write it to the cache's scales, which must be
        per token; rows of zeros get scale 1. Without it the cache's scales are read.
      implementation: "native" for the compiled kernel or an error, "xla" for the jax.numpy
        reference, None for the kernel where there is one.

    Returns:
      A `FusedQKV`: query, gate, key, value and the updated cache.

    Raises:
      ValueError: If shapes disagree or an option is out of range.
      TypeError: If an argument has a dtype or type that is not accepted.
      NotImplementedError: If `implementation="native"` and there is no kernel for the case.
    """
    op = "fused_qkv_rope_cache"
    dims = checks.Dims(op)
    checks.check_choice(op, "gate", gate, GATE_LAYOUTS)
    checks.check_choice(op, "implementation", implementation, IMPLEMENTATIONS)
    checks.check_at_least(op, "num_q_heads", num_q_heads, 1)
    dims.set("num_q_heads", int(num_q_heads), "the argument")
    checks.check_dtype(op, "qkv", qkv, dtypes.FLOAT_DTYPES)
    dims.bind("qkv", qkv, "tokens columns")
    layer = check_cache(dims, cache, layer)
    _check_columns(dims, qkv, gated=gate is not None)
    checks.check_dtype(op, "slot_mapping", slot_mapping, (jnp.int32, jnp.int64))
    dims.bind("slot_mapping", slot_mapping, "tokens")
    rope_options = _check_rope(dims, rope, positions, offsets)
    norm_options = _check_norm(dims, qk_norm)
    _check_dynamic_scales(dims, dynamic_scales, cache, layer is not None)

    found = primitive.compute(
        Operands(
            qkv=jnp.asarray(qkv),
            k_pages=jnp.asarray(cache.k_pages),
            v_pages=jnp.asarray(cache.v_pages),
            slot_mapping=_as_slots(slot_mapping),
            layer=layer,
            positions=_as_array(positions),
            offsets=_as_array(offsets),
            cos=None if rope is None else _as_array(rope.cos),
            sin=None if rope is None else _as_array(rope.sin),
            q_weight=None if qk_norm is None else _as_array(qk_norm.q_weight),
            k_weight=None if qk_norm is None else _as_array(qk_norm.k_weight),
            k_scale=_as_array(cache.k_scale),
            v_scale=_as_array(cache.v_scale),
        ),
        Options(
            num_q_heads=int(num_q_heads),
            page_layout=cache.layout,
            gate=gate,
            dynamic_scales=bool(dynamic_scales),
            has_layers=layer is not None,
            k_scale_rank=_rank(cache.k_scale),
            v_scale_rank=_rank(cache.v_scale),
            implementation=implementation,
            **rope_options,
            **norm_options,
        ),
    )
    updated = {name: found[name] for name in ("k_pages", "v_pages")}
    if dynamic_scales:
        updated |= {name: found[name] for name in ("k_scale", "v_scale")}
    cache = dataclasses.replace(cache, **updated)
    return FusedQKV(found["query"], found.get("gate"), found["key"], found["value"], cache)


def _as_array(array: Any) -> jax.Array | None:
    return None if array is None else jnp.asarray(array)


def _rank(scale: jax.Array | None) -> int:
    return 0 if scale is None else np.ndim(scale)


def _as_slots(slot_mapping: Any) -> jax.Array:
    if isinstance(slot_mapping, np.ndarray):
        # Without 64-bit mode JAX keeps the low half of an int64, which may be a slot.
        largest = np.iinfo(jax.dtypes.canonicalize_dtype(slot_mapping.dtype)).max
        slot_mapping = np.clip(slot_mapping, -1, largest)
    return jnp.asarray(slot_mapping)


def _check_columns(dims: checks.Dims, qkv: jax.Array, gated: bool) -> None:
    queries = dims["num_q_heads"] * dims["head_dim"] * (2 if gated else 1)
    keys = dims["num_kv_heads"] * dims["head_dim"]
    values = dims["num_kv_heads"] * dims["v_head_dim"]
    if dims["columns"] != queries + keys + values:
        raise ValueError(
            f"{dims.op}: `qkv` has {dims['columns']} columns (shape {qkv.shape}), expected "
            f"{queries + keys + values}: {queries} of queries{' and gate' if gated else ''}, "
            f"{keys} of keys and {values} of values, for num_q_heads={dims['num_q_heads']}, "
            f"num_kv_heads={dims['num_kv_heads']}, head_dim={dims['head_dim']} and "
            f"v_head_dim={dims['v_head_dim']}."
        )


def _check_rope(dims: checks.Dims, rope: Any, positions: Any, offsets: Any) -> dict[str, Any]:
    """Checks a rope against its positions; returns the options of the call."""
    op = dims.op
    if rope is None:
        for name, given in {"positions": positions, "offsets": offsets}.items():
            if given is not None:
                raise ValueError(f"{op}: `{name}` is given, but there is no rope.")
        return {}
    if not isinstance(rope, Rope):
        raise TypeError(f"{op}: `rope` must be a Rope, got {type(rope).__name__}.")
    checks.check_choice(op, "rope.table_width", rope.table_width, TABLE_WIDTHS)
    for name in ("interleaved", "nope_first", "mrope_interleaved"):
        checks.check_choice(op, f"rope.{name}", getattr(rope, name), (False, True))
    rotary_dim = dims["head_dim"] if rope.rotary_dim is None else rope.rotary_dim
    checks.check_at_least(op, "rope.rotary_dim", rotary_dim, 2)
    if rotary_dim % 2 or rotary_dim > dims["head_dim"]:
        raise ValueError(
            f"{op}: rope.rotary_dim must be even and at most head_dim={dims['head_dim']}, "
            f"got {rotary_dim}."
        )
    half = rope.table_width == "half"
    dims.set(
        "table_width",
        rotary_dim // 2 if half else rotary_dim,
        f"{'half of ' if half else ''}rotary_dim={rotary_dim} (rope.table_width="
        f"{rope.table_width!r})",
    )
    for name, table in {"rope.cos": rope.cos, "rope.sin": rope.sin}.items():
        checks.check_dtype(op, name, table, dtypes.FLOAT_DTYPES)
        dims.bind(name, table, "max_positions table_width")
    checks.check_at_least(op, "max_positions of `rope`", dims["max_positions"], 1)
    sections = rope.mrope_sections
    if sections is None and rope.mrope_interleaved:
        raise ValueError(f"{op}: rope.mrope_interleaved needs rope.mrope_sections.")
    if sections is not None:
        _check_sections(op, sections, rotary_dim, rope.mrope_interleaved)
    if positions is None:
        raise ValueError(f"{op}: `positions` must be given with a rope.")
    checks.check_dtype(op, "positions", positions, (jnp.int32,))
    dims.bind("positions", positions, "tokens" if sections is None else "3 tokens")
    if offsets is not None:
        checks.check_dtype(op, "offsets", offsets, (jnp.int32,))
        dims.bind("offsets", offsets, "tokens")
    return {
        "rotary_dim": int(rotary_dim),
        "interleaved": rope.interleaved,
        "nope_first": rope.nope_first,
        "table_width": rope.table_width,
        "mrope_sections": sections,
        "mrope_interleaved": rope.mrope_interleaved,
    }


def _check_sections(op: str, sections: Any, rotary_dim: int, interleaved: bool) -> None:
    if not isinstance(sections, tuple) or len(sections) != 3:
        raise ValueError(f"{op}: rope.mrope_sections must be a tuple of 3 ints, got {sections!r}.")
    for section in sections:
        checks.check_at_least(op, "each of rope.mrope_sections", section, 0)
    if sum(sections) != rotary_dim // 2:
        raise ValueError(
            f"{op}: rope.mrope_sections={sections} sum to {sum(sections)}, expected "
            f"{rotary_dim // 2}, the pairs of rotary_dim={rotary_dim}."
        )
    _, height, width = sections
    # The last pairs of h and w, if they have any, are 3 * height - 2 and 3 * width - 1.
    if interleaved and max(3 * height - 2, 3 * width - 1) >= rotary_dim // 2:
        raise ValueError(
            f"{op}: rope.mrope_sections={sections} cannot alternate over {rotary_dim // 2} pairs."
        )


def _check_norm(dims: checks.Dims, norm: Any) -> dict[str, Any]:
    """Checks a norm; returns the options of the call."""
    op = dims.op
    if norm is None:
        return {}
    if not isinstance(norm, QKNorm):
        raise TypeError(f"{op}: `qk_norm` must be a QKNorm, got {type(norm).__name__}.")
    checks.check_choice(op, "qk_norm.scope", norm.scope, NORM_SCOPES)
    checks.check_choice(op, "qk_norm.weight_offset", norm.weight_offset, WEIGHT_OFFSETS)
    checks.check_choice(op, "qk_norm.normalize_v", norm.normalize_v, (False, True))
    checks.check_finite(op, "qk_norm.epsilon", norm.epsilon)
    if norm.epsilon <= 0:
        raise ValueError(f"{op}: qk_norm.epsilon must be positive, got {norm.epsilon}.")
    weights = {"q": norm.q_weight, "k": norm.k_weight}
    if norm.weight_offset and all(weight is None for weight in weights.values()):
        raise ValueError(f"{op}: qk_norm.weight_offset={norm.weight_offset} needs a weight.")
    for name, weight in weights.items():
        if weight is None:
            continue
        argument, heads = f"qk_norm.{name}_weight", f"num_{'q' if name == 'q' else 'kv'}_heads"
        checks.check_dtype(op, argument, weight, dtypes.FLOAT_DTYPES)
        if norm.scope == "head":
            dims.bind(argument, weight, "head_dim")
        else:
            dims.set(f"{heads}*head_dim", dims[heads] * dims["head_dim"], "scope 'all_heads'")
            dims.bind(argument, weight, f"{heads}*head_dim")
    return {
        "epsilon": float(norm.epsilon),
        "weight_offset": float(norm.weight_offset),
        "norm_scope": norm.scope,
        "normalize_v": norm.normalize_v,
    }


def _check_dynamic_scales(
    dims: checks.Dims, dynamic_scales: Any, cache: PagedKVCache, has_layers: bool
) -> None:
    op = dims.op
    checks.check_choice(op, "dynamic_scales", dynamic_scales, (False, True))
    if not dynamic_scales:
        return
    checks.check_dtype(op, "cache.k_pages", cache.k_pages, dtypes.QUANTIZED_DTYPES)
    for name in ("k_scale", "v_scale"):
        scale = getattr(cache, name)
        if scale is None or np.ndim(scale) != (4 if has_layers else 3):
            shape = "None" if scale is None else f"shape {np.shape(scale)}"
            raise ValueError(
                f"{op}: dynamic_scales needs `cache.{name}` per token, with shape "
                f"{cache.k_pages.shape[:-1]}, got {shape}."
            )
