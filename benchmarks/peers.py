# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The implementations of attention decode that are compared: ours and other people's.

All get the same arrays. Ours get `kv_lengths` unless named otherwise; the others get a mask only
where the case needs one, so a full buffer costs them nothing for its lengths.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import device as device_lib
import jax
import jax.numpy as jnp
import numpy as np
import peers_onnx
import peers_torch
from cases import Case, Inputs
from device import Device, Runner

import jax_attn


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation.

    Attributes:
      name: What `--peer` selects.
      title: What it is, for tables and plots.
      missing: Why it cannot run on this machine, None if it can.
      unsupported: Why it cannot do a case, None if it can.
      prepare: Makes it ready for the input sets of a case.
      output: What a call returned, as float32 `[B, T, N, H]` of the first input set.
    """

    name: str
    title: str
    missing: Callable[[Device], str | None]
    unsupported: Callable[[Case], str | None]
    prepare: Callable[[Case, Device, Sequence[Inputs]], Runner]
    output: Callable[[Any], np.ndarray]


def ours(case: Case, x: Inputs, implementation: Any, lengths: bool = True) -> jax.Array:
    """This package; without `lengths` of full contexts, as most others."""
    options: dict[str, Any] = {
        "causal": case.causal,
        "sliding_window": case.sliding_window,
        "logits_soft_cap": case.logits_soft_cap,
        "sinks": x.sinks,
        "implementation": implementation,
    }
    if case.page_size is not None:
        return jax_attn.paged_attention(x.query, x.cache, x.page_table, x.kv_lengths, **options)
    options |= {"k_scale": x.k_scale, "v_scale": x.v_scale}
    if lengths:
        options["kv_lengths"] = x.kv_lengths
    return jax_attn.split_kv_attention(x.query, x.key, x.value, **options)


def expected(case: Case, x: Inputs) -> np.ndarray:
    """What all implementations must return, in float32."""
    return np.asarray(jax.jit(lambda x: ours(case, x.in_float32(), "xla"))(x))


def jax_nn(case: Case, x: Inputs, implementation: Any) -> jax.Array:
    """`jax.nn.dot_product_attention`, over gathered pages and dequantised keys."""
    key, value = dense(x)
    mask = visible(case, x)[:, None] if case.needs_mask else None
    return jax.nn.dot_product_attention(
        x.query, key, value, mask=mask, implementation=implementation
    )


def pallas(case: Case, x: Inputs, k_splits: int) -> jax.Array:
    """Pallas' decoding kernels, over a cache with heads first."""
    from jax.experimental.pallas.ops.gpu import decode_attention, paged_attention

    query = x.query[:, 0]
    if x.page_table is None:
        # The kernel swaps the axes back.
        dense = (a.swapaxes(1, 2) for a in (x.key, x.value))
        out = decode_attention.gqa(query, *dense, k_splits=k_splits)
    else:
        # Unlike the other, this one does not scale.
        query = (query * case.head_dim**-0.5).astype(query.dtype)
        out = paged_attention.paged_attention(
            query, x.key, x.value, x.page_table, x.kv_lengths, k_splits=k_splits
        )
    return out[:, None]


def heads_first(case: Case, x: Inputs) -> Inputs:
    """Copies of keys and values whose heads come before their tokens or pages."""
    axes = (0, 2, 1, 3) if case.page_size is None else (2, 0, 1, 3)
    return dataclasses.replace(x, key=x.key.transpose(axes), value=x.value.transpose(axes))


def prepare_pallas(case: Case, device: Device, sets: Sequence[Inputs]) -> Runner:
    """Makes the fastest of a few numbers of splits ready, on copies with heads first."""
    few = [heads_first(case, x) for x in sets[:4]]
    seconds, reasons = {}, []
    for k_splits in PALLAS_SPLITS:
        try:
            runner = prepare_jax(pallas, case, device, few, num_calls=4, k_splits=k_splits)
        except Exception as e:  # not every number divides, and not every tile fits
            reasons.append(f"{k_splits} splits: {type(e).__name__}: {e}")
        else:
            seconds[k_splits] = min(runner.turn(device, 0))
    if not seconds:
        raise NotImplementedError("; ".join(reasons))
    copies = few + [heads_first(case, x) for x in sets[4:]]
    best = min(seconds, key=lambda k_splits: seconds[k_splits])
    return prepare_jax(pallas, case, device, copies, k_splits=best)


