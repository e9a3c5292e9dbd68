# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Named problems of attention decode, with the model whose shapes they have."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

import jax_attn


@dataclasses.dataclass(frozen=True)
class Case:
    """One decode step over a cache that is already filled.

    Every sequence has `context` keys. The buffer may be longer (`buffer`), as a serving loop
    allocates it.
    """

    name: str
    model: str
    batch: int
    num_q_heads: int
    num_kv_heads: int
    context: int
    head_dim: int
    query_len: int = 1
    dtype: str = "bfloat16"
    cache_dtype: str | None = None  # None: dtype
    page_size: int | None = None  # None: a dense cache
    buffer: int | None = None  # None: context
    causal: str | None = None
    sliding_window: int | None = None
    sinks: bool = False
    logits_soft_cap: float | None = None
    rotate: bool = True  # False: the same inputs every call, which may stay in a cache
    platforms: tuple[str, ...] = ("cpu", "gpu")  # where the case runs without being asked for

    @property
    def stored_dtype(self) -> str:
        """Element type of keys and values."""
        return self.cache_dtype or self.dtype

    @property
    def quantized(self) -> bool:
        """Whether keys and values carry scales."""
        return self.cache_dtype is not None and self.cache_dtype != self.dtype

    @property
    def kv_len(self) -> int:
        """Keys that the buffer of a sequence holds; whole pages of a paged cache."""
        length = self.buffer or self.context
        return length if self.page_size is None else -(-length // self.page_size) * self.page_size

    @property
    def needs_mask(self) -> bool:
        """Whether an implementation without lengths, windows or alignment needs a mask."""
        causal = self.causal is not None and self.query_len > 1
        return causal or self.sliding_window is not None or self.kv_len > self.context

    @property
    def num_bytes(self) -> int:
        """Bytes that any implementation must move: visible keys and values, query and output."""
        visible = self.context
        if self.sliding_window is not None:
            visible = min(visible, self.sliding_window + self.query_len - 1)
        kv = 2 * self.batch * visible * self.num_kv_heads * self.head_dim
        qo = 2 * self.batch * self.query_len * self.num_q_heads * self.head_dim
        return kv * _item_size(self.stored_dtype) + qo * _item_size(self.dtype)

    @property
    def shape(self) -> dict[str, Any]:
        """What a report says of the case."""
        sizes = (self.batch, self.query_len, self.num_q_heads, self.num_kv_heads)
        return {
            "shape_btnksh": [*sizes, self.context, self.head_dim],
            "page_size": self.page_size,
            "kv_len": self.kv_len,
        }

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the whole cache."""
        elements = 2 * self.batch * self.kv_len * self.num_kv_heads * self.head_dim
        return elements * _item_size(self.stored_dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of a case. Keys and values are `[B, S, K, H]`, or pages of them."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    kv_lengths: jax.Array
    page_table: jax.Array | None = None
    sinks: jax.Array | None = None
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @property
    def cache(self) -> jax_attn.PagedKVCache:
        """The paged cache."""
        return jax_attn.PagedKVCache(self.key, self.value, self.k_scale, self.v_scale)

    def in_float32(self) -> "Inputs":
        """The same values with a float32 query, so that results are float32."""
        return dataclasses.replace(self, query=self.query.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def make_inputs(case: Case, seed: int) -> Inputs:
    """Returns random normal inputs. Pages are a random permutation of the whole pool."""
    keys = jax.random.split(jax.random.key(seed), 5)
    heads = (case.num_kv_heads, case.head_dim)
    page_table = None
    if case.page_size is None:
        shape: tuple[int, ...] = (case.batch, case.kv_len, *heads)
    else:
        num_pages = case.batch * (case.kv_len // case.page_size)
        shape = (num_pages, case.page_size, *heads)
        page_table = jax.random.permutation(keys[3], num_pages).astype(jnp.int32)
        page_table = page_table.reshape(case.batch, -1)
    query_shape = (case.batch, case.query_len, case.num_q_heads, case.head_dim)
    scale = jnp.asarray(_STEP, jnp.float32) if case.quantized else None
    return Inputs(
        query=jax.random.normal(keys[0], query_shape, jnp.dtype(case.dtype)),
        key=_stored(keys[1], shape, case),
        value=_stored(keys[2], shape, case),
        kv_lengths=jnp.full((case.batch,), case.context, jnp.int32),
        page_table=page_table,
        sinks=jax.random.normal(keys[4], (case.num_q_heads,)) if case.sinks else None,
        k_scale=scale,
        v_scale=scale,
    )


# Quantised values are normals over this step: 4 sigma fill int8, and float8 is well in range.
_STEP = 1 / 32


def _stored(key: jax.Array, shape: tuple[int, ...], case: Case) -> jax.Array:
    if not case.quantized:
        return jax.random.normal(key, shape, jnp.dtype(case.dtype))
    values = jax.random.normal(key, shape) / _STEP
    if case.stored_dtype == "int8":
        values = jnp.clip(jnp.round(values), -127, 127)
    return values.astype(jnp.dtype(case.stored_dtype))


def _item_size(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


def _derived(base: Case, suffix: str, **changes: Any) -> Case:
    return dataclasses.replace(base, name=f"{base.name}_{suffix}", **changes)


LLAMA_8B = Case("llama3_8b_b1_s16k", "Llama-3 8B", 1, 32, 8, 16384, 128)
LLAMA_8B_BATCH = Case("llama3_8b_b8_s2k", "Llama-3 8B", 8, 32, 8, 2048, 128)
LLAMA_7B = Case("llama2_7b_b1_s4k", "Llama-2 7B", 1, 32, 32, 4096, 128)
LLAMA_70B = Case("llama3_70b_b1_s16k", "Llama-3 70B", 1, 64, 8, 16384, 128)
TENSOR_PARALLEL = Case("llama3_70b_tp8_b16_s8k", "Llama-3 70B, 1 of 8", 16, 8, 1, 8192, 128)
GEMMA = Case("gemma2_9b_b1_s8k", "Gemma 2 9B", 1, 16, 8, 8192, 256, logits_soft_cap=50.0)
GPT_OSS = Case(
    "gpt_oss_b64_s1k_window", "gpt-oss", 64, 64, 8, 1024, 64, sliding_window=128, sinks=True
)
SMALL = Case("small_b4_s512", "Llama-3 8B", 4, 32, 8, 512, 128)

CPU = ("cpu",)
GPU = ("gpu",)

_DENSE = (
    *(LLAMA_8B, LLAMA_8B_BATCH, LLAMA_7B, LLAMA_70B, TENSOR_PARALLEL, GEMMA, GPT_OSS),
    *(
        _derived(case, "f32", dtype="float32", platforms=CPU)
        for case in (LLAMA_8B, LLAMA_8B_BATCH, LLAMA_7B, LLAMA_70B)
    ),
    _derived(LLAMA_8B, "t4", query_len=4, causal="bottom_right"),
    SMALL,
    _derived(SMALL, "f32", dtype="float32", platforms=CPU),
    _derived(SMALL, "cached", rotate=False),
)

# The H200 set: 8 to 1075 MB of keys and values.
_DENSE_GPU = tuple(
    dataclasses.replace(case, platforms=GPU)
    for case in (
        Case("llama3_8b_b1_s128k", "Llama-3 8B", 1, 32, 8, 131072, 128),
        Case("llama2_7b_b1_s32k", "Llama-2 7B", 1, 32, 32, 32768, 128),
        Case("llama3_8b_b8_s8k", "Llama-3 8B", 8, 32, 8, 8192, 128),
        Case("llama3_70b_b16_s8k", "Llama-3 70B", 16, 64, 8, 8192, 128),
        Case("llama3_8b_b64_s4k", "Llama-3 8B", 64, 32, 8, 4096, 128),
        Case("llama3_8b_b128_s1k", "Llama-3 8B", 128, 32, 8, 1024, 128),
        Case("gpt_oss_b8_s8k_full", "gpt-oss, full layers", 8, 64, 8, 8192, 64),
        Case("gemma_b8_s8k_nocap", "Gemma 3 12B", 8, 16, 8, 8192, 256),
    )
)

_PAGED = tuple(
    _derived(case, f"page{page_size}", page_size=page_size)
    for case in (
        *(LLAMA_8B, LLAMA_8B_BATCH, LLAMA_7B, LLAMA_70B, TENSOR_PARALLEL, GEMMA, GPT_OSS, SMALL),
        *_DENSE_GPU,
    )
    for page_size in (16, 64, 128)
)

_QUANTIZED = tuple(
    _derived(case, suffix, cache_dtype=cache_dtype)
    for case in (
        *(LLAMA_8B, LLAMA_70B, _derived(LLAMA_8B, "page16", page_size=16)),
        *_DENSE_GPU,
        *(_derived(case, "page16", page_size=16) for case in _DENSE_GPU),
    )
    for suffix, cache_dtype in {
        "int8": "int8",
        "fp8_e4m3": "float8_e4m3fn",
        "fp8_e5m2": "float8_e5m2",
    }.items()
)

# The three studies. The two sides of a comparison have the same inputs at every call, because
# the longer side has no room for as many sets as the shorter.
_BUFFER = Case("study_buffer", "Llama-3 8B", 1, 32, 8, 2048, 128, rotate=False)
_WINDOW = dataclasses.replace(
    GPT_OSS, name="study_window", batch=4, context=128, sinks=False, rotate=False
)
_LINEAR = Case("study_linear", "Llama-3 70B, 1 of 8", 1, 8, 1, 1024, 128)

_STUDIES = (
    _derived(_BUFFER, "x1"),
    _derived(_BUFFER, "x32", buffer=32 * _BUFFER.context),
    *(_derived(_LINEAR, f"{2**n}k", context=1024 << n) for n in range(0, 11, 2)),
    _derived(_WINDOW, "s128"),
    _derived(_WINDOW, "s128k", context=131072),
)

# Runs only when asked for: checks that the program works.
_TINY = Case("smoke", "none", 2, 4, 2, 50, 32, rotate=False, platforms=())
_SMOKE = (
    _derived(_TINY, "f32", dtype="float32", buffer=64),
    _derived(_TINY, "page16", page_size=16),
    _derived(_TINY, "int8", cache_dtype="int8"),
)

CASES = (*_DENSE, *_DENSE_GPU, *_PAGED, *_QUANTIZED, *_STUDIES, *_SMOKE)
