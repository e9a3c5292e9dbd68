// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "split_kv_stream_kernels.h"

namespace jax_attn::gpu {

template const void* StreamKernelOf<DType::kInt8>(const KernelShape&);

}  // namespace jax_attn::gpu
