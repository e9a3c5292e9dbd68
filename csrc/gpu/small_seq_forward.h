// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The forward kernels. A team does all query rows of a kv head of a sequence.

#ifndef JAX_ATTN_CSRC_GPU_SMALL_SEQ_FORWARD_H_
#define JAX_ATTN_CSRC_GPU_SMALL_SEQ_FORWARD_H_

#include <cstdint>

#include "small_seq_rows.h"

namespace jax_attn::gpu {

// Writes what rows that see nothing have.
template <typename Team>
JAX_ATTN_DEVICE void ClearRows(const SmallSeqAttentionParams& p, const SmallSeqWork& w,
                               const Sequence& seq, int head, int begin, int end) {
  const int group = w.group_size, v_dim = static_cast<int>(p.v_head_dim);
  for (int t = begin; t < end; ++t) {
    for (int g = 0; g < group; ++g) {
      const int64_t row = seq.QueryRow(p, t, head * group + g);
      Team::StoreZeros(static_cast<char*>(p.out) + row * v_dim * Team::kSize, v_dim);
      if (Team::LaneOfTeam() == 0) p.lse[row] = -kInfinity;
    }
  }
}

// The same for tokens of no sequence.
template <DType kDType>
JAX_ATTN_DEVICE void ClearUnusedRows(const SmallSeqAttentionParams& p,
                                     const PackedSequences& packed) {
  const int64_t size = p.num_q_heads * p.v_head_dim * static_cast<int64_t>(SizeOf(kDType)) / 16;
  packed.ForUnused(true, size, [&](int64_t i) { static_cast<uint4*>(p.out)[i] = {0, 0, 0, 0}; });
  packed.ForUnused(true, p.num_q_heads, [&](int64_t i) { p.lse[i] = -kInfinity; });
}

// One row. Of up to 8 keys, all keys and values are on their way at once; of more, values follow as
// keys free their registers.
template <typename Team, int kKeys>
JAX_ATTN_DEVICE void AttendOneRow(const SmallSeqAttentionParams& p, const SmallSeqWork& w,
                                  const Sequence& seq, int head, bool is_there) {
  using Part = typename Team::Part;
  constexpr int kEach = kKeys < kChunk ? kKeys : kChunk;
  constexpr int kChunks = kKeys / kEach;
  constexpr bool kAtOnce = kKeys * Team::kPieces <= 8;
  const int dim = static_cast<int>(p.head_dim), v_dim = static_cast<int>(p.v_head_dim);
  const int num_keys = seq.num_keys;
  const char* key = HeadOf<Team>(p.key, seq.at.key + seq.KeyIn(p, 0, head) * dim);
  const char* value = HeadOf<Team>(p.value, seq.at.value + seq.KeyIn(p, 0, head) * v_dim);
  const int64_t key_bytes = p.num_kv_heads * dim * Team::kSize;
  const int64_t value_bytes = p.num_kv_heads * v_dim * Team::kSize;

  const Part query = Team::Load(HeadOf<Team>(p.query, seq.at.query + seq.QueryIn(p, 0, head) * dim),
                                dim, num_keys > 0);
  Part keys[kKeys], values[kKeys];
#pragma unroll
  for (int j = 0; j < kKeys; ++j) keys[j] = Team::Load(key + j * key_bytes, dim, j < num_keys);
  if constexpr (kAtOnce) {
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      values[j] = Team::Load(value + j * value_bytes, v_dim, j < num_keys);
    }
  }
  float x[Team::kElements], s[kChunks];
  Team::Unpack(query, x);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    float products[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) products[i] = Team::Multiply(x, keys[c * kEach + i]);
    if constexpr (!kAtOnce) {
      KeepOrder();
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int j = c * kEach + i;
        values[j] = Team::Load(value + j * value_bytes, v_dim, j < num_keys);
      }
    }
    s[c] = Team::SumOverTeam(products);
  }

  RowLogits row(p, seq, 0, head);
  if (num_keys == 0) row.end = 0;  // there is no such query, or it sees nothing
  const int own = Lane() % kChunk;
  float top = -kInfinity, total = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int j = c * kChunk + own;
    float slope;
    s[c] = row.Sees(j) ? row.Of(p, s[c], j, slope) : -kInfinity;
    top = Max(top, s[c]);
  }
  top = MaxOfChunk(top);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) total += s[c] = Relative(s[c], top);
  total = SumOfChunk(total);
  float out[Team::kElements];
  Team::Clear(out);
#pragma unroll
  for (int j = 0; j < kKeys; ++j) Team::Add(OfKey(s[j / kEach], j % kEach), values[j], out);
  if (!is_there) return;
  if (seq.query.room > 0) {
    const int64_t index = seq.QueryRow(p, 0, head);
    Team::Store(static_cast<char*>(p.out) + index * v_dim * Team::kSize, v_dim,
                total == 0 ? 0.0f : 1.0f / total, out);
    if (Team::LaneOfTeam() == 0) p.lse[index] = LogSumExp(top, total);
  }
  if (seq.query.room > 1) ClearRows<Team>(p, w, seq, head, 1, seq.query.room);
}

