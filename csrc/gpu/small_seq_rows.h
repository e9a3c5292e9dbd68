// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Logits of a query row and what becomes of them, and how blocks deal with their sequences.

#ifndef JAX_ATTN_CSRC_GPU_SMALL_SEQ_ROWS_H_
#define JAX_ATTN_CSRC_GPU_SMALL_SEQ_ROWS_H_

#include <cstdint>

#include "small_seq_sequence.h"
#include "small_seq_team.h"

namespace jax_attn::gpu {

inline constexpr float kLog2OfE = 1.4426950408889634f;

// The head that begins at an element of an operand.
template <typename Team>
JAX_ATTN_DEVICE const char* HeadOf(const TokenOperand& x, int64_t element) {
  return static_cast<const char*>(x.data) + element * Team::kSize;
}

// The query rows of a kv head that see something: heads of a group, then queries.
struct RowsOfHead {
  struct Row {
    int query;
    int head;
  };

  JAX_ATTN_DEVICE RowsOfHead(const SmallSeqWork& w, const Sequence& seq, int kv_head)
      : group(FreshOfLane(w.group_size)),
        first_query(seq.first_query),
        first_head(kv_head * group),
        count((seq.end_query - seq.first_query) * group) {}

  // The first one in place of those that there are not.
  JAX_ATTN_DEVICE Row At(int row) const {
    if (row >= count) return {first_query, first_head};
    return {first_query + row / group, first_head + row % group};
  }

  int group;
  int first_query;
  int first_head;
  int count;
};

// What makes logits of a row's products with the keys.
struct RowLogits {
  RowLogits() = default;
  JAX_ATTN_DEVICE RowLogits(const SmallSeqProblem& p, const Sequence& seq, int t, int64_t head)
      : end(seq.VisibleKeys(p, t)) {
    if (p.bias.data != nullptr) {
      bias = seq.at.bias + head * p.bias.head_stride + t * p.bias.query_stride;
    }
  }

  JAX_ATTN_DEVICE bool Sees(int key) const { return key < end; }

  // The logit of a key that the row sees, from its product; and the derivative of the cap.
  JAX_ATTN_DEVICE float Of(const SmallSeqProblem& p, float product, int key, float& slope) const {
    float x = product * p.scale;
    slope = 1;
    if (p.logits_soft_cap != 0) {
      const float tanh = tanhf(x / p.logits_soft_cap);
      x = tanh * p.logits_soft_cap;
      slope = 1 - tanh * tanh;
    }
    if (p.bias.data != nullptr) x += LoadElement(p.bias.data, p.bias.dtype, bias + key);
    return x;
  }

  int end = 0;       // of the keys that it sees
  int64_t bias = 0;  // where that of its first key is
};

// e^(x - top). Of logits that are all -inf none has weight; if some are inf, they have all of it.
JAX_ATTN_DEVICE float Relative(float x, float top) {
  if (x == top) return x == -kInfinity ? 0.0f : 1.0f;
  return Exp2((x - top) * kLog2OfE);
}

JAX_ATTN_DEVICE float LogSumExp(float top, float total) {
  if (total == 0) return -kInfinity;
  return top == kInfinity ? top : top + logf(total);
}

// Calls visit(p, w, sequence, kv head, whether there is one, meanwhile) for each head of the block.
// All threads of a block call it as often, and `visit` may exchange values between them. It calls
// meanwhile() once, at best when its loads are on their way: that finds the block's next sequences.
// `is_packed`: as the problem is; kernels that know it need fewer registers.
// `own`: which of the kHeads heads of its team the lane has. `kShares`: several teams may share the
// rows of a dense head. `kPending`: batches of copies that `visit` has begun when it calls
// meanwhile(), which begins another one where a tile has one head for each team.
template <int kLanes, int kHeads = 1, bool kShares = false, int kPending = 0, typename Params,
          typename Visit>
JAX_ATTN_DEVICE void ForEachHead(const Params& p, const SmallSeqWork& w,
                                 const PackedSequences& packed, bool is_packed, int own,
                                 Visit visit) {
  const unsigned team = FreshOfLane(static_cast<int>(threadIdx.x)) / kLanes * kHeads + own;
  const unsigned teams = blockDim.x / kLanes * kHeads;
  int tile = 0;
  unsigned done = 0;  // heads of the tile
  const auto find = [&] {
    const PackedSequences fresh = packed.template Fresh<Params>();
    fresh.template FindTile<kPending>(tile);
    fresh.AskForTile(tile + 1);
  };
  const auto meanwhile = [&] {
    done += teams;
    if (!is_packed || !packed.template Fresh<Params>().IsDone(tile, done)) return;
    done = 0;
    ++tile;
    find();
  };
  if (is_packed) find();
  for (;;) {
    const Params& fresh_p = FreshParameter(p);
    const PackedSequences fresh = packed.template Fresh<Params>();
    const unsigned first = is_packed ? fresh.FirstHead(tile) + done : blockIdx.x * teams;
    const unsigned count = is_packed ? fresh.NumHeads() : static_cast<unsigned>(w.num_heads);
    if (first >= count) return;
    const bool is_there = first + team < count;
    unsigned item = is_there ? first + team : first;
    int row_tile = 0;
    if (kShares && !is_packed) {
      const unsigned sharing = static_cast<unsigned>(w.teams_per_head);
      row_tile = static_cast<int>(item % sharing);
      item /= sharing;
    }
    const unsigned heads = static_cast<unsigned>(fresh_p.num_kv_heads);
    const int index = static_cast<int>(item / heads), head = static_cast<int>(item % heads);
    Sequence seq = is_packed ? fresh.At(fresh_p, tile, index) : DenseSequence(fresh_p, index);
    seq.row_tile = row_tile;
    if (!is_there) seq.num_keys = seq.first_query = seq.end_query = 0;
    visit(FreshParameter(p), FreshParameter<Params>(w), seq, head, is_there, meanwhile);
    if (!is_packed) return;
  }
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SMALL_SEQ_ROWS_H_
