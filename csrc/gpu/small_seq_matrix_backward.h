// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The backward kernels on matrix instructions, for a tile of query rows of a kv head and a tile of
// keys. Queries, keys, values and the output's cotangent are in registers, each loaded once.

#ifndef JAX_ATTN_CSRC_GPU_SMALL_SEQ_MATRIX_BACKWARD_H_
#define JAX_ATTN_CSRC_GPU_SMALL_SEQ_MATRIX_BACKWARD_H_

#include <cstdint>

#include "small_seq_backward.h"
#include "small_seq_tiles.h"

namespace jax_attn::gpu {

// What weights are multiplied by before they are rounded to float16, so that small ones keep their
// bits: at most 1, they become at most 2^14.
template <DType kDType>
inline constexpr float kWeightFactor = kDType == DType::kFloat16 ? 16384.0f : 1.0f;

// The same for gradients of logits, which may be large too: a power of 2 that brings the largest to
// about 2^14, and its reciprocal.
template <typename Shape, typename Logits = typename Shape::Logits>
JAX_ATTN_DEVICE float2 GradientFactor(const Logits& gradients) {
  if constexpr (Shape::kDType == DType::kFloat16) {
    float top = 0;
#pragma unroll
    for (int slot = 0; slot < Logits::kSlots; ++slot) {  // there may be numbers of no row
#pragma unroll
      for (int i = 0; i < Logits::kOwnKeys; ++i) top = Max(top, fabsf(gradients.At(slot, i)));
    }
#pragma unroll
    for (int mask = 1; mask < kWave; mask *= 2) {
      if (ShareRows(mask, Shape::kHeadRows)) top = Max(top, ShuffleXor(top, mask));
    }
    const uint32_t exponent = FloatBits(top) >> 23;
    const uint32_t kept = exponent < 15 ? 15 : exponent;
    return {BitsFloat((268 - kept) << 23), BitsFloat((kept - 14) << 23)};
  } else {
    return {1, 1};
  }
}

// Makes weights of a row's logits, `s`, and gradients of its products, but for the scale, of the
// products of the output's cotangent with values, `dp`.
template <typename Logits>
JAX_ATTN_DEVICE void DifferentiateLogits(const SmallSeqBackwardParams& p, const TileRow& row,
                                         float lse, float dlse, float* dbias, int slot, Logits& s,
                                         Logits& dp, const Logits& slopes) {
  float mean = 0;
  const bool any = lse != -kInfinity;
#pragma unroll
  for (int i = 0; i < Logits::kOwnKeys; ++i) {
    // What is not seen is not multiplied either: it may be NaN.
    const bool sees = row.Sees(Logits::Key(i));
    float &weight = s.At(slot, i), &gradient = dp.At(slot, i);
    weight = sees && any ? Exp2((weight - lse) * kLog2OfE) : 0.0f;
    gradient = sees ? gradient : 0.0f;
    mean += weight * gradient;
  }
  mean = Logits::SumOverKeys(mean) - dlse;
#pragma unroll
  for (int i = 0; i < Logits::kOwnKeys; ++i) {
    const bool sees = row.Sees(Logits::Key(i));
    dp.At(slot, i) = sees ? s.At(slot, i) * (dp.At(slot, i) - mean) : 0.0f;
  }
  if (dbias != nullptr) {
#pragma unroll
    for (int i = 0; i < Logits::kOwnKeys; ++i) {
      const unsigned key = static_cast<unsigned>(Logits::Key(i) - row.first_key);
      if (key < static_cast<uint64_t>(p.max_kv_len)) dbias[key] = dp.At(slot, i);
    }
  }
  if (p.logits_soft_cap == 0) return;
#pragma unroll
  for (int i = 0; i < Logits::kOwnKeys; ++i) {
    const bool sees = row.Sees(Logits::Key(i));
    dp.At(slot, i) = sees ? dp.At(slot, i) * slopes.At(slot, i) : 0.0f;
  }
}

// What ClearUnseen does, for the lane's head.
template <typename Shape>
JAX_ATTN_DEVICE void ClearUnseenOfLanes(const SmallSeqBackwardParams& p, const SmallSeqWork& w,
                                        const Sequence& seq, int head) {
  const int dim = static_cast<int>(p.head_dim), v_dim = static_cast<int>(p.v_head_dim);
  const int group = w.group_size;
  const auto is_seen = [&](int t) { return t >= seq.first_query && t < seq.end_query; };
  ForRowsOfLane<Shape>(seq.query.room * group, [&](int i) {
    if (is_seen(i / group)) return;
    const int64_t row = seq.QueryRow(p, i / group, head * group + i % group);
    ClearTileRow<Shape>(static_cast<char*>(p.dquery) + row * dim * 2, dim);
  });
  ForRowsOfLane<Shape>(seq.kv.room, [&](int j) {
    if (j < seq.num_keys) return;
    const int64_t row = seq.KeyRow(p, j, head);
    ClearTileRow<Shape>(static_cast<char*>(p.dkey) + row * dim * 2, dim);
    ClearTileRow<Shape>(static_cast<char*>(p.dvalue) + row * v_dim * 2, v_dim);
  });
  if (p.dbias == nullptr || Shape::Logits::Key(0) != 0) return;
  const int queries = static_cast<int>(p.max_q_len), keys = static_cast<int>(p.max_kv_len);
  ForRowsOfLane<Shape>(queries * group, [&](int i) {
    if (is_seen(i / group)) return;
    const int64_t query_head = int64_t{seq.batch_index} * p.num_q_heads + head * group + i % group;
    float* const dbias = p.dbias + (query_head * queries + i / group) * keys;
    for (int j = 0; j < keys; ++j) dbias[j] = 0;
  });
}

// Sums over query rows, for the keys of a lane.
template <typename Shape>
struct KeySums {
  static constexpr int kSlots = Shape::KeyTile::kSlots;

