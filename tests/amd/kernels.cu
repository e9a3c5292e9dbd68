// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Kernels whose code is checked for every AMD target (tests/amd/check_code.py): of each core and
// width of stored numbers the sizes that models use most.

#include "../../csrc/gpu/split_kv_matrix_kernels.h"
#include "../../csrc/gpu/split_kv_merge.cu"
#include "../../csrc/gpu/split_kv_vector_kernels.h"

namespace jax_attn::gpu {

#define KERNEL(...) \
  template __global__ void SplitKvKernel<__VA_ARGS__>(SplitKvAttentionParams, SplitWork)
KERNEL(MatrixCore<DType::kBFloat16, DType::kBFloat16, 128, 16, false>);
KERNEL(MatrixCore<DType::kBFloat16, DType::kBFloat16, 128, 16, true>);
KERNEL(MatrixCore<DType::kFloat16, DType::kFloat16, 64, 32, false>);
KERNEL(MatrixCore<DType::kBFloat16, DType::kInt8, 128, 16, true>);
KERNEL(MatrixCore<DType::kBFloat16, DType::kFloat8E4M3FN, 128, 16, true>);
KERNEL(VectorCore<DType::kFloat32, 128, 2>);
KERNEL(VectorCore<DType::kFloat32, 128, 8>);
KERNEL(VectorCore<DType::kBFloat16, 128, 8>);
#undef KERNEL

}  // namespace jax_attn::gpu