def grouped_einsum(case: Case, x: Inputs) -> jax.Array:
    """Grouped attention by two einsums."""
    key, value = dense(x)
    grouped = x.query.reshape(case.batch, case.query_len, case.num_kv_heads, -1, case.head_dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32)
    probabilities = softmax(case, x, logits).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probabilities, value).reshape(x.query.shape)


def grouped_multiply(case: Case, x: Inputs) -> jax.Array:
    """The same by products and sums, which XLA's CPU compiler vectorises better in float32."""
    key, value = (a.astype(jnp.float32)[:, None, :, :, None] for a in dense(x))  # [B,1,S,K,1,H]
    grouped = x.query.reshape(case.batch, case.query_len, 1, case.num_kv_heads, -1, case.head_dim)
    logits = jnp.sum(grouped.astype(jnp.float32) * key, axis=-1)  # [B, T, S, K, G]
    probabilities = softmax(case, x, logits.transpose(0, 3, 4, 1, 2)).transpose(0, 3, 4, 1, 2)
    out = jnp.sum(probabilities[..., None] * value, axis=2)
    return out.astype(x.query.dtype).reshape(x.query.shape)


def dense(x: Inputs) -> tuple[jax.Array, jax.Array]:
    """Keys and values as `[B, S, K, H]` in the dtype of the query."""

    def load(stored: jax.Array, scale: jax.Array | None) -> jax.Array:
        if x.page_table is not None:
            stored = stored[x.page_table].reshape(x.page_table.shape[0], -1, *stored.shape[2:])
        return stored if scale is None else (stored.astype(jnp.float32) * scale).astype(dtype)

    dtype = x.query.dtype
    return load(x.key, x.k_scale), load(x.value, x.v_scale)


def visible(case: Case, x: Inputs) -> jax.Array:
    """Which query sees which key: bool `[B, T, S]`."""
    keys = jnp.arange(case.kv_len, dtype=jnp.int32)[None, None, :]
    lengths = x.kv_lengths[:, None, None]
    queries = lengths - case.query_len + jnp.arange(case.query_len, dtype=jnp.int32)[None, :, None]
    seen = jnp.broadcast_to(keys < lengths, (case.batch, case.query_len, case.kv_len))
    if case.causal is not None:
        seen &= keys <= queries
    if case.sliding_window is not None:
        seen &= keys > queries - case.sliding_window
    return seen


def softmax(case: Case, x: Inputs, logits: jax.Array) -> jax.Array:
    """Probabilities from unscaled float32 logits `[B, K, G, T, S]`."""
    logits = logits * case.head_dim**-0.5
    if case.logits_soft_cap is not None:
        logits = case.logits_soft_cap * jnp.tanh(logits / case.logits_soft_cap)
    if case.needs_mask:
        logits = jnp.where(visible(case, x)[:, None, None], logits, -jnp.inf)
    if x.sinks is None:
        return jax.nn.softmax(logits, axis=-1)
    sinks = x.sinks.reshape(1, case.num_kv_heads, -1, 1, 1)
    top = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), sinks)
    terms = jnp.exp(logits - top)
    return terms / (jnp.sum(terms, axis=-1, keepdims=True) + jnp.exp(sinks - top))


def prepare_jax(
    fn: Callable[..., jax.Array],
    case: Case,
    device: Device,
    sets: Sequence[Inputs],
    num_calls: int | None = None,
    **options: Any,
) -> Runner:
    """Compiles `fn(case, inputs)` and runs it once, so that it raises here or not at all.

    On a GPU it is a program of `num_calls`, by default as many as the case needs.
    """
    step = functools.partial(fn, case, **options)
    if device.platform == "gpu":
        runner = device_lib.jax_chain(
            step,
            sets,
            lambda x, out: dataclasses.replace(x, query=out.astype(x.query.dtype)),
            num_calls or device_lib.calls_in_program(case.num_bytes),
        )
    else:
        compiled = jax.jit(step)
        runner = Runner([functools.partial(compiled, x) for x in sets], jax.block_until_ready)
    runner.wait(runner.calls[0]())
    return runner


