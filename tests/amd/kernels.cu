// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Kernels whose code is checked for every AMD target (tests/amd/check_code.py): of each core and
// width of stored numbers the sizes that models use most.

#include "../../csrc/gpu/fused_qkv_kernel.h"
#include "../../csrc/gpu/small_seq_backward.h"
#include "../../csrc/gpu/small_seq_forward.h"
#include "../../csrc/gpu/small_seq_matrix_backward.h"
#include "../../csrc/gpu/small_seq_matrix_forward.h"
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
KERNEL(VectorCore<DType::kInt8, 128, 8>);
#undef KERNEL

#define KERNELS(...)                                                              \
  template __global__ void SmallSeqMatrixForward<TileShape<__VA_ARGS__>, false>(  \
      SmallSeqAttentionParams, SmallSeqWork);                                     \
  template __global__ void SmallSeqMatrixBackward<TileShape<__VA_ARGS__>, false>( \
      SmallSeqBackwardParams, SmallSeqWork)
KERNELS(DType::kBFloat16, 16, 16, 128, 1);
KERNELS(DType::kFloat16, 16, 16, 64, 1);
KERNELS(DType::kBFloat16, 16, 16, 128, 2);
#undef KERNELS

// Those that need the most registers: packed, heads that share a tile, tiles that follow each
// other.
#define KERNEL(direction, params, packed, ...)                                        \
  template __global__ void SmallSeqMatrix##direction<TileShape<__VA_ARGS__>, packed>( \
      SmallSeq##params##Params, SmallSeqWork)
KERNEL(Backward, Backward, true, DType::kBFloat16, 16, 16, 128, 1);
KERNEL(Backward, Backward, true, DType::kFloat16, 16, 16, 128, 1, false, 4);
KERNEL(Backward, Backward, true, DType::kBFloat16, 16, 16, kManyRowsBackwardDim, 1, true);
KERNEL(Backward, Backward, false, DType::kFloat16, 16, 16, kManyRowsBackwardDim, 2, true);
KERNEL(Forward, Attention, true, DType::kBFloat16, 16, 16, kManyRowsForwardDim, 1, true);
#undef KERNEL

#define KERNELS(keys, ...)                                                             \
  template __global__ void SmallSeqForward<__VA_ARGS__, keys>(SmallSeqAttentionParams, \
                                                              SmallSeqWork);           \
  template __global__ void SmallSeqBackward<__VA_ARGS__, keys>(SmallSeqBackwardParams, SmallSeqWork)
KERNELS(8, Team<DType::kBFloat16, 16, 1>);
KERNELS(0, Team<DType::kBFloat16, 16, 1>);
KERNELS(4, Team<DType::kBFloat16, 32, 2>);
KERNELS(8, Team<DType::kFloat32, 32, 1>);
KERNELS(0, Team<DType::kFloat32, 32, 4>);
#undef KERNELS

template __global__ void FusedQkvFewKernel<DType::kBFloat16, kPieceSize>(FusedQkvFewWork);
template __global__ void FusedQkvPlainKernel<DType::kBFloat16, kPieceSize, true>(FusedQkvPlainWork);
template __global__ void FusedQkvManyKernel<DType::kBFloat16, false>(FusedQkvPlainWork);
template __global__ void FusedQkvManyKernel<DType::kBFloat16, true>(FusedQkvPlainWork);
#define KERNEL(kernel)                                                                       \
  template __global__ void FusedQkvKernel<DType::kBFloat16, QkvKernel::kernel>(FusedQkvWork, \
                                                                               QkvBatch)
KERNEL(kHalves);
KERNEL(kNeighbours);
KERNEL(kAnywhere);
#undef KERNEL

}  // namespace jax_attn::gpu
