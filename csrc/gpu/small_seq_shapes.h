// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Which kernels there are. Instantiated for each type and direction in a file of its own.

#ifndef JAX_ATTN_CSRC_GPU_SMALL_SEQ_SHAPES_H_
#define JAX_ATTN_CSRC_GPU_SMALL_SEQ_SHAPES_H_

#include <cstddef>
#include <iterator>

#include "small_seq_kernels.h"
#include "small_seq_team.h"

namespace jax_attn::gpu {

template <typename Kernels, typename Lanes, std::size_t kIndex = 0>
const void* SmallSeqOneRowKernel(int keys) {
  if constexpr (kIndex == std::size(kOneRowKeys)) {
    return nullptr;
  } else {
    constexpr int kKeys = kOneRowKeys[kIndex];
    if constexpr (kKeys * Lanes::kPieces <= Kernels::kMaxPieces) {
      if (keys == kKeys) return Kernels::template Of<Lanes, kKeys>();
    }
    return SmallSeqOneRowKernel<Kernels, Lanes, kIndex + 1>(keys);
  }
}

// `Kernels::template Of<Team, keys>()` is a kernel.
template <typename Kernels, DType kDType, int kLanes, int kPieces>
const void* SmallSeqKernelOfTeam(const SmallSeqShape& shape) {
  using Lanes = Team<kDType, kLanes, kPieces>;
  if (shape.lanes != kLanes || shape.pieces != kPieces) return nullptr;
  if (shape.keys == 0) return Kernels::template Of<Lanes, 0>();
  // float32 has kernels for one row only of its usual size.
  if constexpr (kDType != DType::kFloat32 || (kLanes == 32 && kPieces == 1)) {
    return SmallSeqOneRowKernel<Kernels, Lanes>(shape.keys);
  }
  return nullptr;
}

template <typename Kernels, DType kDType>
const void* SmallSeqKernelOf(const SmallSeqShape& shape) {
  const void* found = nullptr;
  const auto look = [&](const void* kernel) { found = kernel != nullptr ? kernel : found; };
  look(SmallSeqKernelOfTeam<Kernels, kDType, 8, 1>(shape));
  look(SmallSeqKernelOfTeam<Kernels, kDType, 16, 1>(shape));
  look(SmallSeqKernelOfTeam<Kernels, kDType, 32, 1>(shape));
  look(SmallSeqKernelOfTeam<Kernels, kDType, 32, 2>(shape));
  if constexpr (kDType == DType::kFloat32) {
    look(SmallSeqKernelOfTeam<Kernels, kDType, 32, 4>(shape));
  }
  return found;
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SMALL_SEQ_SHAPES_H_