def _jax_output(out: Any) -> np.ndarray:
    return np.asarray(out[0] if isinstance(out, tuple) else out).astype(np.float32)


def _jax_peer(
    name: str,
    title: str,
    fn: Callable[..., jax.Array],
    missing: Callable[[Device], str | None] = lambda device: None,
    unsupported: Callable[[Case], str | None] = lambda case: None,
    **options: Any,
) -> Peer:
    prepare = functools.partial(prepare_jax, fn, **options)
    return Peer(name, title, missing, unsupported, prepare, _jax_output)


def _no_cap_or_sinks(case: Case) -> str | None:
    if case.logits_soft_cap is not None:
        return "no soft cap"
    return "no sinks" if case.sinks else None


def _pallas_missing(device: Device) -> str | None:
    return None if device.vendor == "cuda" else "needs an NVIDIA GPU"


def _pallas_unsupported(case: Case) -> str | None:
    if case.query_len != 1 or case.quantized or case.needs_mask:
        return "one query over full contexts of its own type"
    return _no_cap_or_sinks(case)


def _cudnn_missing(device: Device) -> str | None:
    return None if device.vendor == "cuda" else "needs an NVIDIA GPU"


def _cudnn_unsupported(case: Case) -> str | None:
    return "16-bit only" if case.dtype == "float32" else _no_cap_or_sinks(case)


def _package_missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"package {package} is not installed"


def torch_missing(device: Device) -> str | None:
    """Why PyTorch cannot be used, None if it can."""
    return _package_missing("torch") or peers_torch.missing(device)


def _onnx_missing(device: Device) -> str | None:
    if device.platform != "cpu":
        return "set up for CPU only"
    return _package_missing("onnxruntime") or _package_missing("onnx")


def _torch_unsupported(case: Case) -> str | None:
    return "no scaled caches" if case.quantized else _no_cap_or_sinks(case)


def _torch_peer(name: str, title: str, **arrangement: bool) -> Peer:
    def prepare(case: Case, device: Device, sets: Sequence[Inputs]) -> Runner:
        masks = [visible(case, x) if case.needs_mask else None for x in sets]
        return peers_torch.prepare(case, device, sets, masks, **arrangement)

    return Peer(name, title, torch_missing, _torch_unsupported, prepare, peers_torch.output)


def _lengths_unsupported(case: Case) -> str | None:
    return "needs lengths" if case.needs_mask or case.page_size is not None else None


OURS = "ours_native"
PALLAS_SPLITS = (1, 4, 16, 64)

PEERS = (
    _jax_peer(OURS, "jax_attn, native", ours, implementation="native"),
    _jax_peer(
        "ours_no_lengths",
        "jax_attn, native, no lengths",
        ours,
        unsupported=_lengths_unsupported,
        implementation="native",
        lengths=False,
    ),
    _jax_peer("ours_xla", "jax_attn, xla", ours, implementation="xla"),
    _jax_peer("jax_nn", "jax.nn, xla", jax_nn, unsupported=_no_cap_or_sinks, implementation="xla"),
    _jax_peer(
        "jax_nn_cudnn",
        "jax.nn, cudnn",
        jax_nn,
        _cudnn_missing,
        _cudnn_unsupported,
        implementation="cudnn",
    ),
    _jax_peer("xla_einsum", "XLA, grouped einsum", grouped_einsum),
    _jax_peer("xla_multiply", "XLA, grouped multiply and sum", grouped_multiply),
    Peer(
        "pallas",
        "Pallas, heads first, best of 4 splits",
        _pallas_missing,
        _pallas_unsupported,
        prepare_pallas,
        _jax_output,
    ),
    _torch_peer("torch_gqa", "PyTorch SDPA, enable_gqa", fold=False, heads_first=False),
    _torch_peer("torch_folded", "PyTorch SDPA, group in q_len", fold=True, heads_first=False),
    _torch_peer(
        "torch_folded_bhsd", "PyTorch SDPA, group in q_len, BHSD cache", fold=True, heads_first=True
    ),
    Peer(
        "onnxruntime",
        "ONNX Runtime GroupQueryAttention",
        _onnx_missing,
        peers_onnx.unsupported,
        peers_onnx.prepare,
        peers_onnx.output,
    ),
)
