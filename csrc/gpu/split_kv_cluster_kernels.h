// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Which cluster kernels there are: as many as stream kernels. Instantiated for types of keys and
// values in files of their own.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_CLUSTER_KERNELS_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_CLUSTER_KERNELS_H_

#include "split_kv_cluster.h"
#include "split_kv_kernels.h"

namespace jax_attn::gpu {

#if JAX_ATTN_NVIDIA
template <DType kStored, int kDim>
const void* ClusterKernel(int rows) {
  constexpr int kFew = kMatrixRows[0], kMany = kMatrixRows[1];
  if (rows == kFew) return KernelAddress(ClusterSplitKernel<kStored, kDim, kFew>);
  if constexpr (kDim <= 128) return KernelAddress(ClusterSplitKernel<kStored, kDim, kMany>);
  return nullptr;
}

template <DType kStored>
const void* ClusterKernelOf(const KernelShape& shape) {
  switch (shape.max_dim) {
    case 64:
      return ClusterKernel<kStored, 64>(shape.rows);
    case 128:
      return ClusterKernel<kStored, 128>(shape.rows);
    case 256:
      return ClusterKernel<kStored, 256>(shape.rows);
    default:
      return nullptr;
  }
}
#else
template <DType>
const void* ClusterKernelOf(const KernelShape&) {
  return nullptr;
}
#endif

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_CLUSTER_KERNELS_H_
