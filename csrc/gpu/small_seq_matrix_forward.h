// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The forward kernels on matrix instructions, for several query rows of a kv head and a tile of
// keys. Keys and values are in registers, and query rows follow a tile at a time.

#ifndef JAX_ATTN_CSRC_GPU_SMALL_SEQ_MATRIX_FORWARD_H_
#define JAX_ATTN_CSRC_GPU_SMALL_SEQ_MATRIX_FORWARD_H_

#include <cstdint>

#include "small_seq_forward.h"
#include "small_seq_tiles.h"

namespace jax_attn::gpu {

// Makes weights of a row's logits; returns their sum and the largest logit.
template <typename Logits>
JAX_ATTN_DEVICE float2 WeighKeys(const TileRow& row, int slot, Logits& s) {
  float top = -kInfinity, total = 0;
#pragma unroll
  for (int i = 0; i < Logits::kOwnKeys; ++i) {
    float& x = s.At(slot, i);
    x = Logits::Key(i) < row.end ? x : -kInfinity;
    top = Max(top, x);
  }
  top = Logits::MaxOverKeys(top);
  if (top == kInfinity || top == -kInfinity) {
#pragma unroll
    for (int i = 0; i < Logits::kOwnKeys; ++i) s.At(slot, i) = Relative(s.At(slot, i), top);
  } else {
#pragma unroll
    for (int i = 0; i < Logits::kOwnKeys; ++i) {
      s.At(slot, i) = Exp2((s.At(slot, i) - top) * kLog2OfE);
    }
  }
#pragma unroll
  for (int i = 0; i < Logits::kOwnKeys; ++i) total += s.At(slot, i);
  return {Logits::SumOverKeys(total), top};
}

template <typename Shape>
JAX_ATTN_DEVICE void AttendTiles(const SmallSeqAttentionParams& p, const SmallSeqWork& w,
                                 typename PartialScores<Shape, 1>::Shared& shared,
                                 const Sequence& seq, int head, bool is_there) {
  constexpr int kSlots = Shape::Logits::kSlots;
  const int first_element = Shape::Part() * Shape::kDim;
  const int dim = static_cast<int>(p.head_dim), v_dim = static_cast<int>(p.v_head_dim);
  const int own_dim = dim - first_element, own_v_dim = v_dim - first_element;
  const int count = (seq.end_query - seq.first_query) * w.group_size;
  if (is_there && Shape::Part() == 0 && seq.end_query - seq.first_query < seq.query.room) {
    ClearRows<typename Shape::Clearing>(p, w, seq, head, 0, seq.first_query);
    ClearRows<typename Shape::Clearing>(p, w, seq, head, seq.end_query, seq.query.room);
  }
  const HeadPlace place(p, w, seq, head);
  typename Shape::KeyTile keys, values;
  const auto key_rows = [&](const TokenOperand& x, int64_t offset, int size) {
    const char* first =
        static_cast<const char*>(x.data) + (offset + place.key_in * size + first_element) * 2;
    const unsigned stride = static_cast<unsigned>(p.num_kv_heads) * size * 2;
    return [=](int j) { return first + j * stride; };
  };
  keys.Load(key_rows(p.key, seq.at.key, dim), seq.num_keys, own_dim);
  values.Load(key_rows(p.value, seq.at.value, v_dim), seq.num_keys, own_v_dim);

  const auto attend = [&](int first) {
    TileRow rows[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      rows[slot] = TileRow(p, w, seq, first + RowOfSlot(slot));
    }
    typename Shape::QueryTile queries;
    const char* const query = static_cast<const char*>(p.query.data) +
                              (seq.at.query + place.query_in * dim + first_element) * 2;
    queries.LoadSlots([&](int slot) { return query + rows[slot].at * (dim * 2); },
                      [&](int slot) { return rows[slot].wanted; }, own_dim);
    typename Shape::Logits s[1];
    s[0].Multiply(queries, keys);
    PartialScores<Shape, 1>::AddUp(shared, s);
    MakeLogits(p, seq, head * w.group_size, rows, s[0],
               static_cast<typename Shape::Logits*>(nullptr));

    float factor[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const float2 found = WeighKeys(rows[slot], slot, s[0]);
      factor[slot] = found.x == 0 ? 0.0f : 1.0f / found.x;
      if (rows[slot].wanted && Shape::Part() == 0 && Shape::Logits::Key(0) == 0) {
        p.lse[place.query_out + rows[slot].at] = LogSumExp(found.y, found.x);
      }
    }
    const auto weights = TileWeights<Shape::kDType, Shape::kRows, Shape::kKeys>::OfKeys(s[0], 1.0f);
    char* const out = static_cast<char*>(p.out) + (place.query_out * v_dim + first_element) * 2;
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      KeepOrder();
      float sums[kSlots][kPieceElements] = {};
      weights.Sum(values, c, sums);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        StoreTilePiece<Shape::kDType>(out + rows[slot].at * (v_dim * 2), own_v_dim, c,
                                      rows[slot].wanted, factor[slot], sums[slot]);
      }
    }
  };
  if constexpr (!Shape::kManyRows) {
    attend(0);
  } else {
#pragma unroll 1
    for (int first = 0; first < w.num_rows; first += Shape::kRows) {
      if (Shape::kParts == 1 && first >= count) break;  // waves of a head stay together
      attend(first);
    }
  }
}

template <typename Shape, bool kPacked>
__global__ void JAX_ATTN_LAUNCH_BOUNDS(kMaxThreads, BlocksPerCore(Shape::kTiles, false))
    SmallSeqMatrixForward(JAX_ATTN_PARAMETER SmallSeqAttentionParams p,
                          JAX_ATTN_PARAMETER SmallSeqWork w) {
  __shared__ PackedSequences::Shared shared;
  __shared__ typename PartialScores<Shape, 1>::Shared partial;
  const PackedSequences packed(p, w, shared);
  const auto visit = [&](const SmallSeqAttentionParams& p, const SmallSeqWork& w,
                         const Sequence& seq, int head,
                         bool is_there) { AttendTiles<Shape>(p, w, partial, seq, head, is_there); };
  ForEachHead<Shape::kLanes>(p, w, packed, kPacked, visit);
  if (kPacked)
    ClearUnusedRows<Shape::kDType>(FreshParameter(p), packed.Fresh<SmallSeqAttentionParams>());
}

// Kernels for SmallSeqMatrixKernelOf.
struct MatrixForwardKernels {
  static constexpr int kManyRowsDim = kManyRowsForwardDim;
  template <typename Shape, bool kPacked>
  static const void* Of() {
    return KernelAddress(SmallSeqMatrixForward<Shape, kPacked>);
  }
};

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SMALL_SEQ_MATRIX_FORWARD_H_
