// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "fused_qkv_kernel.h"

namespace jax_attn::gpu {

template const void* FusedQkvKernelOf<DType::kFloat16>(QkvKernel, int);

}  // namespace jax_attn::gpu
