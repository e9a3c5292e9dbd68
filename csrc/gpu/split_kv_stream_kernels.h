// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Which stream kernels there are. Instantiated for types of keys and values in files of their own.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_STREAM_KERNELS_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_STREAM_KERNELS_H_

#include "split_kv_kernels.h"
#include "split_kv_stream.h"

namespace jax_attn::gpu {

#if JAX_ATTN_NVIDIA
template <DType kStored, int kDim>
const void* StreamKernel(int rows) {
  constexpr int kFew = kMatrixRows[0], kMany = kMatrixRows[1];
  if (rows == kFew) return KernelAddress(StreamSplitKernel<kStored, kDim, kFew>);
  if constexpr (kDim <= 128) return KernelAddress(StreamSplitKernel<kStored, kDim, kMany>);
  return nullptr;
}

template <DType kStored>
const void* StreamKernelOf(const KernelShape& shape) {
  switch (shape.max_dim) {
    case 64:
      return StreamKernel<kStored, 64>(shape.rows);
    case 128:
      return StreamKernel<kStored, 128>(shape.rows);
    case 256:
      return StreamKernel<kStored, 256>(shape.rows);
    default:
      return nullptr;
  }
}
#else
template <DType>
const void* StreamKernelOf(const KernelShape&) {
  return nullptr;
}
#endif

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_STREAM_KERNELS_H_
