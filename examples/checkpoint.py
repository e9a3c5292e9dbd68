# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Reads and writes checkpoints in the format of Hugging Face (Qwen3 and Llama)."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
from model import ModelConfig, Params

# One token per byte, and one that begins every text.
BYTES_BOS = 256
BYTES_VOCAB_SIZE = 257

# Our name of a layer's array: the modules whose weights are joined in it, and their sizes.
_LAYER = {
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "attention_out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def save(folder: pathlib.Path, config: ModelConfig, params: Params, context: int) -> None:
    """Writes `config.json` and `model.safetensors`, in bfloat16.

    Args:
      folder: Where; made if missing.
      config: Sizes of the model.
      params: Its parameters.
      context: Tokens of the contexts that it was trained on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_to_json(config, context), indent=2) + "\n")
    tensors = {}
    for name, array in _tensors(config, jax.device_get(params)).items():
        tensors[name] = jnp.asarray(np.ascontiguousarray(array), jnp.bfloat16)
    safetensors.flax.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _to_json(config: ModelConfig, context: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": context,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": "bfloat16",
        "bos_token_id": BYTES_BOS if config.vocab_size == BYTES_VOCAB_SIZE else None,
        "eos_token_id": None,
    }


def _tensors(config: ModelConfig, params: Params) -> dict[str, Any]:
    """Returns the tensors of a checkpoint by name: the parameters taken apart, `[out, in]`."""
    tensors = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["norm"]}
    if not config.tied_embeddings:
        tensors["lm_head.weight"] = params["unembed"]
    sizes = _sizes(config)
    for ours, arrays in params["layers"].items():
        ends = np.cumsum([sizes[module] for module in _LAYER[ours]])[:-1]
        for layer in range(config.num_layers):
            parts = np.split(arrays[layer].T, ends)
            for module, part in zip(_LAYER[ours], parts, strict=True):
                tensors[f"model.layers.{layer}.{module}.weight"] = part
    return tensors


def _sizes(config: ModelConfig) -> dict[str, int]:
    """Returns the leading size of each module's weight."""
    q, kv = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "input_layernorm": config.hidden_size,
        "self_attn.q_proj": q,
        "self_attn.k_proj": kv,
        "self_attn.v_proj": kv,
        "self_attn.q_norm": config.head_dim,
        "self_attn.k_norm": config.head_dim,
        "self_attn.o_proj": config.hidden_size,
        "post_attention_layernorm": config.hidden_size,
        "mlp.gate_proj": config.mlp_size,
        "mlp.up_proj": config.mlp_size,
        "mlp.down_proj": config.hidden_size,
    }
