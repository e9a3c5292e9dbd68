// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "small_seq_matrix_backward.h"
#include "small_seq_matrix_shapes.h"

namespace jax_attn::gpu {

template <>
const void* SmallSeqMatrixBackwardOf<DType::kBFloat16>(const SmallSeqTiles& tiles) {
  return SmallSeqMatrixKernelOf<MatrixBackwardKernels, DType::kBFloat16>(tiles);
}

}  // namespace jax_attn::gpu
