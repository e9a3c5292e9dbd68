// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "split_kv_cluster_kernels.h"

namespace jax_attn::gpu {

template const void* ClusterKernelOf<DType::kBFloat16>(const KernelShape&);
template const void* ClusterKernelOf<DType::kFloat16>(const KernelShape&);

}  // namespace jax_attn::gpu
