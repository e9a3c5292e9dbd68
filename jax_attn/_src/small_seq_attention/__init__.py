# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