  // Stores `factor` times chunk `c`, for a result whose heads have `dim` elements.
  JAX_ATTN_DEVICE void Store(const SmallSeqProblem& p, const Sequence& seq, const HeadPlace& place,
                             void* to, int dim, int c, float factor) const {
    const int first_element = Shape::Part() * Shape::kDim;
    char* const first = static_cast<char*>(to) + (place.key_out * dim + first_element) * 2;
    const unsigned stride = static_cast<unsigned>(p.num_kv_heads) * dim * 2;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int j = Shape::RowOf(slot);
      StoreTilePiece<Shape::kDType>(first + j * stride, dim - first_element, c, j < seq.num_keys,
                                    factor, x[slot]);
    }
  }

  float x[kSlots][kPieceElements] = {};
};

// What tiles of rows that follow each other have in shared memory: the keys and values of a head,
// and two tiles of its rows. Registers are for the sums.
template <typename Shape>
struct ManyRowsRoom {
  using Rows = TileStream<typename Shape::QueryTile, 2>;
  using Keys = TileStream<typename Shape::KeyTile, 1>;
  typename Rows::Shared queries, douts;
  typename Keys::Shared keys, values;
};

// Rows of a head, a tile at a time.
template <typename Shape, bool kPacked>
class TileGradients {
 public:
  static constexpr DType kDType = Shape::kDType;
  static constexpr int kSlots = Shape::Logits::kSlots;
  using Partial = PartialScores<Shape, 2>;

  JAX_ATTN_DEVICE TileGradients(const SmallSeqBackwardParams& p, const SmallSeqWork& w,
                                typename Partial::Shared& shared, const Sequence& seq, int head)
      : p_(p),
        w_(w),
        shared_(shared),
        seq_(seq),
        head_(head),
        dim_(static_cast<int>(p.head_dim)),
        v_dim_(static_cast<int>(p.v_head_dim)),
        place_(p, w, seq, head) {}

