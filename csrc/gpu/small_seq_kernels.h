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

// Sequences that the heads of a tile of a packed array are of, at most.
inline constexpr int kMostInTile = 32;

// Heads of a tile for each team. Vector kernels find the next ones with nothing on its way.
constexpr int HeadsPerTeam(bool is_vector) { return is_vector ? 2 : 1; }

// Bounds that a block asks for ahead, at most.
inline constexpr int kMostAhead = 256;

// How a problem is dealt to blocks.
struct SmallSeqWork {
  int group_size = 0;  // query heads of a kv head
  int num_rows = 0;    // query rows of a kv head, at most
  unsigned num_q_heads = 0;
  unsigned group_inverse = 0;     // 2^31 / group_size, rounded up
  int num_heads = 0;              // dense: kv heads of all sequences, as often as teams share one
  int teams_per_head = 1;         // dense, where kernels can: each has a tile of its query rows
  unsigned blocks_per_array = 0;  // packed: blocks of each array
  unsigned heads_per_tile = 0;    // packed: kv heads of a tile of a block
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

// Blocks that a core has room for: the more registers a thread has for what is on its way, the
// fewer. The kernels are compiled for as many.
constexpr int BlocksPerCore(const SmallSeqShape& shape, bool backward) {
  const int pieces = shape.keys * shape.pieces;
  if (shape.keys == 0) return backward ? 2 : 3;
  if (backward) return pieces <= 4 ? 6 : pieces <= 8 ? 4 : pieces <= 12 ? 3 : 2;
  return pieces <= 4 ? 8 : pieces <= 8 ? 5 : pieces <= 12 ? 4 : pieces <= 16 ? 3 : 2;
}

// Null if there is none of this shape.
template <DType kDType>
const void* SmallSeqForwardOf(const SmallSeqShape& shape);
template <DType kDType>
const void* SmallSeqBackwardOf(const SmallSeqShape& shape);

// Elements of a head that a wave has where tiles of rows follow each other. Backward, it holds the
// sums of all gradients of keys and values.
inline constexpr int kManyRowsForwardDim = 128;
inline constexpr int kManyRowsBackwardDim = 64;

// Kernels on matrix instructions.
struct SmallSeqTiles {
  int rows = 0;            // query rows that are done together
  int keys = 0;            // at most
  int dim = 0;             // elements of a head that a wave has
  int parts = 0;           // waves that share a head
  bool many_rows = false;  // tiles of rows follow each other
  int heads = 1;           // kv heads that share a tile: each has as many of its rows and keys
  bool packed = false;
};

constexpr int BlocksPerCore(const SmallSeqTiles& tiles, bool backward) {
  if (tiles.rows == 8) return backward ? 4 : 5;
  if (tiles.many_rows) return 3;
  return tiles.dim == 64 ? 4 : 3;
}

// Shared memory of a block of a backward kernel of many rows, where copies go there by themselves:
// keys, values, and two tiles of query rows and of the output's cotangent.
constexpr int ManyRowsBytes(const SmallSeqTiles& tiles) {
  const int row_bytes = kMaxThreads / 32 * tiles.dim * 2;
  return (4 * tiles.rows + 2 * tiles.keys) * row_bytes;
}

// Null if there is none of this shape.
template <DType kDType>
const void* SmallSeqMatrixForwardOf(const SmallSeqTiles& tiles);
template <DType kDType>
const void* SmallSeqMatrixBackwardOf(const SmallSeqTiles& tiles);

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SMALL_SEQ_KERNELS_H_
