// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "small_seq_backward.h"
#include "small_seq_shapes.h"

namespace jax_attn::gpu {

template <>
const void* SmallSeqBackwardOf<DType::kFloat16>(const SmallSeqShape& shape) {
  return SmallSeqKernelOf<BackwardKernels, DType::kFloat16>(shape);
}

}  // namespace jax_attn::gpu