  template <typename Meanwhile>
  JAX_ATTN_DEVICE void Run(Meanwhile meanwhile) {
    typename Shape::KeyTile keys, values;
    if constexpr (!Shape::kManyRows) {
      typename Shape::QueryTile queries, douts;
      FindRows(0, rows_);
      LoadStatistics(rows_, lse_, dlse_);
      if constexpr (Shape::template kStreams<kPacked>) {
        using Stream = TileStream<typename Shape::QueryTile, 1>;
        __shared__ typename Stream::Shared query_room, dout_room;
        const Stream query_stream(query_room), dout_stream(dout_room);
        query_stream.Begin(0, QueryRows(rows_), WantedRows(rows_), dim_ - FirstElement());
        dout_stream.Begin(0, CotangentRows(rows_), WantedRows(rows_), v_dim_ - FirstElement());
        EndBatch();
        LoadKeys(keys, p_.key, seq_.at.key, dim_);
        LoadKeys(values, p_.value, seq_.at.value, v_dim_);
        meanwhile();
        WaitForBatches<1>();  // but for the next bounds
        query_stream.Get(0, QueryRows(rows_), WantedRows(rows_), dim_ - FirstElement(), queries);
        dout_stream.Get(0, CotangentRows(rows_), WantedRows(rows_), v_dim_ - FirstElement(), douts);
      } else {
        queries.LoadSlots(QueryRows(rows_), WantedRows(rows_), dim_ - FirstElement());
        LoadKeys(keys, p_.key, seq_.at.key, dim_);
        douts.LoadSlots(CotangentRows(rows_), WantedRows(rows_), v_dim_ - FirstElement());
        LoadKeys(values, p_.value, seq_.at.value, v_dim_);
        meanwhile();
      }
      Differentiate(queries, keys, douts, values);
      const auto of_rows = weights_.Transposed();
#pragma unroll
      for (int c = 0; c < Shape::kChunks; ++c) {
        KeepOrder();
        KeySums<Shape> sums;
        SumOfHead<Shape>(of_rows, douts, c, sums.x);
        sums.Store(p_, seq_, place_, p_.dvalue, v_dim_, c, 1 / kWeightFactor<kDType>);
      }
      const auto gradients_of_rows = gradients_.Transposed();
#pragma unroll
      for (int c = 0; c < Shape::kChunks; ++c) {
        KeepOrder();
        KeySums<Shape> sums;
        SumOfHead<Shape>(gradients_of_rows, queries, c, sums.x);
        sums.Store(p_, seq_, place_, p_.dkey, dim_, c, undo_);
      }
      StoreQueryGradients(keys);
    } else {
      using Room = ManyRowsRoom<Shape>;
      JAX_ATTN_DYNAMIC_SHARED(small_seq_tiles);
      Room& room = *reinterpret_cast<Room*>(small_seq_tiles);
      const typename Room::Rows query_stream(room.queries), dout_stream(room.douts);
      const typename Room::Keys key_stream(room.keys), value_stream(room.values);
      float next_lse[kSlots], next_dlse[kSlots];
      const auto begin = [&](int tile) {
        Rows next;
        FindRows(tile * Shape::kRows, next);
        query_stream.Begin(tile, QueryRows(next), WantedRows(next), dim_ - FirstElement());
        dout_stream.Begin(tile, CotangentRows(next), WantedRows(next), v_dim_ - FirstElement());
        EndBatch();
        LoadStatistics(next, next_lse, next_dlse);
      };
      BeginKeys(key_stream, p_.key, seq_.at.key, dim_);
      BeginKeys(value_stream, p_.value, seq_.at.value, v_dim_);
      begin(0);
      if constexpr (kCopiesThroughRegisters) {
        LoadKeys(keys, p_.key, seq_.at.key, dim_);
        LoadKeys(values, p_.value, seq_.at.value, v_dim_);
      }
      meanwhile();
      KeySums<Shape> dkeys[Shape::kChunks], dvalues[Shape::kChunks];
#pragma unroll 1
      for (int tile = 0; tile * Shape::kRows < w_.num_rows; ++tile) {
        FindRows(tile * Shape::kRows, rows_);
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
          lse_[slot] = next_lse[slot];
          dlse_[slot] = next_dlse[slot];
        }
        begin(tile + 1);
        WaitForBatches<1>();
        typename Shape::QueryTile queries, douts;
        query_stream.Get(tile, QueryRows(rows_), WantedRows(rows_), dim_ - FirstElement(), queries);
        dout_stream.Get(tile, CotangentRows(rows_), WantedRows(rows_), v_dim_ - FirstElement(),
                        douts);
        key_stream.GetAgain(0, keys);
        value_stream.GetAgain(0, values);
        Differentiate(queries, keys, douts, values);
        query_stream.GetAgain(tile, queries);
        dout_stream.GetAgain(tile, douts);
        const auto of_rows = weights_.Transposed();
        const auto gradients_of_rows = gradients_.Transposed();
#pragma unroll
        for (int c = 0; c < Shape::kChunks; ++c) {
          KeepOrder();
          of_rows.Sum(douts, c, dvalues[c].x);
          if constexpr (kWave == 32) KeepOrder();  // factors of one sum at a time
          KeySums<Shape> sums;
          gradients_of_rows.Sum(queries, c, sums.x);
#pragma unroll
          for (int slot = 0; slot < KeySums<Shape>::kSlots; ++slot) {
#pragma unroll
            for (int e = 0; e < kPieceElements; ++e) {
              // Summed here, not at the end of the loop: until then the factors take registers.
              float &dkey = dkeys[c].x[slot][e], &dvalue = dvalues[c].x[slot][e];
              dkey = FreshOfLane(dkey + undo_ * sums.x[slot][e]);
              dvalue = FreshOfLane(dvalue);
            }
          }
        }
        key_stream.GetAgain(0, keys);
        StoreQueryGradients(keys);
      }
      WaitForBatches<0>();
#pragma unroll
      for (int c = 0; c < Shape::kChunks; ++c) {
        KeepOrder();
        dvalues[c].Store(p_, seq_, place_, p_.dvalue, v_dim_, c, 1 / kWeightFactor<kDType>);
        dkeys[c].Store(p_, seq_, place_, p_.dkey, dim_, c, 1.0f);
      }
    }
  }

 private:
  JAX_ATTN_DEVICE static int FirstElement() { return Shape::Part() * Shape::kDim; }

  using Rows = TileRow[kSlots];

  JAX_ATTN_DEVICE void FindRows(int first, Rows& rows) const {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      rows[slot] =
          TileRow(p_, w_, seq_, first + Shape::RowOf(slot), Shape::OwnHead() * Shape::kHeadRows);
    }
  }

  JAX_ATTN_DEVICE void LoadStatistics(const Rows& rows, float (&lse)[kSlots],
                                      float (&dlse)[kSlots]) const {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      lse[slot] = -kInfinity;
      dlse[slot] = 0;
      const int64_t index = place_.query_in + rows[slot].at;
      const bool wanted = rows[slot].wanted;
      if (wanted) lse[slot] = p_.lse.data[seq_.at.lse + index];
      if (wanted && p_.dlse.data != nullptr) dlse[slot] = p_.dlse.data[seq_.at.dlse + index];
    }
  }

  // For RowTile::LoadSlots and TileStream.
  JAX_ATTN_DEVICE auto RowsOf(const TokenOperand& x, int64_t offset, int dim,
                              const Rows& rows) const {
    const char* const first =
        static_cast<const char*>(x.data) + (offset + place_.query_in * dim + FirstElement()) * 2;
    return [first, dim, &rows](int slot) { return first + rows[slot].at * (dim * 2); };
  }
  JAX_ATTN_DEVICE auto QueryRows(const Rows& rows) const {
    return RowsOf(p_.query, seq_.at.query, dim_, rows);
  }
  JAX_ATTN_DEVICE auto CotangentRows(const Rows& rows) const {
    return RowsOf(p_.dout, seq_.at.dout, v_dim_, rows);
  }
  JAX_ATTN_DEVICE static auto WantedRows(const Rows& rows) {
    return [&rows](int slot) { return rows[slot].wanted; };
  }

  JAX_ATTN_DEVICE void LoadKeys(typename Shape::KeyTile& tile, const TokenOperand& x,
                                int64_t offset, int dim) const {
    const char* const first =
        static_cast<const char*>(x.data) + (offset + place_.key_in * dim + FirstElement()) * 2;
    const unsigned stride = static_cast<unsigned>(p_.num_kv_heads) * dim * 2;
    tile.LoadSlots([&](int slot) { return first + Shape::RowOf(slot) * stride; },
                   [&](int slot) { return Shape::RowOf(slot) < seq_.num_keys; },
                   dim - FirstElement());
  }

  // The same through shared memory.
  template <typename Stream>
  JAX_ATTN_DEVICE void BeginKeys(const Stream& stream, const TokenOperand& x, int64_t offset,
                                 int dim) const {
    const char* const first =
        static_cast<const char*>(x.data) + (offset + place_.key_in * dim + FirstElement()) * 2;
    const unsigned stride = static_cast<unsigned>(p_.num_kv_heads) * dim * 2;
    stream.Begin(
        0, [&](int slot) { return first + Shape::RowOf(slot) * stride; },
        [&](int slot) { return Shape::RowOf(slot) < seq_.num_keys; }, dim - FirstElement());
  }

  // Finds the weights of the rows and the gradients of their products.
  JAX_ATTN_DEVICE void Differentiate(const typename Shape::QueryTile& queries,
                                     const typename Shape::KeyTile& keys,
                                     const typename Shape::QueryTile& douts,
                                     const typename Shape::KeyTile& values) {
    typename Shape::Logits both[2], slopes;
    both[0].Multiply(queries, keys);
    both[1].Multiply(douts, values);
    Partial::AddUp(shared_, both);
    MakeLogits(p_, seq_, head_ * w_.group_size, rows_, both[0], &slopes);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      float* dbias = nullptr;
      if (p_.dbias != nullptr && rows_[slot].wanted && Shape::Part() == 0) {
        const int64_t query_head =
            int64_t{seq_.batch_index} * p_.num_q_heads + head_ * w_.group_size + rows_[slot].member;
        dbias = p_.dbias + (query_head * p_.max_q_len + rows_[slot].t) * p_.max_kv_len;
      }
      DifferentiateLogits(p_, rows_[slot], lse_[slot], dlse_[slot], dbias, slot, both[0], both[1],
                          slopes);
    }
    weights_ = Weights::OfKeys(both[0], kWeightFactor<kDType>);
    const float2 factor = GradientFactor<Shape>(both[1]);
    gradients_ = Weights::OfKeys(both[1], factor.x);
    undo_ = factor.y * p_.scale;
  }

  JAX_ATTN_DEVICE void StoreQueryGradients(const typename Shape::KeyTile& keys) const {
    char* const first =
        static_cast<char*>(p_.dquery) + (place_.query_out * dim_ + FirstElement()) * 2;
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      KeepOrder();
      float sums[kSlots][kPieceElements] = {};
      SumOfHead<Shape>(gradients_, keys, c, sums);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        StoreTilePiece<kDType>(first + rows_[slot].at * (dim_ * 2), dim_ - FirstElement(), c,
                               rows_[slot].wanted, undo_, sums[slot]);
      }
    }
  }

  using Weights = TileWeights<kDType, Shape::kRows, Shape::kKeys>;

  const SmallSeqBackwardParams& p_;
  const SmallSeqWork& w_;
  typename Partial::Shared& shared_;
  const Sequence& seq_;
  const int head_, dim_, v_dim_;
  const HeadPlace place_;
  TileRow rows_[kSlots];
  float lse_[kSlots], dlse_[kSlots];
  Weights weights_, gradients_;
  float undo_ = 0;  // what gradients of products are to be multiplied by
};

