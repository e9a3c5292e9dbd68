// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Which vector kernels there are. Instantiated for each stored type in a file of its own.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_VECTOR_KERNELS_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_VECTOR_KERNELS_H_

#include "split_kv_block.h"
#include "split_kv_kernels.h"
#include "split_kv_vector.h"

namespace jax_attn::gpu {

template <DType kStored, int kSize = 0>
const void* VectorKernelFrom(const KernelShape& shape) {
  constexpr VectorSize size = VectorSizeAt(kStored, kSize);
  if constexpr (size.rows == 0) {
    return nullptr;
  } else {
    if (shape.max_dim == size.max_dim && shape.rows == size.rows) {
      return KernelAddress(SplitKvKernel<VectorCore<kStored, size.max_dim, size.rows>>);
    }
    return VectorKernelFrom<kStored, kSize + 1>(shape);
  }
}

template <DType kStored>
const void* VectorKernelOf(const KernelShape& shape) {
  return VectorKernelFrom<kStored>(shape);
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_VECTOR_KERNELS_H_
