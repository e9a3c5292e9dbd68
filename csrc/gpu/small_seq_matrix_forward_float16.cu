// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "small_seq_matrix_forward.h"
#include "small_seq_matrix_shapes.h"

namespace jax_attn::gpu {

template <>
const void* SmallSeqMatrixForwardOf<DType::kFloat16>(const SmallSeqTiles& tiles) {
  return SmallSeqMatrixKernelOf<MatrixForwardKernels, DType::kFloat16>(tiles);
}

}  // namespace jax_attn::gpu
