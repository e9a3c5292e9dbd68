# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Attention of very short sequences in very large batches, forward and backward."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from jax_attn._src import checks, dtypes
from jax_attn._src.implementation import IMPLEMENTATIONS, Implementation
from jax_attn._src.small_seq_attention import primitive
from jax_attn._src.small_seq_attention.problem import Operands, Options
from jax_attn._src.split_kv_attention.problem import CAUSAL, Causal

_OP = "small_seq_attention"


def small_seq_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    query_lengths: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    query_cu_seqlens: jax.Array | None = None,
    kv_cu_seqlens: jax.Array | None = None,
    max_q_len: int | None = None,
    max_kv_len: int | None = None,
    scale: float | None = None,
    causal: Causal | None = None,
    logits_soft_cap: float | None = None,
    dropout_rate: None = None,
    return_lse: bool = False,
    debug_checks: bool = False,
    implementation: Implementation | None = None,
) -> Any:
    """Attends within very many pairs of very short sequences; made for training.

    Where generic attention is organised around long sequences, here a whole pair of sequences
    stays in a core's nearest cache: queries, keys and values are read once, and no probabilities
    are stored. The backward pass is one kernel as well: it recomputes the probabilities from the
    log-sum-exp (Dao 2022) and writes every element of the gradients, the same bits every time.

    Arrays are dense, `[batch, length, heads, head_dim]` with optional lengths, or packed,
    `[tokens, heads, head_dim]`, if `query_cu_seqlens` and `kv_cu_seqlens` are given. Sequence `i`
    of a packed array begins at token `cu_seqlens[i]` and has `cu_seqlens[i + 1] - cu_seqlens[i]`
    tokens, or as many of them as `query_lengths` or `kv_lengths` says, followed by a hole.
    Sequences may be empty. What lies in padding and in holes cannot change the result; its
    output and its gradients are 0, and its lse is -inf.

    Logits are `scale * query . key`, then `cap * tanh(logits / cap)`, then the bias is added, then
    keys are masked. Softmax and accumulation are in float32. Query head `n` uses kv head
    `n // (num_q_heads // num_kv_heads)`. Differentiable in query, key, value and bias, more than
    once too; beyond the first derivative by `jax.numpy`.

    Args:
      query: `[batch, query_len, num_q_heads, head_dim]` or `[query_tokens, num_q_heads,
        head_dim]`; float32, bfloat16 or float16.
      key: `[batch, kv_len, num_kv_heads, head_dim]` or `[kv_tokens, num_kv_heads, head_dim]`, the
        dtype of `query`.
      value: `[batch, kv_len, num_kv_heads, v_head_dim]` or `[kv_tokens, num_kv_heads,
        v_head_dim]`, the dtype of `query`.
      bias: Added to the logits: float, `[batch, num_q_heads, query_len, kv_len]`, where any of the
        first three may be 1. For packed arrays `batch` is the number of sequences, and the lengths
        are `max_q_len` and `max_kv_len`.
      query_lengths: int32 `[batch]`, queries in each sequence; all that there is room for if None.
      kv_lengths: int32 `[batch]`, keys in each sequence, likewise.
      query_cu_seqlens: int32 `[batch + 1]`, where sequences begin and end in packed queries.
      kv_cu_seqlens: int32 `[batch + 1]`, likewise for keys and values.
      max_q_len: The most queries that a packed sequence has; needed if and only if packed.
      max_kv_len: The most keys that a packed sequence has; needed if and only if packed.
      scale: Factor on the logits, `head_dim ** -0.5` if None.
      causal: "bottom_right": query `t` of a sequence has position `kv_length - query_length + t`
        and sees keys up to it. "top_left": query `t` has position `t`. None: queries see all keys.
      logits_soft_cap: Cap of the logits, None for none.
      dropout_rate: Must be None: dropout is not supported.
      return_lse: Also return the log-sum-exp of the logits.
      debug_checks: Whether to check the values of lengths and bounds, as well as their shapes. The
        caller must then be transformed by `jax.experimental.checkify.checkify`.
      implementation: "native" for the compiled kernel or an error, "xla" for the jax.numpy
        reference, None for the kernel where there is one.

    Returns:
      The output, shaped like `query` with `v_head_dim`, dtype of `query`. With `return_lse`, a
      pair of it and the lse, float32, shaped like `query` without `head_dim`, natural logarithm.
      A query that sees no key gets zeros and an lse of -inf.

      Lengths above `max_q_len`, `max_kv_len` or the room that there is are clamped to it; bounds
      that decrease or leave the array are clipped to where the sequence before ended. They are
      mistakes all the same, which `debug_checks` reports.

    Raises:
      ValueError: If shapes disagree, or an option is out of range or missing.
      TypeError: If an argument has a dtype or type that is not accepted.
      NotImplementedError: If `dropout_rate` is given, or `implementation="native"` and there is
        no kernel for the case.
    """
    if dropout_rate is not None:
        raise NotImplementedError(
            f"{_OP}: dropout is not supported, got dropout_rate={dropout_rate}. Drop out the "
            "inputs or the output instead, or use attention that stores its probabilities."
        )
    packed = _is_packed(query_cu_seqlens, kv_cu_seqlens, max_q_len, max_kv_len)
    dims = checks.Dims(_OP)
    checks.check_dtype(_OP, "query", query, dtypes.FLOAT_DTYPES)
    checks.check_dtype(_OP, "key", key, (query.dtype,))
    checks.check_dtype(_OP, "value", value, (query.dtype,))
    rows, keys = ("query_tokens", "kv_tokens") if packed else ("batch query_len", "batch kv_len")
    dims.bind("query", query, f"{rows} num_q_heads head_dim")
    dims.bind("key", key, f"{keys} num_kv_heads head_dim")
    dims.bind("value", value, f"{keys} num_kv_heads v_head_dim")
    heads, kv_heads = dims["num_q_heads"], dims["num_kv_heads"]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{_OP}: num_q_heads={heads} is not a multiple of num_kv_heads={kv_heads}."
        )
    vectors = {"query_lengths": query_lengths, "kv_lengths": kv_lengths}
    bounds = {"query_cu_seqlens": query_cu_seqlens, "kv_cu_seqlens": kv_cu_seqlens}
    if packed:
        _check_bounds(dims, bounds)
        dims.set("query_len", int(max_q_len or 0), "max_q_len")
        dims.set("kv_len", int(max_kv_len or 0), "max_kv_len")
    for name, lengths in vectors.items():
        if lengths is not None:
            checks.check_dtype(_OP, name, lengths, (jnp.int32,))
            dims.bind(name, lengths, "batch")
    if bias is not None:
        checks.check_dtype(_OP, "bias", bias, dtypes.FLOAT_DTYPES)
        dims.bind("bias", bias, "#batch #num_q_heads #query_len kv_len")
    factor: Any = scale
    if factor is None:
        factor = dims["head_dim"] ** -0.5 if dims["head_dim"] else 1.0
    checks.check_finite(_OP, "scale", factor)
    checks.check_choice(_OP, "causal", causal, CAUSAL)
    checks.check_choice(_OP, "implementation", implementation, IMPLEMENTATIONS)
    checks.check_positive(_OP, "logits_soft_cap", logits_soft_cap, float, "no cap")

    operands = Operands(query, key, value, bias, **vectors, **bounds)
    if debug_checks:
        _check_values(dims, operands)
    options = Options(
        scale=float(factor),
        causal=causal,
        logits_soft_cap=logits_soft_cap,
        max_q_len=max_q_len,
        max_kv_len=max_kv_len,
        implementation=implementation,
    )
    out, lse = primitive.attend(operands, options, with_lse=return_lse)
    return (out, lse) if return_lse else out


