# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Attention over a KV cache: few queries, long contexts, split along the context."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_attn._src import checks, dtypes, kv_cache
from jax_attn._src.implementation import IMPLEMENTATIONS, Implementation
from jax_attn._src.kv_cache import PagedKVCache
from jax_attn._src.split_kv_attention import primitive
from jax_attn._src.split_kv_attention.problem import CAUSAL, Causal, Operands, Options


def split_kv_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    kv_lengths: jax.Array | None = None,
    scale: float | None = None,
    causal: Causal | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    num_splits: int | None = None,
    split_size: int | None = None,
    return_lse: bool = False,
    lse_includes_sinks: bool = True,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation | None = None,
) -> Any:
    """Attends a few queries per sequence to a long contiguous context.

    The context is cut into splits that are computed in parallel and merged by their
    log-sum-exp (flash-decoding; Dao et al. 2023). Keys and values are read once per kv head:
    query head `n` uses kv head `n // (num_q_heads // num_kv_heads)`. What lies beyond
    `kv_lengths`, outside the window or masked out for every query is not read, and cannot
    change the result.

    Logits are `scale * query . key`, then `cap * tanh(logits / cap)`, then bias and ALiBi are
    added, then keys are masked. Softmax and accumulation are in float32. Repeated calls give
    the same bits.

    Args:
      query: `[batch, query_len, num_q_heads, head_dim]`, float32, bfloat16 or float16.
      key: `[batch, kv_len, num_kv_heads, head_dim]`; float32, bfloat16, float16, or quantised
        int8, float8_e4m3fn, float8_e4m3fnuz, float8_e5m2.
      value: `[batch, kv_len, num_kv_heads, v_head_dim]`, the dtype of `key`.
      bias: Added to the logits: float, `[batch, num_q_heads, query_len, kv_len]`, where any of
        the first three may be 1.
      mask: bool, shaped like `bias`; False hides a key.
      kv_lengths: int32 `[batch]`, keys in each context, the newest included. All of `kv_len` if
        None. Values are clipped to `[0, kv_len]`.
      scale: Factor on the logits, `head_dim ** -0.5` if None.
      causal: "bottom_right": the queries are the last `query_len` tokens of their context, so
        query `t` has position `kv_length - query_len + t` and sees keys up to it. "top_left":
        query `t` has position `t`. None: queries see later keys too.
      sliding_window: A query at position `p` sees only keys after `p - sliding_window`. Positions
        are those of `causal`, or of "bottom_right" if `causal` is None.
      logits_soft_cap: Cap of the logits, None for none.
      alibi_slopes: float32 `[num_q_heads]`; `slope * |query position - key position|` is
        subtracted from the logits (Press et al. 2021).
      sinks: float `[num_q_heads]`, a logit per head that joins the denominator and has no value
        (gpt-oss).
      k_scale: float32 scale of stored keys, key = stored * k_scale: `[]`, `[num_kv_heads]` or
        `[batch, kv_len, num_kv_heads]`.
      v_scale: The same for values.
      num_splits: Splits of every context. Affects speed and last bits only.
      split_size: Keys of a split, instead of `num_splits`; makes the result of a sequence
        independent of the rest of its batch. With neither, splits are planned from the problem.
      return_lse: Also return the log-sum-exp of the logits.
      lse_includes_sinks: Whether the returned lse counts the sinks, as the output always does. To
        merge parts of a context, compute them without sinks and give those to `merge_attention`.
      axis_name: Mesh axes that shard the contexts, inside `shard_map`: `key`, `value`, and what
        else has a `kv_len`, are the part of this device, in the order of the devices along the
        axes. Everything else is that of whole contexts, `kv_lengths` included, and so are the
        results, which all devices get: one pmax of the lse and one psum of output and weight
        cross devices. Outside `shard_map`, sharding the arrays along `kv_len` does the same.
      implementation: "native" for the compiled kernel or an error, "xla" for the jax.numpy
        reference, None for the kernel where there is one.

    Returns:
      The output, `[batch, query_len, num_q_heads, v_head_dim]`, dtype of `query`. With
      `return_lse`, a pair of it and the lse, float32 `[batch, query_len, num_q_heads]`, natural
      logarithm. A query that sees no key gets zeros and an lse of -inf (the sink, if there is
      one and it is included).

    Raises:
      ValueError: If shapes disagree, an option is out of range, or there is no such mesh axis.
      TypeError: If an argument has a dtype or type that is not accepted.
      NotImplementedError: If `implementation="native"` and there is no kernel for the case.
    """
    op = "split_kv_attention"
    dims = checks.Dims(op)
    checks.check_dtype(op, "query", query, dtypes.FLOAT_DTYPES)
    checks.check_dtype(op, "key", key, dtypes.CACHE_DTYPES)
    checks.check_dtype(op, "value", value, (key.dtype,))
    dims.bind("query", query, "batch query_len num_q_heads head_dim")
    dims.bind("key", key, "batch kv_len num_kv_heads head_dim")
    dims.bind("value", value, "batch kv_len num_kv_heads v_head_dim")
    for name, array in {"k_scale": k_scale, "v_scale": v_scale}.items():
        checks.check_scale(dims, name, array, ["num_kv_heads", "batch kv_len num_kv_heads"])
    operands = Operands(
        query=query,
        key=key,
        value=value,
        bias=bias,
        mask=mask,
        kv_lengths=kv_lengths,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return _attend(
        dims,
        operands,
        return_lse,
        scale=scale,
        causal=causal,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        num_splits=num_splits,
        split_size=split_size,
        lse_includes_sinks=lse_includes_sinks,
        axis_name=axis_name,
        implementation=implementation,
    )


def paged_attention(
    query: jax.Array,
    cache: PagedKVCache,
    page_table: jax.Array,
    kv_lengths: jax.Array,
    *,
    layer: jax.Array | int | None = None,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    scale: float | None = None,
    causal: Causal | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    num_splits: int | None = None,
    split_size: int | None = None,
    return_lse: bool = False,
    lse_includes_sinks: bool = True,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation | None = None,
) -> Any:
    """Attends a few queries per sequence to contexts stored in pages.

    `split_kv_attention` over a paged cache (Kwon et al. 2023): token `i` of sequence `b` is in
    page `page_table[b, i // page_size]`. Sequences may share pages. Table entries past the
    context, or wholly before the window, are not read and may hold anything.

    The options, and the meaning of the result, are those of `split_kv_attention`, with
    `kv_len = max_pages * page_size`.

    Args:
      query: `[batch, query_len, num_q_heads, head_dim]`, float32, bfloat16 or float16.
      cache: Pages of keys and values, and their scales.
      page_table: int32 `[batch, max_pages]`, page ids of each sequence in order. An id outside
        the pool inside a context is the caller's error, and is clipped to the pool.
      kv_lengths: int32 `[batch]`, tokens in each context, the newest included.
      layer: int32 index into the cache's layer axis; needed if and only if it has one. It may
        be traced, so that a scan over layers carries one cache and copies nothing.
      bias: As in `split_kv_attention`.
      mask: As in `split_kv_attention`.
      scale: As in `split_kv_attention`.
      causal: As in `split_kv_attention`.
      sliding_window: As in `split_kv_attention`.
      logits_soft_cap: As in `split_kv_attention`.
      alibi_slopes: As in `split_kv_attention`.
      sinks: As in `split_kv_attention`.
      num_splits: As in `split_kv_attention`.
      split_size: As in `split_kv_attention`.
      return_lse: As in `split_kv_attention`.
      lse_includes_sinks: As in `split_kv_attention`.
      axis_name: Mesh axes that shard the contexts, inside `shard_map`: `cache` is the pool of this
        device, and `page_table`, `bias` and `mask` are its part of every context, so
        `page_table` holds ids of that pool. The rest is as in `split_kv_attention`. Outside
        `shard_map`, ids are those of the whole pool, and any dimension may be sharded: of a pool
        sharded along its pages, each device attends to the pages that it holds.
      implementation: As in `split_kv_attention`.

    Returns:
      As `split_kv_attention`.

    Raises:
      ValueError: If shapes disagree, an option is out of range, or there is no such mesh axis.
      TypeError: If an argument has a dtype or type that is not accepted.
      NotImplementedError: If `implementation="native"` and there is no kernel for the case.
    """
    op = "paged_attention"
    dims = checks.Dims(op)
    checks.check_dtype(op, "query", query, dtypes.FLOAT_DTYPES)
    dims.bind("query", query, "batch query_len num_q_heads head_dim")
    layer = kv_cache.check_cache(dims, cache, layer)
    checks.check_dtype(op, "page_table", page_table, (jnp.int32,))
    dims.bind("page_table", page_table, "batch max_pages")
    if dims["num_pages"] == 0 and dims["max_pages"] > 0:
        raise ValueError(f"{op}: `cache` has no pages, but `page_table` has max_pages > 0.")
    dims.set("kv_len", dims["max_pages"] * dims["page_size"], "`page_table` times page_size")
    operands = Operands(
        query=query,
        key=cache.k_pages,
        value=cache.v_pages,
        bias=bias,
        mask=mask,
        kv_lengths=kv_lengths,
        page_table=page_table,
        layer=layer,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        k_scale=cache.k_scale,
        v_scale=cache.v_scale,
    )
    return _attend(
        dims,
        operands,
        return_lse,
        scale=scale,
        causal=causal,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        num_splits=num_splits,
        split_size=split_size,
        lse_includes_sinks=lse_includes_sinks,
        axis_name=axis_name,
        implementation=implementation,
        page_layout=cache.layout,
        has_layers=layer is not None,
    )


def _attend(
    dims: checks.Dims,
    x: Operands,
    return_lse: bool,
    *,
    scale: Any,
    axis_name: str | tuple[str, ...] | None,
    **options: Any,
) -> Any:
    """Checks what both entry points share, resolves defaults and calls the primitive."""
    op = dims.op
    heads, kv_heads = dims["num_q_heads"], dims["num_kv_heads"]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: num_q_heads={heads} is not a multiple of num_kv_heads={kv_heads}.")
    rows = "#batch #num_q_heads #query_len kv_len"
    if x.bias is not None:
        checks.check_dtype(op, "bias", x.bias, dtypes.FLOAT_DTYPES)
        dims.bind("bias", x.bias, rows)
    if x.mask is not None:
        checks.check_dtype(op, "mask", x.mask, (jnp.bool_,))
        dims.bind("mask", x.mask, rows)
    if x.kv_lengths is not None:
        checks.check_dtype(op, "kv_lengths", x.kv_lengths, (jnp.int32,))
        dims.bind("kv_lengths", x.kv_lengths, "batch")
    if x.alibi_slopes is not None:
        checks.check_dtype(op, "alibi_slopes", x.alibi_slopes, (jnp.float32,))
        dims.bind("alibi_slopes", x.alibi_slopes, "num_q_heads")
    sinks = x.sinks
    if sinks is not None:
        checks.check_dtype(op, "sinks", sinks, dtypes.FLOAT_DTYPES)
        dims.bind("sinks", sinks, "num_q_heads")
        sinks = sinks.astype(jnp.float32)
    if scale is None:
        scale = dims["head_dim"] ** -0.5 if dims["head_dim"] else 1.0
    checks.check_finite(op, "scale", scale)
    checks.check_choice(op, "causal", options["causal"], CAUSAL)
    checks.check_choice(op, "implementation", options["implementation"], IMPLEMENTATIONS)
    checks.check_positive(op, "sliding_window", options["sliding_window"], int, "no window")
    checks.check_positive(op, "logits_soft_cap", options["logits_soft_cap"], float, "no cap")
    checks.check_positive(op, "num_splits", options["num_splits"], int, "a planned number")
    checks.check_positive(op, "split_size", options["split_size"], int, "planned splits")
    checks.check_together(op, {k: options[k] for k in ("num_splits", "split_size")})

    operands = Operands(**{**x.present(), "sinks": sinks})
    resolved = Options(
        scale=float(scale),
        k_scale_rank=0 if x.k_scale is None else x.k_scale.ndim,
        v_scale_rank=0 if x.v_scale is None else x.v_scale.ndim,
        **options,
    )
    if axis_name is None:
        out, lse = primitive.attend(operands, resolved)
    else:
        axes = checks.mesh_axes(op, "axis_name", axis_name)
        out, lse = primitive.attend_to_shards(operands, resolved, axes)
    return (out, lse) if return_lse else out
