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
    x = row.Sees(Logits::Key(i)) ? x : -kInfinity;
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

// Writes what rows of the lane's head have that see nothing.
template <typename Shape>
JAX_ATTN_DEVICE void ClearRowsOfLanes(const SmallSeqAttentionParams& p, const SmallSeqWork& w,
                                      const Sequence& seq, int head) {
  const int group = w.group_size, v_dim = static_cast<int>(p.v_head_dim);
  ForRowsOfLane<Shape>(seq.query.room * group, [&](int i) {
    const int t = i / group;
    if (t >= seq.first_query && t < seq.end_query) return;
    const int64_t row = seq.QueryRow(p, t, head * group + i % group);
    ClearTileRow<Shape>(static_cast<char*>(p.out) + row * v_dim * 2, v_dim);
    if (Shape::Logits::Key(0) == 0) p.lse[row] = -kInfinity;
  });
}

template <typename Shape, bool kPacked, typename Meanwhile>
JAX_ATTN_DEVICE void AttendTiles(const SmallSeqAttentionParams& p, const SmallSeqWork& w,
                                 typename PartialScores<Shape, 1>::Shared& shared,
                                 const Sequence& seq, int head, bool is_there,
                                 Meanwhile meanwhile) {
  constexpr int kSlots = Shape::Logits::kSlots;
  const int first_element = Shape::Part() * Shape::kDim;
  const int dim = static_cast<int>(p.head_dim), v_dim = static_cast<int>(p.v_head_dim);
  const int own_dim = dim - first_element, own_v_dim = v_dim - first_element;
  const int count = (seq.end_query - seq.first_query) * w.group_size;
  if (is_there && seq.row_tile == 0 && Shape::Part() == 0 &&
      seq.end_query - seq.first_query < seq.query.room) {
    if constexpr (Shape::kHeads > 1) {
      ClearRowsOfLanes<Shape>(p, w, seq, head);
    } else {
      ClearRows<typename Shape::Clearing>(p, w, seq, head, 0, seq.first_query);
      ClearRows<typename Shape::Clearing>(p, w, seq, head, seq.end_query, seq.query.room);
    }
  }
  const HeadPlace place(p, w, seq, head);
  typename Shape::KeyTile keys, values;
  const auto key_rows = [&](const TokenOperand& x, int64_t offset, int size) {
    const char* first =
        static_cast<const char*>(x.data) + (offset + place.key_in * size + first_element) * 2;
    const unsigned stride = static_cast<unsigned>(p.num_kv_heads) * size * 2;
    return [=](int slot) { return first + Shape::RowOf(slot) * stride; };
  };
  const auto is_key = [&](int slot) { return Shape::RowOf(slot) < seq.num_keys; };
  const auto load_keys = [&] {
    keys.LoadSlots(key_rows(p.key, seq.at.key, dim), is_key, own_dim);
    values.LoadSlots(key_rows(p.value, seq.at.value, v_dim), is_key, own_v_dim);
  };

  const char* const query = static_cast<const char*>(p.query.data) +
                            (seq.at.query + place.query_in * dim + first_element) * 2;
  using Rows = TileRow[kSlots];
  const auto find = [&](int first, Rows& rows) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      rows[slot] =
          TileRow(p, w, seq, first + Shape::RowOf(slot), Shape::OwnHead() * Shape::kHeadRows);
    }
  };
  const auto begin_of = [&](const Rows& rows) {
    return [&rows, query, dim](int slot) { return query + rows[slot].at * (dim * 2); };
  };
  const auto is_row = [](const Rows& rows) {
    return [&rows](int slot) { return rows[slot].wanted; };
  };
  const auto attend = [&](const Rows& rows, const typename Shape::QueryTile& queries) {
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
      SumOfHead<Shape>(weights, values, c, sums);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        StoreTilePiece<Shape::kDType>(out + rows[slot].at * (v_dim * 2), own_v_dim, c,
                                      rows[slot].wanted, factor[slot], sums[slot]);
      }
    }
  };
  Rows rows;
  typename Shape::QueryTile queries;
  if constexpr (!Shape::template kStreams<kPacked>) {
    find(seq.row_tile * Shape::kRows, rows);
    queries.LoadSlots(begin_of(rows), is_row(rows), own_dim);
    load_keys();
    meanwhile();
    attend(rows, queries);
  } else {
    using Stream = TileStream<typename Shape::QueryTile, Shape::kManyRows ? 2 : 1>;
    __shared__ typename Stream::Shared room;
    const Stream stream(room);
    const auto begin = [&](int tile) {
      Rows next;
      find(tile * Shape::kRows, next);
      stream.Begin(tile, begin_of(next), is_row(next), own_dim);
      EndBatch();
    };
    begin(0);
    load_keys();
    meanwhile();
#pragma unroll 1
    for (int tile = 0; tile * Shape::kRows < w.num_rows; ++tile) {
      if (Shape::kParts == 1 && tile * Shape::kRows >= count)
        break;  // waves of a head stay together
      if (Shape::kManyRows) begin(tile + 1);
      find(tile * Shape::kRows, rows);
      WaitForBatches<1>();  // the next tile is on its way, or the next bounds are
      stream.Get(tile, begin_of(rows), is_row(rows), own_dim, queries);
      attend(rows, queries);
      if (!Shape::kManyRows) break;
    }
    WaitForBatches<0>();
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
                         const Sequence& seq, int head, bool is_there, auto meanwhile) {
    AttendTiles<Shape, kPacked>(p, w, partial, seq, head, is_there, meanwhile);
  };
  constexpr int kPending = Shape::template kStreams<kPacked> ? 1 : 0;
  ForEachHead<Shape::kLanes, Shape::kHeads, Shape::kSharesHeads, kPending>(p, w, packed, kPacked,
                                                                           Shape::OwnHead(), visit);
  if (kPacked)
    ClearUnusedRows<Shape::kDType>(FreshParameter(p), packed.Fresh<SmallSeqAttentionParams>());
}

// Kernels for SmallSeqMatrixKernelOf.
struct MatrixForwardKernels {
  static constexpr int kManyRowsDim = kManyRowsForwardDim;
  static constexpr bool kSharesHeads = true;
  template <typename Shape, bool kPacked>
  static const void* Of() {
    return KernelAddress(SmallSeqMatrixForward<Shape, kPacked>);
  }
};

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SMALL_SEQ_MATRIX_FORWARD_H_
