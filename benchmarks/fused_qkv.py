# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Problems of the fused QKV pass, and its implementations.

As in a model's scan over layers, the pass is a step of a loop that carries the cache of all layers
and the results: what is timed allocates nothing and copies no cache.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import fused_qkv_torch
import jax
import jax.numpy as jnp
import numpy as np
from device import Device, Runner, calls_in_program
from jax import lax
from peers import OURS, Peer, torch_missing

import jax_attn

NUM_LAYERS = 4
PAGE_SIZE = 16
MAX_POSITIONS = 4096
EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Case:
    """The tokens of a step: packed projections, and slots in random pages."""

    name: str
    model: str
    tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int | None = None  # None: the whole head
    gate: str | None = None
    dtype: str = "bfloat16"
    cache_dtype: str | None = None  # None: dtype
    rotate: bool = False  # projections have just been computed, and may be in a cache
    platforms: tuple[str, ...] = ("cpu", "gpu")

    @property
    def stored_dtype(self) -> str:
        """Element type of the cache."""
        return self.cache_dtype or self.dtype

    @property
    def columns(self) -> int:
        """Columns of the projection."""
        queries = self.num_q_heads * (1 if self.gate is None else 2)
        return (queries + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_pages(self) -> int:
        """Pages of a layer: as many as the tokens fill, and a few others."""
        return -(-self.tokens // PAGE_SIZE) + 8

    @property
    def num_bytes(self) -> int:
        """Bytes that any implementation must move: read once, written once, and stored."""
        stored = 2 * self.num_kv_heads * self.head_dim * jnp.dtype(self.stored_dtype).itemsize
        return self.tokens * (2 * self.columns * jnp.dtype(self.dtype).itemsize + stored)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the cache, and of what a step reads and returns."""
        layer = 2 * self.num_pages * PAGE_SIZE * self.num_kv_heads * self.head_dim
        cache = NUM_LAYERS * layer * jnp.dtype(self.stored_dtype).itemsize
        return cache + 2 * self.tokens * self.columns * jnp.dtype(self.dtype).itemsize

    def num_steps(self, device: Device) -> int:
        """Steps of a program, so that starting it is not timed."""
        if device.platform == "gpu":
            return calls_in_program(self.num_bytes)
        return max(NUM_LAYERS, min(64, 4096 // self.tokens))

    @property
    def shape(self) -> dict[str, Any]:
        """What a report says of the case."""
        return {
            "tokens": self.tokens,
            "heads": [self.num_q_heads, self.num_kv_heads],
            "head_dim": self.head_dim,
            "rotary_dim": self.rotary_dim or self.head_dim,
            "gate": self.gate,
            "page_size": PAGE_SIZE,
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of a case that a step only reads."""

    qkv: jax.Array
    slots: jax.Array
    positions: jax.Array
    rope: jax_attn.Rope
    norm: jax_attn.QKNorm

    def in_float32(self) -> "Inputs":
        """The same values in float32."""
        return dataclasses.replace(self, qkv=self.qkv.astype(jnp.float32))


def make_inputs(case: Case, seed: int) -> Inputs:
    """Returns random normal inputs; the pages of the tokens are random ones."""
    rng = np.random.default_rng(seed)
    tokens = np.arange(case.tokens, dtype=np.int32)
    pages = rng.permutation(case.num_pages).astype(np.int32)
    qkv = jax.random.normal(jax.random.key(seed), (case.tokens, case.columns))
    weights = (jnp.asarray(rng.uniform(0.5, 2, case.head_dim), jnp.bfloat16) for _ in range(2))
    return Inputs(
        qkv.astype(jnp.dtype(case.dtype)),
        jnp.asarray(pages[tokens // PAGE_SIZE] * PAGE_SIZE + tokens % PAGE_SIZE),
        jnp.asarray(tokens % MAX_POSITIONS),
        jax_attn.Rope.default(case.rotary_dim or case.head_dim, MAX_POSITIONS),
        jax_attn.QKNorm(*weights, EPSILON),
    )


def make_cache(case: Case, dtype: Any = None) -> jax_attn.PagedKVCache:
    """Returns the empty cache of all layers."""
    quantised = case.stored_dtype not in ("float32", "bfloat16", "float16")
    scales = jnp.full((2, case.num_kv_heads), 1 / 32, jnp.float32)
    return jax_attn.PagedKVCache.zeros(
        case.num_pages,
        PAGE_SIZE,
        case.num_kv_heads,
        case.head_dim,
        num_layers=NUM_LAYERS,
        dtype=dtype or jnp.dtype(case.stored_dtype),
        k_scale=scales[0] if quantised else None,
        v_scale=scales[1] if quantised else None,
    )


def ours(
    case: Case, x: Inputs, cache: jax_attn.PagedKVCache, layer: Any, implementation: Any
) -> jax_attn.FusedQKV:
    """This package."""
    return jax_attn.fused_qkv_rope_cache(
        x.qkv,
        cache,
        x.slots,
        num_q_heads=case.num_q_heads,
        positions=x.positions,
        rope=x.rope,
        qk_norm=x.norm,
        gate=case.gate,
        layer=layer,
        implementation=implementation,
    )


def expected(case: Case, x: Inputs) -> np.ndarray:
    """What all implementations must return: queries and dequantised pages of a layer."""
    return _as_one(ours(case, x.in_float32(), make_cache(case, jnp.float32), 1, "xla"))


def _as_one(result: jax_attn.FusedQKV) -> np.ndarray:
    pages = []
    for name in ("k", "v"):
        values = np.asarray(getattr(result.cache, f"{name}_pages")[1]).astype(np.float32)
        scale = getattr(result.cache, f"{name}_scale")
        pages.append(values if scale is None else values * np.asarray(scale)[:, None])
    return np.concatenate(
        [np.asarray(a).astype(np.float32).ravel() for a in (result.query, *pages)]
    )


def prepare_jax(case: Case, device: Device, sets: Sequence[Inputs], implementation: Any) -> Runner:
    """Compiles a loop of steps; its cache and results are donated from call to call.

    On a GPU the loop is unrolled: XLA replays its steps as one command buffer.
    """
    unroll = device.platform == "gpu"
    num_steps = case.num_steps(device)
    step = functools.partial(ours, case, implementation=implementation)

    def run(carry: jax_attn.FusedQKV, x: Inputs) -> jax_attn.FusedQKV:
        def one(i: jax.Array, carry: jax_attn.FusedQKV) -> jax_attn.FusedQKV:
            return step(x, carry.cache, (i + 1) % NUM_LAYERS)

        return lax.fori_loop(0, num_steps, one, carry, unroll=unroll)

    compiled = jax.jit(run, donate_argnums=0)
    empty = jax.eval_shape(lambda x: step(x, make_cache(case), 0), sets[0])
    carry = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), empty)
    carry = dataclasses.replace(carry, cache=make_cache(case))

    def call() -> jax_attn.FusedQKV:
        nonlocal carry
        carry = compiled(carry, sets[0])
        return carry

    call()
    return Runner([call], jax.block_until_ready, steps=num_steps)


def _jax_peer(name: str, title: str, implementation: Any) -> Peer:
    prepare = functools.partial(prepare_jax, implementation=implementation)
    return Peer(name, title, lambda device: None, lambda case: None, prepare, _as_one)


def _torch_missing(device: Device) -> str | None:
    return torch_missing(device) or fused_qkv_torch.missing(device)


def _torch_unsupported(case: Case) -> str | None:
    return None if case.cache_dtype is None else "no quantised cache"


PEERS: tuple[Peer, ...] = (
    _jax_peer(OURS, "jax_attn, native", "native"),
    _jax_peer("ours_xla", "jitted jax.numpy, donated cache", "xla"),
    Peer(
        "torch_compile",
        "torch.compile",
        _torch_missing,
        _torch_unsupported,
        fused_qkv_torch.prepare,
        fused_qkv_torch.output,
    ),
)


def _named(base: Case, suffix: str, **changes: Any) -> Case:
    return dataclasses.replace(base, name=f"{base.name}_{suffix}", **changes)


def _at(tokens: Sequence[int], base: Case) -> list[Case]:
    return [_named(base, f"t{n}", tokens=n) for n in tokens]


_QWEN3 = Case("qkv_qwen3_8b", "Qwen3 8B", 1, 32, 8, 128)
_CPU = ("cpu",)
_LONG = dataclasses.replace(_QWEN3, tokens=4096, name="qkv_qwen3_8b_t4096")

CASES: tuple[Case, ...] = (
    *_at((1, 16, 128, 1024, 4096, 8192, 32768), _QWEN3),
    *_at((1, 4096), Case("qkv_qwen3_32b", "Qwen3 32B", 1, 64, 8, 128)),
    *_at(
        (1, 4096),
        Case("qkv_qwen3_next", "Qwen3-Next", 1, 16, 2, 256, rotary_dim=64, gate="interleaved"),
    ),
    *_at((1, 4096), Case("qkv_gpt_oss", "gpt-oss, with norms", 1, 64, 8, 64)),
    _named(_LONG, "f32", dtype="float32", platforms=_CPU),
    _named(_LONG, "int8", cache_dtype="int8"),
    _named(_LONG, "fp8_e4m3", cache_dtype="float8_e4m3fn"),
    Case("qkv_smoke", "none", 5, 4, 2, 32, gate="blocked", dtype="float32", platforms=()),
)
