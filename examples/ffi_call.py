# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Calls the native handler of split-KV attention directly, without jax_attn's JAX functions.

    python examples/ffi_call.py

The operands, attributes and results are those documented in csrc/ffi/split_kv_attention.h.
"""

import jax
import jax.numpy as jnp
import numpy as np

import jax_attn

BATCH, QUERY_LEN, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, KV_LEN = 2, 1, 8, 2, 64, 1024


@jax.jit
def attend(query: jax.Array, key: jax.Array, value: jax.Array, kv_lengths: jax.Array) -> jax.Array:
    """One query per sequence against the first `kv_lengths` keys."""
    workspace_size = jax_attn.ffi.split_kv_workspace_size(
        "cpu",
        batch=BATCH,
        query_len=QUERY_LEN,
        num_q_heads=NUM_Q_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        kv_len=KV_LEN,
    )
    call = jax.ffi.ffi_call(
        "jax_attn_split_kv_attention",
        (
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32),
            jax.ShapeDtypeStruct((workspace_size,), jnp.float32),
        ),
    )
    out, _, _ = call(
        query,
        key,
        value,
        kv_lengths,
        operands="kv_lengths",
        variant="",
        scale=np.float32(HEAD_DIM**-0.5),
        causal=np.int32(0),
        sliding_window=np.int64(0),
        logits_soft_cap=np.float32(0),
        num_splits=np.int64(0),
        split_size=np.int64(0),
        lse_includes_sinks=True,
        page_layout=np.int32(0),
        k_scale_rank=np.int32(0),
        v_scale_rank=np.int32(0),
    )
    return out


def main() -> float:
    """Compares the handler with the jax.numpy implementation; returns the largest difference."""
    print("registered for:", ", ".join(jax_attn.ffi.register()))
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (BATCH, QUERY_LEN, NUM_Q_HEADS, HEAD_DIM))
    key, value = (jax.random.normal(k, (BATCH, KV_LEN, NUM_KV_HEADS, HEAD_DIM)) for k in keys[1:])
    kv_lengths = jnp.array([700, 1024], jnp.int32)
    out = attend(query, key, value, kv_lengths)
    expected = jax_attn.split_kv_attention(
        query, key, value, kv_lengths=kv_lengths, implementation="xla"
    )
    difference = float(jnp.max(jnp.abs(out - expected)))
    print(f"largest difference from jax.numpy: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
