# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""A decoder-only language model in plain JAX: the architecture of Llama and Qwen3.

Parameters are a dict of arrays with the layers stacked on a leading axis, so that a forward pass
is a `lax.scan` over layers and compiles one of them:

    {"embed": [V, D], "layers": {"qkv": [L, D, C], ...}, "norm": [D], "unembed": [V, D]}

where `C = (num_q_heads + 2 * num_kv_heads) * head_dim`: one projection gives query, key and value.
Matrices are stored to be multiplied from the right, `x @ w`. Computation is in the dtype of the
parameters, with norms and rotary embeddings in float32.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    import jax_attn

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a model; hashable, so that it can be a static argument of `jit`.

    Attributes:
      vocab_size: Tokens in the vocabulary.
      hidden_size: Width of the residual stream.
      mlp_size: Width of the gated MLP.
      num_layers: Layers.
      num_q_heads: Query heads.
      num_kv_heads: Key and value heads; a divisor of `num_q_heads`.
      head_dim: Size of a head.
      norm_epsilon: Added to the mean square in RMSNorm.
      context: Tokens of the longest context it was made for.
      rope_theta: Base of the rotary frequencies.
      rope_type: Which constructor of `jax_attn.Rope` makes the rotary tables.
      rope_options: Further arguments of that constructor, as pairs.
      qk_norm: Whether queries and keys are normalised per head (Qwen3) or not (Llama).
      tied_embeddings: Whether logits are made with the embedding matrix.
    """

    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    norm_epsilon: float = 1e-6
    rope_theta: float = 10000.0
    rope_type: str = "default"
    rope_options: tuple[tuple[str, Any], ...] = ()
    qk_norm: bool = True
    tied_embeddings: bool = True


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Mesh axes of `decode` inside `shard_map`.

    Attributes:
      heads: Shards heads and the width of MLPs; sums the residual stream.
      context: Shards every context: each device has the pages of a part of it.
    """

    heads: str
    context: str


def param_shapes(config: ModelConfig) -> Params:
    """Returns the parameters of a model, each as a `jax.ShapeDtypeStruct` of float32."""
    c = config
    heads = c.num_q_heads + 2 * c.num_kv_heads
    layer: dict[str, tuple[int, ...]] = {
        "attention_norm": (c.hidden_size,),
        "qkv": (c.hidden_size, heads * c.head_dim),
        "attention_out": (c.num_q_heads * c.head_dim, c.hidden_size),
        "mlp_norm": (c.hidden_size,),
        "gate_up": (c.hidden_size, 2 * c.mlp_size),
        "down": (c.mlp_size, c.hidden_size),
    }
    if c.qk_norm:
        layer |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
    shapes: dict[str, Any] = {
        "embed": (c.vocab_size, c.hidden_size),
        "layers": {name: (c.num_layers, *shape) for name, shape in layer.items()},
        "norm": (c.hidden_size,),
    }
    if not c.tied_embeddings:
        shapes["unembed"] = (c.vocab_size, c.hidden_size)
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def is_norm(path: tuple[Any, ...]) -> bool:
    """Says whether a path of the parameter tree leads to the weight of a norm."""
    return path[-1].key.endswith("norm")


def init_params(key: jax.Array, config: ModelConfig) -> Params:
    """Returns random float32 parameters: norms 1, matrices normal with a deviation of 0.02.

    The two matrices of a layer that write to the residual stream start smaller, so that its
    variance does not grow with depth (GPT-2).
    """
    flat, tree = jax.tree.flatten_with_path(param_shapes(config))
    leaves = []
    for leaf_key, (path, leaf) in zip(jax.random.split(key, len(flat)), flat, strict=True):
        if is_norm(path):
            leaves.append(jnp.ones(leaf.shape, leaf.dtype))
            continue
        residual = path[-1].key in ("attention_out", "down")
        deviation = 0.02 / math.sqrt(2 * config.num_layers) if residual else 0.02
        leaves.append(deviation * jax.random.normal(leaf_key, leaf.shape, leaf.dtype))
    return jax.tree.unflatten(tree, leaves)


def train_logits(
    params: Params, config: ModelConfig, tokens: jax.Array, attention: str = "xla"
) -> jax.Array:
    """Returns the logits of the token after each, with plain causal attention and no cache.

    Args:
      params: Parameters.
      config: Sizes of the model.
      tokens: int32 `[batch, length]`.
      attention: `implementation` of `jax.nn.dot_product_attention`, "xla" or "cudnn".

    Returns:
      float32 `[batch, length, vocab_size]`.
    """
    c = config
    batch, length = tokens.shape
    cos, sin = _rope(c, jnp.arange(length, dtype=jnp.int32)[None])

    def layer(x: jax.Array, w: Params) -> tuple[jax.Array, None]:
        qkv = _dot(rms_norm(x, w["attention_norm"], c.norm_epsilon), w["qkv"])
        q, k, v = _split_heads(c, qkv)
        if c.qk_norm:
            q = rms_norm(q, w["q_norm"], c.norm_epsilon)
            k = rms_norm(k, w["k_norm"], c.norm_epsilon)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=attention)
        x = x + _dot(out.reshape(batch, length, -1), w["attention_out"])
        return x + _mlp(c, x, w), None

    # Not a lookup: its gradient adds thousands of rows to the same few of a small vocabulary, by
    # atomics that collide on a GPU, and a training step takes eight times as long.
    one_hot = jax.nn.one_hot(tokens, c.vocab_size, dtype=params["embed"].dtype)
    x, _ = lax.scan(layer, _dot(one_hot, params["embed"]), params["layers"])
    return unembed(params, config, rms_norm(x, params["norm"], c.norm_epsilon))


