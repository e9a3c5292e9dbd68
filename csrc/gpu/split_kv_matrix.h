// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// What a wave does with its tiles, on matrix instructions: queries of 16 bits, keys and values of
// the same type or of 8 bits.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_MATRIX_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_MATRIX_H_

#include <cstdint>

#include "matrix.h"
#include "split_kv_logits.h"
#include "split_kv_tiles.h"

namespace jax_attn::gpu {

template <DType kT, DType kStoredType, int kMaxDim, int kRowCount, bool kHasExtras>
class MatrixCore {
 public:
  static constexpr DType kStored = kStoredType;
  static constexpr bool kExtras = kHasExtras;
  static constexpr KernelShape kShape = MatrixShape(
      kMaxDim, kRowCount, kHasExtras, static_cast<int>(SizeOf(kStored)), kCopiesThroughRegisters);

  // Stores the queries of a block, all threads together: zeros past head_dim and past the rows.
  static JAX_ATTN_DEVICE void StoreQueries(const SplitKvAttentionParams& p, const Segment& s,
                                           int64_t batch, char* queries) {
    const int stride = SharedStride(p.head_dim, 2), head_dim = static_cast<int>(p.head_dim);
    const int chunks = CeilDiv(head_dim, 16) * 2;  // of 8 elements
    const uint16_t* from = static_cast<const uint16_t*>(p.query) + batch;
    for (int i = threadIdx.x; i < kRowCount * chunks; i += kShape.waves * kWave) {
      const int row = i / chunks, d = i % chunks * 8;
      uint4 x = {0, 0, 0, 0};
      if (row < s.num_rows && d < head_dim) {
        const int64_t index = RowIndex(p, s.kv_head, s.first_row + row) * head_dim + d;
        x = *reinterpret_cast<const uint4*>(from + index);
      }
      const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int position = d - d % 16 + Fragments::QueryPosition<kStored>(d % 16 + 2 * j);
        *reinterpret_cast<uint32_t*>(queries + row * stride + position * 2) = pairs[j];
      }
    }
  }

  JAX_ATTN_DEVICE MatrixCore(const SplitKvAttentionParams& p, const Segment& s, const char* queries,
                             float*)
      : p_(p),
        s_(s),
        queries_(queries),
        query_stride_(SharedStride(p.head_dim, 2)),
        k_stride_(FreshOfLane(SharedStride(p.head_dim, SizeOf(kStored)))),
        v_stride_(FreshOfLane(SharedStride(p.v_head_dim, SizeOf(kStored)))),
        lane_(FreshOfLane(Lane())) {
    if constexpr (kHoldsQueries) {
#pragma unroll
      for (int c = 0; c < kSteps; ++c) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          if (c * 16 < Fresh(static_cast<int>(p_.head_dim))) held_[c][n] = LoadQuery(c, n);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        top_[n][slot] = -kInfinity;
        total_[n][slot] = 0;
      }
    }
    const float zero = FreshOfLane(0.0f);
#pragma unroll
    for (int h = 0; h < kSteps; ++h) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) out_[h][n][i] = zero;
      }
    }
  }

  JAX_ATTN_DEVICE void Attend(const Tile& tile) {
    float x[kBlocks][kElements];
    Scores(tile, x);
    Fragments::B weights[kBlocks];
    Weigh(tile, x, weights);
#pragma unroll
    for (int h = 0; h < kSteps; ++h) {
      if (h * 16 < Fresh(static_cast<int>(p_.v_head_dim))) {
        const Fragments::A a = Fragments::LoadValues<kT, kStored>(tile.v, v_stride_, h, lane_);
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) Fragments::MultiplyAdd<kT>(a, weights[n], out_[h][n]);
      }
    }
  }

  // Leaves unnormalised outputs [rows][v_head_dim], tops and totals in shared memory.
  JAX_ATTN_DEVICE void Finish(float* outputs, float* tops, float* totals) const {
    const int lane = FreshOfLane(lane_), v_head_dim = Fresh(static_cast<int>(p_.v_head_dim));
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const float total = Fragments::SumOverKeys(total_[n][slot]);
        const int row = n * Fragments::kRows + Fragments::Row(lane, slot);
        // The same from every lane that has the row.
        tops[row] = top_[n][slot];
        totals[row] = total;
      }
