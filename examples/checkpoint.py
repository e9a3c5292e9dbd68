# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Reads and writes checkpoints in the format of Hugging Face (Qwen3 and Llama)."""

import contextlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from model import ModelConfig, Params, param_shapes

# One token per byte, and one that begins every text.
BYTES_BOS = 256
BYTES_VOCAB_SIZE = 257

ARCHITECTURES = ("Qwen3ForCausalLM", "LlamaForCausalLM")
TENSOR_DTYPES = ("F32", "BF16", "F16")
# Options of an architecture that `model.py` does not have, and the value that leaves them out.
_ABSENT_OPTIONS = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
# rope_type: arguments of `jax_attn.Rope`'s constructor of that name, and their keys.
_ROPE_OPTIONS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_positions": "original_max_position_embeddings",
    },
    "yarn": {
        "factor": "factor",
        "original_max_positions": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    },
}
# Our name of a layer's array: the modules whose weights are joined in it.
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


def load(folder: pathlib.Path, dtype: Any = jnp.float32) -> tuple[ModelConfig, Params]:
    """Reads a model from a folder with `config.json` and safetensors, whole or sharded.

    Args:
      folder: The folder.
      dtype: Of the parameters: float32, bfloat16 or float16. Stored ones are converted.

    Returns:
      The sizes of the model and its parameters.

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If the model is of another architecture, or its tensors are not those that the
        configuration asks for.
    """
    config = read_config(folder)
    params = jax.tree.map(lambda s: np.empty(s.shape, dtype), param_shapes(config))
    with contextlib.ExitStack() as stack:
        found = _open_tensors(folder, stack)
        wanted = _tensors(config, params)
        for name, destination in wanted.items():
            if name not in found:
                raise ValueError(f"{folder}: tensor {name} is missing.")
            path, file = found[name]
            stored = file.get_slice(name)
            if stored.get_dtype() not in TENSOR_DTYPES:
                raise ValueError(
                    f"{path}: tensor {name} has dtype {stored.get_dtype()}; supported are "
                    f"{', '.join(TENSOR_DTYPES)}."
                )
            if tuple(stored.get_shape()) != destination.shape:
                raise ValueError(
                    f"{path}: tensor {name} has shape {tuple(stored.get_shape())}, but "
                    f"config.json asks for {destination.shape}."
                )
            destination[...] = file.get_tensor(name).astype(destination.dtype)
        # A tied model may store its matrix twice, and old files hold the rotary frequencies.
        extra = [n for n in found if n not in wanted and n != "lm_head.weight"]
        extra = [n for n in extra if not n.endswith("rotary_emb.inv_freq")]
        if extra:
            raise ValueError(
                f"{folder}: {len(extra)} tensors, such as {extra[0]}, have no place in the model."
            )
    return config, jax.tree.map(jnp.asarray, params)


def save(folder: pathlib.Path, config: ModelConfig, params: Params) -> None:
    """Writes a byte model: `config.json`, and `model.safetensors` in bfloat16.

    Args:
      folder: Where; made if missing.
      config: Sizes of the model, with plain rotary embeddings.
      params: Its parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_to_json(config), indent=2) + "\n")
    tensors = {
        name: np.ascontiguousarray(array.astype(jnp.bfloat16))
        for name, array in _tensors(config, jax.device_get(params)).items()
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_config(folder: pathlib.Path) -> ModelConfig:
    """Reads the sizes of a model from `config.json`; raises as `load` does."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a model is a folder with config.json.")
    values = json.loads(path.read_text())
    architecture = (values.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: architecture {architecture} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}."
        )
    for name, supported in _ABSENT_OPTIONS.items():
        if values.get(name, supported) != supported:
            raise ValueError(f"{path}: {name} = {values[name]} is not supported.")
    qwen3 = architecture == "Qwen3ForCausalLM"
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    try:
        heads = values["num_attention_heads"]
        head_dim = values.get("head_dim") or (128 if qwen3 else values["hidden_size"] // heads)
        return ModelConfig(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            mlp_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_q_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            context=values["max_position_embeddings"],
            norm_epsilon=values["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0),
            **_read_rope(path, rope, values),
            qk_norm=qwen3,
            tied_embeddings=values.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing.") from None


def _read_rope(path: pathlib.Path, rope: dict, values: dict) -> dict[str, Any]:
    """Returns the rotary fields of a `ModelConfig`."""
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in _ROPE_OPTIONS:
        raise ValueError(
            f"{path}: rope_type {rope_type} is not supported; supported are "
            f"{', '.join(_ROPE_OPTIONS)}."
        )
    # The pretraining context, where it is not named, is the context.
    rope = {"original_max_position_embeddings": values["max_position_embeddings"], **rope}
    options = {ours: rope.get(key) for ours, key in _ROPE_OPTIONS[rope_type].items()}
    present = {name: value for name, value in options.items() if value is not None}
    return {"rope_type": rope_type, "rope_options": tuple(present.items())}


def _to_json(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURES[0 if config.qk_norm else 1]],
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
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": "bfloat16",
        "bos_token_id": BYTES_BOS,
        "eos_token_id": None,
    }


def _open_tensors(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Returns for each tensor of a checkpoint the path of its file, and the open file."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        paths = [whole]
    elif index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [folder / name for name in names]
    else:
        raise FileNotFoundError(f"{whole} is missing, and so is {index.name}.")
    found = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {index.name} lists it.")
        file = stack.enter_context(safetensors.safe_open(path, "numpy"))
        found.update({name: (path, file) for name in file.keys()})  # noqa: SIM118, no iterator
    return found


def _tensors(config: ModelConfig, params: Params) -> dict[str, Any]:
    """Returns views of NumPy parameters as the tensors of a checkpoint: taken apart, [out, in]."""
    tensors = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["norm"]}
    if not config.tied_embeddings:
        tensors["lm_head.weight"] = params["unembed"]
    q, kv = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    ends = {"qkv": (q, q + kv), "gate_up": (config.mlp_size,)}
    for ours, arrays in params["layers"].items():
        for layer in range(config.num_layers):
            parts = np.split(arrays[layer].T, ends.get(ours, ()))
            for module, part in zip(_LAYER[ours], parts, strict=True):
                tensors[f"model.layers.{layer}.{module}.weight"] = part
    return tensors
