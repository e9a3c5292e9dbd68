// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "split_kv_kernels.h"
#include "split_kv_stream.h"

namespace jax_attn::gpu {

#if JAX_ATTN_NVIDIA
namespace {

template <DType kT, int kDim>
const void* KernelOf(int rows) {
  constexpr int kFew = kMatrixRows[0], kMany = kMatrixRows[1];
  if (rows == kFew) return KernelAddress(StreamKernel<kT, kDim, kFew>);
  if constexpr (kDim <= 128) return KernelAddress(StreamKernel<kT, kDim, kMany>);
  return nullptr;
}

template <DType kT>
const void* KernelOf(const KernelShape& shape) {
  switch (shape.max_dim) {
    case 64:
      return KernelOf<kT, 64>(shape.rows);
    case 128:
      return KernelOf<kT, 128>(shape.rows);
    case 256:
      return KernelOf<kT, 256>(shape.rows);
    default:
      return nullptr;
  }
}

}  // namespace

const void* StreamKernelOf(DType dtype, const KernelShape& shape) {
  return dtype == DType::kBFloat16  ? KernelOf<DType::kBFloat16>(shape)
         : dtype == DType::kFloat16 ? KernelOf<DType::kFloat16>(shape)
                                    : nullptr;
}
#else
const void* StreamKernelOf(DType, const KernelShape&) { return nullptr; }
#endif

}  // namespace jax_attn::gpu
