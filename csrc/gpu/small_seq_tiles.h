// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// What the forward and the backward kernels on matrix instructions have in common. A wave has up to
// 128 elements of a head, so a head is one wave's, or that of two or four next to each other.

#ifndef JAX_ATTN_CSRC_GPU_SMALL_SEQ_TILES_H_
#define JAX_ATTN_CSRC_GPU_SMALL_SEQ_TILES_H_

#include <cstdint>

#include "row_tiles.h"
#include "small_seq_rows.h"

namespace jax_attn::gpu {

// What SmallSeqTiles says.
template <DType kType, int kRowCount, int kKeyCount, int kElements, int kWaves, bool kMany = false,
          int kHeadCount = 1>
struct TileShape {
  static constexpr DType kDType = kType;
  static constexpr int kRows = kRowCount, kKeys = kKeyCount, kDim = kElements, kParts = kWaves;
  static constexpr int kLanes = kParts * kWave;
  static constexpr int kTeams = kMaxThreads / kLanes;
  static_assert(kMaxThreads == kMaxTileThreads && kTeams > 0);
  static constexpr int kChunks = kDim / kTileChunk;
  static constexpr bool kManyRows = kMany;
  static constexpr int kHeads = kHeadCount;
  // Whether query rows come through shared memory: those of the next tile, or where what a block
  // knows of its sequences leaves too few registers for all loads to begin at once.
  template <bool kPacked>
  static constexpr bool kStreams = kMany || (kPacked && kRows == 16 && kKeys == 16 && kHeads == 1);
  static constexpr SmallSeqTiles kTiles{kRows, kKeys, kDim, kParts, kMany, kHeads};
  // Of several heads, the rows and the keys of one are a square of the scores; what is beside the
  // squares is masked. The two slots of a lane would be those of two heads.
  static constexpr int kHeadRows = kRows / kHeads;
  static_assert(kHeads == 1 || (kRows == kSmallestTile && kKeys == kRows && kParts == 1));
  // Whether, forward, teams may share the rows of a dense head: each reads its keys and values,
  // which teams next to each other find in the nearest cache.
  static constexpr bool kSharesHeads = kRows == 16 && kKeys == 16 && !kMany;
  using Logits = Scores<kRows, kKeys>;
  using QueryTile = RowTile<kType, kRows, kDim>;
  using KeyTile = RowTile<kType, kKeys, kDim>;
  // What zeroes rows that nothing contributes to.
  using Clearing = Team<kType, 32, kParts * kDim <= 256 ? 1 : kParts * kDim / 256>;

  JAX_ATTN_DEVICE static int Part() { return kParts == 1 ? 0 : WaveIndex() % kParts; }
  // Which of the heads the lane's rows and keys are of, and which of its rows they are.
  JAX_ATTN_DEVICE static int OwnHead() { return kHeads == 1 ? 0 : RowOfSlot(0) / kHeadRows; }
  JAX_ATTN_DEVICE static int RowOf(int slot) {
    return kHeads == 1 ? RowOfSlot(slot) : RowOfSlot(slot) % kHeadRows;
  }
};

// Where a head's query rows and keys begin in operands and in results: heads of tokens in front of
// the first one.
struct HeadPlace {
  JAX_ATTN_DEVICE HeadPlace(const SmallSeqProblem& p, const SmallSeqWork& w, const Sequence& seq,
                            int head)
      : query_in(seq.QueryIn(p, seq.first_query, head * w.group_size)),
        query_out(seq.QueryRow(p, seq.first_query, head * w.group_size)),
        key_in(seq.KeyIn(p, 0, head)),
        key_out(seq.KeyRow(p, 0, head)) {}

  int64_t query_in, query_out, key_in, key_out;
};

// A query row of a lane. What it finds is 32 bits wide, for which heads are few: see kMaxTileHeads.
struct TileRow {
  TileRow() = default;
  JAX_ATTN_DEVICE TileRow(const SmallSeqProblem& p, const SmallSeqWork& w, const Sequence& seq,
                          int row, int first_key = 0)
      : first_key(first_key), wanted(row < (seq.end_query - seq.first_query) * w.group_size) {
    const int from_first =
        static_cast<int>(static_cast<uint64_t>(static_cast<unsigned>(row)) * w.group_inverse >> 31);
    t = seq.first_query + from_first;
    member = row - from_first * w.group_size;
    at = static_cast<unsigned>(from_first) * w.num_q_heads + member;
    end = wanted ? seq.VisibleKeys(p, t) : 0;
  }

  // Of the keys of the tile, that of a head from `first_key` on.
  JAX_ATTN_DEVICE bool Sees(int key) const {
    return static_cast<unsigned>(key - first_key) < static_cast<unsigned>(end);
  }