def _is_packed(query_bounds: Any, kv_bounds: Any, max_q_len: Any, max_kv_len: Any) -> bool:
    """Whether arrays are packed; raises if what says so is given in part."""
    given = {
        "query_cu_seqlens": query_bounds,
        "kv_cu_seqlens": kv_bounds,
        "max_q_len": max_q_len,
        "max_kv_len": max_kv_len,
    }
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(
            f"{_OP}: packed sequences need {', '.join(given)}; missing {', '.join(missing)}."
        )
    for name in () if missing else ("max_q_len", "max_kv_len"):
        checks.check_at_least(_OP, name, given[name], 1)
    return not missing


def _check_bounds(dims: checks.Dims, bounds: dict[str, Any]) -> None:
    for name, array in bounds.items():
        checks.check_dtype(_OP, name, array, (jnp.int32,))
        if array.ndim != 1 or array.shape[0] < 1:
            raise ValueError(f"{_OP}: `{name}` must have shape [batch + 1], got {array.shape}.")
    first, second = bounds.values()
    if first.shape != second.shape:
        raise ValueError(
            f"{_OP}: `query_cu_seqlens` and `kv_cu_seqlens` must have one length, batch + 1; got "
            f"shapes {first.shape} and {second.shape}."
        )
    dims.set("batch", first.shape[0] - 1, "`query_cu_seqlens` (its length less 1)")


def _check_values(dims: checks.Dims, x: Operands) -> None:
    """Checks values of lengths and bounds, in a caller that is transformed by checkify."""

    def check(holds: jax.Array, message: str) -> None:
        checkify.check(jnp.all(holds), f"{_OP}: {message}")

    for side, tokens in (("query", x.query.shape[0]), ("kv", x.key.shape[0])):
        longest, hint = dims[f"{side}_len"], f"max_{'q' if side == 'query' else 'kv'}_len"
        lengths = getattr(x, f"{side}_lengths")
        bounds = getattr(x, f"{side}_cu_seqlens")
        if bounds is not None:
            name = f"`{side}_cu_seqlens`"
            room = bounds[1:] - bounds[:-1]
            inside = (bounds >= 0) & (bounds <= tokens)
            check(inside, f"{name} has a bound outside the {tokens} tokens that there are.")
            check(room >= 0, f"{name} decreases.")
            used = room if lengths is None else lengths
            check(used <= longest, f"a sequence is longer than {hint}={longest}.")
            if lengths is not None:
                within = (lengths >= 0) & (lengths <= room)
                check(within, f"`{side}_lengths` is negative or more than {name} has room for.")
        elif lengths is not None:
            within = (lengths >= 0) & (lengths <= longest)
            check(within, f"`{side}_lengths` is negative or more than {side}_len={longest}.")
