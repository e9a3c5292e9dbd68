// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "split_kv_vector_kernels.h"

namespace jax_attn::gpu {

template const void* VectorKernelOf<DType::kBFloat16>(const KernelShape&);
template const void* VectorKernelOf<DType::kFloat16>(const KernelShape&);

}  // namespace jax_attn::gpu