// Any number of rows and keys: a few rows at a time with four keys at a time. Rows after the first
// ones read the keys and values again, from the nearest cache.
template <typename Team>
JAX_ATTN_DEVICE void AttendRows(const SmallSeqAttentionParams& p, const SmallSeqWork& w,
                                const Sequence& seq, int head, bool is_there) {
  using Part = typename Team::Part;
  constexpr int kRows = (kManyRegisters ? 32 : 16) / (Team::kElements < 8 ? 8 : Team::kElements);
  const int dim = static_cast<int>(p.head_dim), v_dim = static_cast<int>(p.v_head_dim);
  const int num_keys = seq.num_keys;
  const char* const all_keys = HeadOf<Team>(p.key, seq.at.key + seq.KeyIn(p, 0, head) * dim);
  const char* const all_values =
      HeadOf<Team>(p.value, seq.at.value + seq.KeyIn(p, 0, head) * v_dim);
  const int64_t key_bytes = p.num_kv_heads * dim * Team::kSize;
  const int64_t value_bytes = p.num_kv_heads * v_dim * Team::kSize;
  const RowsOfHead rows(w, seq, head);
  const int own = Lane() % kChunk;

#pragma unroll 1
  for (int first = 0; Any(first < rows.count); first += kRows) {
    const SmallSeqAttentionParams& now_p = FreshParameter(p);
    float x[kRows][Team::kElements], out[kRows][Team::kElements], top[kRows], total[kRows];
    RowLogits row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto [t, query_head] = rows.At(first + r);
      const char* query =
          HeadOf<Team>(now_p.query, seq.at.query + seq.QueryIn(now_p, t, query_head) * dim);
      Team::Unpack(Team::Load(query, dim, first + r < rows.count), x[r]);
      Team::Clear(out[r]);
      row[r] = RowLogits(now_p, seq, t, query_head);
      top[r] = -kInfinity;
      total[r] = 0;
    }
    const char *key = all_keys, *value = all_values;
#pragma unroll 1
    for (int j = 0; Any(j < num_keys); j += kChunk) {
      Part keys[kChunk], values[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i, key += key_bytes) {
        keys[i] = Team::Load(key, dim, j + i < num_keys);
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i, value += value_bytes) {
        values[i] = Team::Load(value, v_dim, j + i < num_keys);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r > 0 && !Any(first + r < rows.count)) continue;
        KeepOrder();
        float products[kChunk], slope;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) products[i] = Team::Multiply(x[r], keys[i]);
        const float product = Team::SumOverTeam(products);
        const bool sees = row[r].Sees(j + own);
        const float logit =
            sees ? row[r].Of(FreshParameter(p), product, j + own, slope) : -kInfinity;
        const float new_top = Max(top[r], MaxOfChunk(logit));
        const float keep = Relative(top[r], new_top), weight = Relative(logit, new_top);
        top[r] = new_top;
        total[r] = keep * total[r] + weight;
#pragma unroll
        for (int e = 0; e < Team::kElements; ++e) out[r][e] *= keep;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) Team::Add(OfKey(weight, i), values[i], out[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = SumOfChunk(total[r]);
      if (first + r >= rows.count) continue;
      const auto [t, query_head] = rows.At(first + r);
      const SmallSeqAttentionParams& later_p = FreshParameter(p);
      const int64_t index = seq.QueryRow(later_p, t, query_head);
      Team::Store(static_cast<char*>(later_p.out) + index * v_dim * Team::kSize, v_dim,
                  sum == 0 ? 0.0f : 1.0f / sum, out[r]);
      if (Team::LaneOfTeam() == 0) later_p.lse[index] = LogSumExp(top[r], sum);
    }
  }
  if (!is_there) return;
  const SmallSeqAttentionParams& later_p = FreshParameter(p);
  ClearRows<Team>(later_p, w, seq, head, 0, seq.first_query);
  ClearRows<Team>(later_p, w, seq, head, seq.end_query, seq.query.room);
}

// `kKeys`: at most, and one row; 0: any number of both.
template <typename Team, int kKeys>
__global__ void JAX_ATTN_LAUNCH_BOUNDS(
    kMaxThreads, BlocksPerCore(SmallSeqShape{Team::kLanes, Team::kPieces, kKeys}, false))
    SmallSeqForward(JAX_ATTN_PARAMETER SmallSeqAttentionParams p,
                    JAX_ATTN_PARAMETER SmallSeqWork w) {
  __shared__ PackedSequences::Shared shared;
  const auto visit = [&](const SmallSeqAttentionParams& p, const SmallSeqWork& w,
                         const Sequence& seq, int head, bool is_there, auto meanwhile) {
    if constexpr (kKeys > 0) {
      AttendOneRow<Team, kKeys>(p, w, seq, head, is_there);
    } else {
      AttendRows<Team>(p, w, seq, head, is_there);
    }
    meanwhile();
  };
  const PackedSequences packed(p, w, shared);
  ForEachHead<Team::kLanes>(p, w, packed, p.packed(), 0, visit);
  if (p.packed())
    ClearUnusedRows<Team::kDType>(FreshParameter(p), packed.Fresh<SmallSeqAttentionParams>());
}

// Kernels for SmallSeqKernelOf.
struct ForwardKernels {
  static constexpr int kMaxPieces = 32;  // of keys that a lane has
  template <typename Team, int kKeys>
  static const void* Of() {
    return KernelAddress(SmallSeqForward<Team, kKeys>);
  }
};

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SMALL_SEQ_FORWARD_H_
