// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "split_kv_matrix_kernels.h"

namespace jax_attn::gpu {

template const void* MatrixKernelOf<DType::kFloat16, DType::kFloat16>(const KernelShape&);

}  // namespace jax_attn::gpu
