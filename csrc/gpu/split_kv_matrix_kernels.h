// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Which matrix kernels there are. Instantiated for each pair of types in a file of its own.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_MATRIX_KERNELS_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_MATRIX_KERNELS_H_

#include "split_kv_block.h"
#include "split_kv_kernels.h"
#include "split_kv_matrix.h"

namespace jax_attn::gpu {

template <DType kT, DType kStored, int kMaxDim, int kRows, bool kExtras>
const void* MatrixKernel() {
  return KernelAddress(SplitKvKernel<MatrixCore<kT, kStored, kMaxDim, kRows, kExtras>>);
}

// Kernels of 8-bit types always look for extras, and leave the largest heads to vector kernels.
template <DType kT, DType kStored, int kMaxDim, int kRows>
const void* MatrixKernelWith(bool extras) {
  if constexpr (SizeOf(kStored) == 2) {
    if (!extras) return MatrixKernel<kT, kStored, kMaxDim, kRows, false>();
  }
  return extras ? MatrixKernel<kT, kStored, kMaxDim, kRows, true>() : nullptr;
}

template <DType kT, DType kStored>
const void* MatrixKernelOf(const KernelShape& shape) {
  constexpr int kFew = kMatrixRows[0], kMany = kMatrixRows[1];
  const bool many = shape.rows == kMany;
  switch (shape.max_dim) {
    case 128:
      return many ? MatrixKernelWith<kT, kStored, 128, kMany>(shape.extras)
                  : MatrixKernelWith<kT, kStored, 128, kFew>(shape.extras);
    case 256:
      return many ? MatrixKernelWith<kT, kStored, 256, kMany>(shape.extras)
                  : MatrixKernelWith<kT, kStored, 256, kFew>(shape.extras);
  }
  if constexpr (SizeOf(kStored) == 2) {
    if (shape.max_dim == 64) {
      return many ? MatrixKernelWith<kT, kStored, 64, kMany>(shape.extras)
                  : MatrixKernelWith<kT, kStored, 64, kFew>(shape.extras);
    }
    if (shape.max_dim == 512 && !many)
      return MatrixKernelWith<kT, kStored, 512, kFew>(shape.extras);
  }
  return nullptr;
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_MATRIX_KERNELS_H_
