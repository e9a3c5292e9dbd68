// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The kernels that are compiled, for host code. All but stream kernels take SplitKvAttentionParams
// and SplitWork.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_KERNELS_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_KERNELS_H_

#include "../dtype.h"
#include "split_kv_kernel.h"
#include "vendor.h"

namespace jax_attn::gpu {

// Sizes of the vector kernels: up to `max_dim` elements of a head, `rows` query rows.
struct VectorSize {
  int max_dim = 0;
  int rows = 0;
};

// The smallest first; without rows after the last. What is no wider than 16 bits usually goes to
// matrix kernels, so that there are few for it.
constexpr VectorSize VectorSizeAt(DType stored, int i) {
  constexpr VectorSize kMany[] = {{128, 2}, {128, 8}, {256, 4}, {512, 2}, {}};
  constexpr VectorSize kFew[] = {{128, 8}, {512, 4}, {}};
  return stored == DType::kFloat32 ? kMany[i] : kFew[i];
}

// Kernels of a type of queries and of stored keys and values; null if there is none of a shape.
template <DType kQuery, DType kStored>
const void* MatrixKernelOf(const KernelShape& shape);
template <DType kStored>
const void* VectorKernelOf(const KernelShape& shape);

// Stream kernels, of a type of keys and values: the same as that of queries, or 8 bits wide. They
// take two tensor maps, of keys and of values, StreamParams or ScaledStreamParams, and SplitWork.
template <DType kStored>
const void* StreamKernelOf(const KernelShape& shape);
// The same for small calls.
template <DType kStored>
const void* ClusterKernelOf(const KernelShape& shape);

const void* MergeKernelOf();
const void* StreamMergeKernelOf();
inline constexpr int kMergeThreads = 128;  // columns of head_dim 512, by four

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_KERNELS_H_
