// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "small_seq_forward.h"
#include "small_seq_shapes.h"

namespace jax_attn::gpu {

template <>
const void* SmallSeqForwardOf<DType::kFloat32>(const SmallSeqShape& shape) {
  return SmallSeqKernelOf<ForwardKernels, DType::kFloat32>(shape);
}

}  // namespace jax_attn::gpu
