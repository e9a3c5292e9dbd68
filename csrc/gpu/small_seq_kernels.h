// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The kernels that are compiled, for host code. Forward ones take SmallSeqAttentionParams, backward
// ones SmallSeqBackwardParams, and all of them SmallSeqWork.

#ifndef JAX_ATTN_CSRC_GPU_SMALL_SEQ_KERNELS_H_
#define JAX_ATTN_CSRC_GPU_SMALL_SEQ_KERNELS_H_

#include <cstdint>

#include "../dtype.h"

namespace jax_attn::gpu {

// Threads of a block, of all kernels.
inline constexpr int kMaxThreads = 128;

// The most keys of the kernels for one row; those for any number of rows take what is left.
inline constexpr int kOneRowKeys[] = {2, 4, 8, 12, 16};

// How a problem is dealt to blocks.
struct SmallSeqWork {
  int group_size = 0;           // query heads of a kv head
  int num_heads = 0;            // dense: kv heads of all sequences
  int blocks_per_array = 0;     // packed: blocks of each array
  int sequences_per_block = 0;  // packed: all but the last blocks have as many
  // Backward, any number of rows: shared memory of a team. It has three floats for each key, and if
  // it keeps the weights of all rows, two for each key of the others.
  int padded_keys = 0;
  int floats_per_team = 0;
  bool keeps_weights = false;
};

struct SmallSeqShape {
  int lanes = 0;   // of a team
  int pieces = 0;  // of 16 bytes that a lane has of a head
  int keys = 0;    // at most, and one query row for each kv head; 0: any number of both
};

// Null if there is none of this shape.
template <DType kDType>
const void* SmallSeqForwardOf(const SmallSeqShape& shape);
template <DType kDType>
const void* SmallSeqBackwardOf(const SmallSeqShape& shape);

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SMALL_SEQ_KERNELS_H_
