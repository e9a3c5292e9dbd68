// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The kernels of the fused QKV pass that are compiled, for host code. kFew takes a FusedQkvFewWork,
// other plain ones a FusedQkvPlainWork, the others a FusedQkvWork and a QkvBatch.

#ifndef JAX_ATTN_CSRC_GPU_FUSED_QKV_KERNELS_H_
#define JAX_ATTN_CSRC_GPU_FUSED_QKV_KERNELS_H_

#include "../dtype.h"
#include "fused_qkv_work.h"

namespace jax_attn::gpu {

inline constexpr int kMaxFusedQkvThreads = 128;
inline constexpr int kFusedQkvFewThreads = 128;

template <DType kDType>
const void* FusedQkvKernelOf(QkvKernel kernel, int piece_size);

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_FUSED_QKV_KERNELS_H_