def make_rope(config: ModelConfig, max_positions: int) -> jax_attn.Rope:
    """Returns the rotary tables that `decode` takes, for positions below `max_positions`."""
    import jax_attn  # Here, so that training does not need it.

    constructor = getattr(jax_attn.Rope, config.rope_type)
    options = dict(config.rope_options)
    return constructor(config.head_dim, max_positions, theta=config.rope_theta, **options)


def decode(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    cache: jax_attn.PagedKVCache,
    page_table: jax.Array,
    kv_lengths: jax.Array,
    rope: jax_attn.Rope,
    *,
    implementation: str | None = None,
    qkv_implementation: str | None = None,
    axes: MeshAxes | None = None,
) -> tuple[jax.Array, jax_attn.PagedKVCache]:
    """Runs new tokens over the cached ones before them: prefill and decoding alike.

    The new tokens are the last of each context. Where a context is shorter than `length`, its
    tokens stand at the right, and the padding before them has negative positions: it is not
    written to the cache and attends to nothing.

    Args:
      params: Parameters.
      config: Sizes of the model.
      tokens: int32 `[batch, length]`, the new tokens.
      cache: Pages of all layers; donate it to have it updated in place.
      page_table: int32 `[batch, max_pages]`, with pages for the new tokens too.
      kv_lengths: int32 `[batch]`, tokens of each context with the new ones.
      rope: Tables of `make_rope`.
      implementation: Of the attention: "native", "xla", or None for the compiled kernels where
        there are some.
      qkv_implementation: Of the pass from the QKV projection to the cache, likewise.
      axes: The mesh axes, inside `shard_map`. `config` then has the heads of one device, and
        `page_table` is the part of the contexts that it keeps.

    Returns:
      Hidden states `[batch, length, hidden_size]`, for `unembed`, and the updated cache.
    """
    import jax_attn

    c = config
    batch, length = tokens.shape
    positions = kv_lengths[:, None] - length + jnp.arange(length, dtype=jnp.int32)[None]
    first = jnp.int32(0)
    if axes is not None:
        first = lax.axis_index(axes.context) * (page_table.shape[1] * cache.page_size)
    # A token outside this part of its context has no slot in it, and is not written.
    slots = cache.slots(page_table, positions - first).reshape(-1)
    positions = positions.reshape(-1)

    def over_heads(part: jax.Array) -> jax.Array:
        return part if axes is None else lax.psum(part, axes.heads)

    # The cache of all layers is carried, never scanned over: it is updated in place.
    def layer(carry: Any, inputs: Any) -> tuple[Any, None]:
        x, cache = carry
        w, index = inputs
        qkv = _dot(rms_norm(x, w["attention_norm"], c.norm_epsilon), w["qkv"])
        norm = jax_attn.QKNorm(w["q_norm"], w["k_norm"], c.norm_epsilon) if c.qk_norm else None
        new = jax_attn.fused_qkv_rope_cache(
            qkv.reshape(batch * length, -1),
            cache,
            slots,
            num_q_heads=c.num_q_heads,
            positions=positions,
            rope=rope,
            qk_norm=norm,
            layer=index,
            implementation=qkv_implementation,
        )
        out = jax_attn.paged_attention(
            new.query.reshape(batch, length, c.num_q_heads, c.head_dim),
            new.cache,
            page_table,
            kv_lengths,
            layer=index,
            causal="bottom_right",
            axis_name=None if axes is None else axes.context,
            implementation=implementation,
        )
        x = x + over_heads(_dot(out.reshape(batch, length, -1), w["attention_out"]))
        return (x + over_heads(_mlp(c, x, w)), new.cache), None

    indices = jnp.arange(c.num_layers, dtype=jnp.int32)
    start = (params["embed"][tokens], cache)
    (x, cache), _ = lax.scan(layer, start, (params["layers"], indices))
    return rms_norm(x, params["norm"], c.norm_epsilon), cache


def unembed(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Returns float32 logits `[..., vocab_size]` of hidden states `[..., hidden_size]`."""
    table = params["embed" if config.tied_embeddings else "unembed"]
    return jnp.einsum(
        "...d,vd->...v",
        hidden,
        table,
        precision=_precision(hidden.dtype),
        preferred_element_type=jnp.float32,
    )


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """Divides the last axis by its root mean square, in float32, and multiplies by `weight`."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    weight = jnp.expand_dims(weight.astype(jnp.float32), range(x.ndim - 1))
    return (x32 * weight).astype(x.dtype)


def _mlp(config: ModelConfig, x: jax.Array, w: Params) -> jax.Array:
    """Returns what the gated MLP of a layer adds to the residual stream."""
    x = _dot(rms_norm(x, w["mlp_norm"], config.norm_epsilon), w["gate_up"])
    gate, up = jnp.split(x, 2, axis=-1)
    return _dot(jax.nn.silu(gate) * up, w["down"])


def _split_heads(config: ModelConfig, qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits the packed projection `[..., C]` into query, key and value `[..., heads, H]`."""
    heads = qkv.reshape(*qkv.shape[:-1], -1, config.head_dim)
    ends = (config.num_q_heads, config.num_q_heads + config.num_kv_heads)
    q, k, v = jnp.split(heads, ends, axis=-2)
    return q, k, v


def _rope(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines of positions `[B, T]`, float32 `[B, T, 1, H / 2]`."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs made of the two halves of a head (NeoX), in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("...i,io->...o", x, w, precision=_precision(x.dtype))


def _precision(dtype: Any) -> lax.Precision:
    # float32 means float32, also on GPUs whose default for it is TF32.
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
