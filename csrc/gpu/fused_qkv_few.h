// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The fused QKV pass of few tokens, where what counts is how long a wave takes from its first
// instruction to its last: a lane has two pieces of one head and nothing else, all that can be read
// at once is, and there is hardly a branch, behind which a read would wait for the one before.

#ifndef JAX_ATTN_CSRC_GPU_FUSED_QKV_FEW_H_
#define JAX_ATTN_CSRC_GPU_FUSED_QKV_FEW_H_

#include <cstdint>

#include "fused_qkv_head.h"
#include "fused_qkv_kernels.h"

namespace jax_attn::gpu {

// The slots of the tokens after one, in which a wave looks for its slot.
class LaterSlots {
 public:
  JAX_ATTN_DEVICE LaterSlots(const int32_t* slots, int token, int num_tokens)
      : slots_(slots), last_(num_tokens - 1), next_(token + 1 + Lane()) {}

  // Begins to read.
  JAX_ATTN_DEVICE void Read() {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) read_[i] = LoadNow(slots_ + min(next_ + i * kWave, last_));
  }

  // Called by a whole wave.
  JAX_ATTN_DEVICE bool Have(int32_t slot) {
    bool found = false;
#pragma unroll 1
    while (true) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        found |= next_ + i * kWave <= last_ && read_[i] == slot;
      }
      next_ += kAhead * kWave;
      if (next_ - Lane() > last_) break;
      Read();
    }
    return Any(found);
  }

 private:
  static constexpr int kAhead = 4;

  const int32_t* slots_;
  int last_;
  int next_;
  int32_t read_[kAhead] = {};
};

template <DType kDType, int kSize>
__global__ void __launch_bounds__(kFusedQkvFewThreads)
    FusedQkvFewKernel(JAX_ATTN_PARAMETER FusedQkvFewWork w) {
  using Pieces = Piece<kDType, kSize>;
  constexpr int kBytes = Pieces::kBytes;
  const int block = static_cast<int>(blockIdx.x);
  const int token = static_cast<int>(w.tokens_of_blocks.Divide(static_cast<uint32_t>(block)));
  const int index =
      (block - token * w.blocks_per_token) * kFusedQkvFewThreads + static_cast<int>(threadIdx.x);
  const bool wanted = index >> w.lane_bits < w.num_heads;
  // Lanes without a head read another's, and lanes without a piece another piece.
  const int head = min(index >> w.lane_bits, w.num_heads - 1);
  const bool is_query = head < w.num_q_heads, is_value = head >= w.num_qk_heads;
  const LanePieces at =
      PlainPieces(index & ((1 << w.lane_bits) - 1), w.rotated_slots, w.other_slots, w.num_pieces);
  const int first = min(at.first, w.num_pieces - 1) * kBytes;
  const int second = min(at.second, w.num_pieces - 1) * kBytes;

  const char* const row =
      static_cast<const char*>(w.qkv) + int64_t{token} * w.token_bytes + head * w.head_bytes;
  uint32_t position = LoadNow(w.positions + token);
  Pieces pieces[2], weights[2];
  pieces[0].Load(row + first);
  pieces[1].Load(row + second);
  const int32_t slot = LoadNow(w.slots + token);
  const char* const q_weight = InRegister(static_cast<const char*>(w.q_weight));
  const char* const k_weight = InRegister(static_cast<const char*>(w.k_weight));
  const char* const weight = is_query ? q_weight : k_weight;
  const bool weighted = !is_value && (is_query ? w.weighs_queries : w.weighs_keys);
  weights[0].Load(weight + first);
  weights[1].Load(weight + second);
  // Heads of keys and values are behind those of queries, so that the last lane of a wave knows.
  const bool stores = (index | (kWave - 1)) >> w.lane_bits >= w.num_q_heads;
  LaterSlots later(w.slots, token, w.num_tokens);
  if (stores) later.Read();
  const int32_t given_layer = LoadNow(w.layer);
  const uint32_t offset = LoadNow(w.offsets + token);
  BeginReads();
  const int32_t layer = given_layer & w.layer_mask;
  position += offset & w.offset_mask;

  // Lanes that rotate nothing read too: behind a branch the position would be read late.
  const bool rotated = at.rotated && !is_value;
  const int32_t asked = static_cast<int32_t>(position);
  const int64_t from = int64_t{min(max(asked, 0), w.last_position)} * w.table_width +
                       (at.rotated ? at.first * kSize : 0);
  TablePieces<kSize> tables;
  tables[0].Load(w.cos + from);
  tables[1].Load(w.sin + from);

  float x[2][kSize], own[2][kSize], y[2][kSize];
  pieces[0].Decode(x[0]);
  pieces[1].Decode(x[1]);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    own[0][i] = at.has_first ? x[0][i] : 0.0f;
    own[1][i] = at.has_second ? x[1][i] : 0.0f;
  }
  const bool normalized = is_value ? w.normalizes_values : w.normalizes;
  const float norm = InverseNorm(own, w.lane_bits, w.inverse_size, w.epsilon);
  HeadFactors<kSize> factors;
  MakeHeadFactors(weights, weighted, w.weight_offset, tables, rotated, factors);
  TurnHead(x, factors, rotated, normalized ? norm : 1.0f, y);
  if (normalized || rotated) {
    pieces[0].Encode(y[0]);
    pieces[1].Encode(y[1]);
  }

  char* const query = InRegister(w.query);
  char* const key = InRegister(w.key);
  char* const value = InRegister(w.value);
  const int q_token_bytes = InRegister(w.q_token_bytes);
  const int kv_token_bytes = InRegister(w.kv_token_bytes);
  char* const out = (is_query   ? query
                     : is_value ? value
                                : key) +
                    int64_t{token} * (is_query ? q_token_bytes : kv_token_bytes) +
                    head * w.head_bytes;
  if (wanted && at.has_first) pieces[0].Store(out + first);
  if (wanted && at.has_second) pieces[1].Store(out + second);

  if (!stores) return;
  const bool replaced = later.Have(slot);
  if (is_query || replaced || slot < 0 || slot >= w.capacity || layer < 0 ||
      layer >= w.num_layers) {
    return;
  }
  const uint32_t page = w.pages_of_slots.Divide(static_cast<uint32_t>(slot));
  const uint32_t place = static_cast<uint32_t>(slot) - page * w.page_size;
  char* const k_pages = InRegister(w.k_pages);
  char* const v_pages = InRegister(w.v_pages);
  char* const cached = (is_value ? v_pages : k_pages) + layer * w.layer_stride +
                       page * w.page_stride + place * w.token_stride + head * w.head_stride;
  if (wanted && at.has_first) pieces[0].Store(cached + first);
  if (wanted && at.has_second) pieces[1].Store(cached + second);
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_FUSED_QKV_FEW_H_