#pragma unroll
      for (int h = 0; h < kSteps; ++h) {
        if (h * 16 < Fresh(v_head_dim)) {
#pragma unroll
          for (int i = 0; i < kElements; ++i) {
            const int row = n * Fragments::kRows + Fragments::Row(lane, Fragments::SlotOf(i));
            const int d = h * 16 + Fragments::Element<kStored>(lane, i);
            if (d < v_head_dim) outputs[row * v_head_dim + d] = out_[h][n][i];
          }
        }
      }
    }
  }

 private:
  static constexpr int kBlocks = kRowCount / Fragments::kRows;
  static constexpr int kSteps = kMaxDim / 16;
  static constexpr int kElements = Fragments::kElements;
  static constexpr int kSlots = Fragments::kSlots;
  static_assert(kRowCount % Fragments::kRows == 0);

  // Whether there are registers for all queries.
  static constexpr bool kHoldsQueries =
      !kCopiesThroughRegisters && kSteps * kBlocks * sizeof(Fragments::B) <= 64;

  JAX_ATTN_DEVICE Fragments::B LoadQuery(int c, int n) const {
    const char* rows = queries_ + n * Fragments::kRows * query_stride_;
    return Fragments::LoadQuery<kT>(rows, query_stride_, c, lane_);
  }

  // Dot products of keys and queries. A chain of its own for every other step halves the wait for
  // one instruction after the other.
  JAX_ATTN_DEVICE void Scores(const Tile& tile, float (&x)[kBlocks][kElements]) const {
    float other[kBlocks][kElements];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) x[n][i] = other[n][i] = 0;
    }
#pragma unroll
    for (int c = 0; c < kSteps; ++c) {
      if (c * 16 < Fresh(static_cast<int>(p_.head_dim))) {
        const Fragments::A a = Fragments::LoadKeys<kT, kStored>(tile.k, k_stride_, c, lane_);
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          Fragments::B b;
          if constexpr (kHoldsQueries) {
            b = held_[c][n];
          } else {
            b = LoadQuery(c, n);
          }
          Fragments::MultiplyAdd<kT>(a, b, c % 2 == 0 ? x[n] : other[n]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) x[n][i] += other[n][i];
    }
  }

  JAX_ATTN_DEVICE void Weigh(const Tile& tile, float (&x)[kBlocks][kElements],
                             Fragments::B (&weights)[kBlocks]) {
    const bool all_seen = !kHasExtras && tile.first_key >= s_.common.begin &&
                          tile.first_key + kFragmentKeys <= min(s_.common.end, s_.keys.end);
    const float factor = s_.logit_factor * kLog2E;
    float rescale[kBlocks][kSlots];
    bool any_rescale = false;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      float top[kSlots];
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) top[slot] = -kInfinity;
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const int slot = Fragments::SlotOf(i);
        if (all_seen) {
          x[n][i] *= factor;
        } else {
          const int key = Fragments::Key(lane_, i);
          const int row = n * Fragments::kRows + Fragments::Row(lane_, slot);
          // Keys of the entry that belong to another part of it are not in this tile.
          x[n][i] = tile.first_key + key < s_.keys.end
                        ? Logit<kHasExtras>(p_, s_, tile, key, row, x[n][i])
                        : -kInfinity;
        }
        top[slot] = Max(top[slot], x[n][i]);
      }
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const float new_top = Max(top_[n][slot], Fragments::MaxOverKeys(top[slot]));
        const float base = Base(new_top);
        rescale[n][slot] = Exp2(top_[n][slot] - base);
        any_rescale |= top_[n][slot] != new_top;
        top_[n][slot] = new_top;
        total_[n][slot] *= rescale[n][slot];
        top[slot] = base;
      }
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const int slot = Fragments::SlotOf(i);
        x[n][i] = Exp2(x[n][i] - top[slot]);
        total_[n][slot] += x[n][i];
        if constexpr (kHasExtras) {
          if (s_.v_scale != nullptr) x[n][i] *= tile.v_scale[Fragments::Key(lane_, i)];
        }
      }
      weights[n] = Fragments::FromScores<kT>(x[n]);
    }
    if (!Any(any_rescale)) return;
#pragma unroll
    for (int h = 0; h < kSteps; ++h) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) out_[h][n][i] *= rescale[n][Fragments::SlotOf(i)];
      }
    }
  }

  const SplitKvAttentionParams& p_;
  const Segment& s_;
  const char* queries_;
  int query_stride_, k_stride_, v_stride_, lane_;
  Fragments::B held_[kHoldsQueries ? kSteps : 1][kBlocks];
  float top_[kBlocks][kSlots];
  float total_[kBlocks][kSlots];  // of the lane's own keys
  float out_[kSteps][kBlocks][kElements];
};

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_MATRIX_H_
