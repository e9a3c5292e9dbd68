# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""The element types that the operations accept."""

import jax.numpy as jnp

FLOAT_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

# Cache formats that are dequantised by a scale. The two e4m3 formats differ in range and in
# the meaning of 0x80, so they are never exchanged for each other.
QUANTIZED_DTYPES = (
    jnp.int8,
    jnp.float8_e4m3fn,
    jnp.float8_e4m3fnuz,
    jnp.float8_e5m2,
)

CACHE_DTYPES = FLOAT_DTYPES + QUANTIZED_DTYPES