  int first_key = 0;
  bool wanted = false;
  int t = 0;        // its query
  int member = 0;   // of the group
  int end = 0;      // of the keys that it sees
  unsigned at = 0;  // heads between it and the first
};

// Products of parts of heads become those of heads: each wave leaves its own in shared memory, and
// all of them add them up in the same order.
template <typename Shape, int kCount>
class PartialScores {
 public:
  static constexpr int kNumbers = kCount * Shape::Logits::kGroups * 4;
  struct Shared {
    float x[Shape::kParts == 1 ? 1 : Shape::kTeams][Shape::kParts][kNumbers][kWave];
  };

  // All threads of a block together.
  JAX_ATTN_DEVICE static void AddUp(Shared& shared, typename Shape::Logits (&scores)[kCount]) {
    if constexpr (Shape::kParts > 1) {
      float (&team)[Shape::kParts][kNumbers][kWave] = shared.x[WaveIndex() / Shape::kParts];
      ForEach(scores, [&](int i, float& x) { team[Shape::Part()][i][Lane()] = x; });
      __syncthreads();
      ForEach(scores, [&](int i, float& x) {
        x = team[0][i][Lane()];
#pragma unroll
        for (int part = 1; part < Shape::kParts; ++part) x += team[part][i][Lane()];
      });
      __syncthreads();  // all have read them before the next ones are written
    }
  }

 private:
  template <typename Visit>
  JAX_ATTN_DEVICE static void ForEach(typename Shape::Logits (&scores)[kCount], Visit visit) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int n = 0; n < Shape::Logits::kGroups; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          visit((k * Shape::Logits::kGroups + n) * 4 + i, scores[k].x[n][i]);
        }
      }
    }
  }
};

// Makes logits of products. `slopes`: derivatives of the cap.
template <typename Logits>
JAX_ATTN_DEVICE void MakeLogits(const SmallSeqProblem& p, const Sequence& seq, int first_head,
                                const TileRow (&rows)[Logits::kSlots], Logits& s, Logits* slopes) {
  const auto for_each = [&](auto visit) {
#pragma unroll
    for (int slot = 0; slot < Logits::kSlots; ++slot) {
#pragma unroll
      for (int i = 0; i < Logits::kOwnKeys; ++i) visit(slot, i, s.At(slot, i));
    }
  };
  for_each([&](int, int, float& x) { x *= p.scale; });
  if (p.logits_soft_cap != 0) {
    for_each([&](int slot, int i, float& x) {
      const float tanh = tanhf(x / p.logits_soft_cap);
      x = tanh * p.logits_soft_cap;
      if (slopes != nullptr) slopes->At(slot, i) = 1 - tanh * tanh;
    });
  }
  if (p.bias.data == nullptr) return;
  for_each([&](int slot, int i, float& x) {
    const TileRow& row = rows[slot];
    const int key = Logits::Key(i);
    const int64_t at = seq.at.bias + (int64_t{first_head} + row.member) * p.bias.head_stride +
                       row.t * p.bias.query_stride;
    if (row.Sees(key)) x += LoadElement(p.bias.data, p.bias.dtype, at + key - row.first_key);
  });
}

// Sums of chunk `c` of a tile's rows, or keys. What is not finite stays in its own head, though the
// others have it with weight 0.
template <typename Shape, typename Weights, typename Tile, int kSlots>
JAX_ATTN_DEVICE void SumOfHead(const Weights& weights, const Tile& tile, int c,
                               float (&sums)[kSlots][kPieceElements]) {
  if constexpr (Shape::kHeads > 1) {
    if (Any(!tile.IsFinite(c))) {
#pragma unroll 1
      for (int h = 0; h < Shape::kHeads; ++h) {
        float x[kSlots][kPieceElements] = {};
        weights.Sum(tile.Chunk(c, h == Shape::OwnHead()), 0, x);
        if (h != Shape::OwnHead()) continue;
#pragma unroll
        for (int e = 0; e < kPieceElements; ++e) sums[0][e] = x[0][e];
      }
      return;
    }
  }
  weights.Sum(tile, c, sums);
}

// Calls visit(row) for a lane's share of `count` rows of a head.
template <typename Shape, typename Visit>
JAX_ATTN_DEVICE void ForRowsOfLane(int count, Visit visit) {
#pragma unroll 1
  for (int row = Shape::RowOf(0); row < count; row += Shape::kHeadRows) visit(row);
}

// Zeroes the lane's elements of a row.
template <typename Shape>
JAX_ATTN_DEVICE void ClearTileRow(char* row, int dim) {
  const float zeros[kPieceElements] = {};
#pragma unroll
  for (int c = 0; c < Shape::kChunks; ++c) {
    StoreTilePiece<Shape::kDType>(row, dim, c, true, 0.0f, zeros);
  }
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SMALL_SEQ_TILES_H_