template <typename Shape, bool kPacked>
__global__ void JAX_ATTN_LAUNCH_BOUNDS(kMaxThreads, BlocksPerCore(Shape::kTiles, true))
    SmallSeqMatrixBackward(JAX_ATTN_PARAMETER SmallSeqBackwardParams p,
                           JAX_ATTN_PARAMETER SmallSeqWork w) {
  __shared__ PackedSequences::Shared shared;
  __shared__ typename PartialScores<Shape, 2>::Shared partial;
  const PackedSequences packed(p, w, shared);
  const auto visit = [&](const SmallSeqBackwardParams& p, const SmallSeqWork& w,
                         const Sequence& seq, int head, bool is_there, auto meanwhile) {
    const bool all_seen =
        seq.end_query - seq.first_query == seq.query.room && seq.num_keys == seq.kv.room;
    if (is_there && Shape::Part() == 0 && (!all_seen || p.dbias != nullptr)) {
      if constexpr (Shape::kHeads > 1) {
        ClearUnseenOfLanes<Shape>(p, w, seq, head);
      } else {
        ClearUnseen<typename Shape::Clearing>(p, w, seq, head, seq.num_keys);
      }
    }
    TileGradients<Shape, kPacked>(p, w, partial, seq, head).Run(meanwhile);
  };
  constexpr int kPending = Shape::template kStreams<kPacked> ? 1 : 0;
  ForEachHead<Shape::kLanes, Shape::kHeads, false, kPending>(p, w, packed, kPacked,
                                                             Shape::OwnHead(), visit);
  if (kPacked)
    ClearUnusedGradients<Shape::kDType>(FreshParameter(p), packed.Fresh<SmallSeqBackwardParams>());
}

// Kernels for SmallSeqMatrixKernelOf.
struct MatrixBackwardKernels {
  static constexpr int kManyRowsDim = kManyRowsBackwardDim;
  static constexpr bool kSharesHeads = false;
  template <typename Shape, bool kPacked>
  static const void* Of() {
    static_assert(!Shape::kManyRows || kCopiesThroughRegisters ||
                  sizeof(ManyRowsRoom<Shape>) == ManyRowsBytes(Shape::kTiles));
    return KernelAddress(SmallSeqMatrixBackward<Shape, kPacked>);
  }
};

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SMALL_SEQ_MATRIX_BACKWARD_H_
