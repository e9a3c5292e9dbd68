// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Which kernels on matrix instructions there are. Instantiated for each type and direction in a
// file of its own.

#ifndef JAX_ATTN_CSRC_GPU_SMALL_SEQ_MATRIX_SHAPES_H_
#define JAX_ATTN_CSRC_GPU_SMALL_SEQ_MATRIX_SHAPES_H_

#include "small_seq_kernels.h"
#include "small_seq_tiles.h"

namespace jax_attn::gpu {

template <typename Kernels, typename Shape>
const void* SmallSeqMatrixKernelOfShape(const SmallSeqTiles& tiles) {
  return tiles.packed ? Kernels::template Of<Shape, true>() : Kernels::template Of<Shape, false>();
}

// `Kernels::template Of<TileShape, packed>()` is a kernel. Of heads of kDim * kParts elements.
template <typename Kernels, DType kDType, int kDim, int kParts>
const void* SmallSeqMatrixKernelOfHead(const SmallSeqTiles& tiles) {
  // Where matrix instructions take 16 rows and keys at least, one kernel is for all tiles.
  constexpr int kTile = kSmallestTile;
  if (tiles.dim != kDim || tiles.parts != kParts || tiles.many_rows) return nullptr;
  if (tiles.heads > 1) {
    if constexpr (kParts == 1) {
      if (tiles.heads == kTile / 2) {
        return SmallSeqMatrixKernelOfShape<
            Kernels, TileShape<kDType, kTile, kTile, kDim, 1, false, kTile / 2>>(tiles);
      }
      if (tiles.heads == kTile / 4) {
        return SmallSeqMatrixKernelOfShape<
            Kernels, TileShape<kDType, kTile, kTile, kDim, 1, false, kTile / 4>>(tiles);
      }
    }
    return nullptr;
  }
  if (tiles.rows == 8 && tiles.keys == 8) {
    return SmallSeqMatrixKernelOfShape<Kernels, TileShape<kDType, kTile, kTile, kDim, kParts>>(
        tiles);
  }
  if (tiles.rows == 16 && tiles.keys == 8) {
    return SmallSeqMatrixKernelOfShape<Kernels, TileShape<kDType, 16, kTile, kDim, kParts>>(tiles);
  }
  if (tiles.rows == 16 && tiles.keys == 16) {
    return SmallSeqMatrixKernelOfShape<Kernels, TileShape<kDType, 16, 16, kDim, kParts>>(tiles);
  }
  return nullptr;
}

template <typename Kernels, DType kDType, int kDim, int kParts>
const void* SmallSeqManyRowsKernelOfHead(const SmallSeqTiles& tiles) {
  if (tiles.dim != kDim || tiles.parts != kParts || !tiles.many_rows) return nullptr;
  if (tiles.rows != 16 || tiles.keys != 16) return nullptr;
  using Shape = TileShape<kDType, 16, 16, kDim, kParts, true>;
  if constexpr (Kernels::kSharesHeads) {  // of dense problems, teams share heads of many rows
    return tiles.packed ? Kernels::template Of<Shape, true>() : nullptr;
  } else {
    return SmallSeqMatrixKernelOfShape<Kernels, Shape>(tiles);
  }
}

template <typename Kernels, DType kDType>
const void* SmallSeqMatrixKernelOf(const SmallSeqTiles& tiles) {
  constexpr int kDim = Kernels::kManyRowsDim;
  const void* found = nullptr;
  const auto look = [&](const void* kernel) { found = kernel != nullptr ? kernel : found; };
  look(SmallSeqMatrixKernelOfHead<Kernels, kDType, 64, 1>(tiles));
  look(SmallSeqMatrixKernelOfHead<Kernels, kDType, 128, 1>(tiles));
  look(SmallSeqMatrixKernelOfHead<Kernels, kDType, 128, 2>(tiles));
  look(SmallSeqManyRowsKernelOfHead<Kernels, kDType, kDim, 1>(tiles));
  look(SmallSeqManyRowsKernelOfHead<Kernels, kDType, kDim, 2>(tiles));
  if constexpr (kMostTileWaves == 4) {
    look(SmallSeqMatrixKernelOfHead<Kernels, kDType, 128, 4>(tiles));
    look(SmallSeqManyRowsKernelOfHead<Kernels, kDType, kDim, 4>(tiles));
  }
  return found;
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SMALL_SEQ_MATRIX_SHAPES_H_
