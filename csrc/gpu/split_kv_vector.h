// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// What a wave does with its tiles, on multiply-adds in float32: any types.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_VECTOR_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_VECTOR_H_

#include <cstdint>

#include "split_kv_logits.h"
#include "split_kv_tiles.h"

namespace jax_attn::gpu {

template <DType kStoredType, int kMaxDim, int kRowCount>
class VectorCore {
 public:
  static constexpr DType kStored = kStoredType;
  static constexpr bool kExtras = true;
  static constexpr KernelShape kShape =
      VectorShape(kMaxDim, kRowCount, static_cast<int>(SizeOf(kStored)), kCopiesThroughRegisters);

  // Stores the queries of a block as floats, all threads together.
  static JAX_ATTN_DEVICE void StoreQueries(const SplitKvAttentionParams& p, const Segment& s,
                                           int64_t batch, char* queries) {
    const int head_dim = static_cast<int>(p.head_dim), stride = head_dim + 4;
    for (int i = threadIdx.x; i < kRowCount * head_dim; i += kShape.waves * kWave) {
      const int row = i / head_dim, d = i % head_dim;
      float x = 0;
      if (row < s.num_rows) {
        const int64_t index = RowIndex(p, s.kv_head, s.first_row + row) * head_dim + d;
        x = LoadElement(p.query, p.query_dtype, batch + index);
      }
      reinterpret_cast<float*>(queries)[row * stride + d] = x;
    }
  }

  // `weights`: shared memory of the wave, [rows][keys].
  JAX_ATTN_DEVICE VectorCore(const SplitKvAttentionParams& p, const Segment& s, const char* queries,
                             float* weights)
      : p_(p),
        s_(s),
        queries_(reinterpret_cast<const float*>(queries)),
        weights_(weights),
        query_stride_(static_cast<int>(p.head_dim) + 4),
        k_stride_(FreshOfLane(SharedStride(p.head_dim, kSize))),
        v_stride_(FreshOfLane(SharedStride(p.v_head_dim, kSize))),
        lane_(FreshOfLane(Lane())) {
#pragma unroll
    for (int r = 0; r < kRowCount; ++r) {
      top_[r] = -kInfinity;
      total_[r] = 0;
#pragma unroll
      for (int i = 0; i < kColumns * kVector; ++i) out_[r][i] = 0;
    }
  }

  JAX_ATTN_DEVICE void Attend(const Tile& tile) {
    float x[kRowCount];
    Scores(tile, x);
    Weigh(tile, x);
    Accumulate(tile);
  }

  JAX_ATTN_DEVICE void Finish(float* outputs, float* tops, float* totals) const {
    const int lane = FreshOfLane(lane_), v_head_dim = Fresh(static_cast<int>(p_.v_head_dim));
    const int num_rows = Fresh(s_.num_rows);
#pragma unroll
    for (int r = 0; r < kRowCount; ++r) {
      if (r >= num_rows) break;
      tops[r] = top_[r];
      float total = total_[r];
#pragma unroll
      for (int mask = 1; mask < kTileKeys; mask *= 2) total += ShuffleXor(total, mask);
      totals[r] = total;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          float sum = out_[r][c * kVector + e];
#pragma unroll
          for (int mask = kLanesPerRow; mask < kWave; mask *= 2) sum += ShuffleXor(sum, mask);
          const int d = (c * kLanesPerRow + lane % kLanesPerRow) * kVector + e;
          if (lane < kLanesPerRow && d < v_head_dim) outputs[r * v_head_dim + d] = sum;
        }
      }
    }
  }

 private:
  static constexpr int kSize = static_cast<int>(SizeOf(kStored));
  static constexpr int kTileKeys = kShape.tile_keys;
  // Elements that a lane reads at once: 16 bytes, 8 of 8-bit types.
  static constexpr int kVector = kSize == 4 ? 4 : 8;
  static constexpr int kWords = kVector * kSize / 4;
  static constexpr int kPerWord = 4 / kSize;
  static constexpr int kParts = kWave / kTileKeys;  // lanes that share a key's dot product
  static constexpr int kVectors = kMaxDim / kVector;
  static constexpr int kLanesPerRow = kVectors < kWave ? kVectors : kWave;
  static constexpr int kColumns = kVectors / kLanesPerRow;
  static constexpr int kKeysAtOnce = kWave / kLanesPerRow;

  static JAX_ATTN_DEVICE void Load(const char* from, float (&x)[kVector]) {
    using Type = typename Bytes<kVector * kSize>::Type;
    const Type raw = *reinterpret_cast<const Type*>(from);
    uint32_t words[kWords];
    __builtin_memcpy(words, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < kWords; ++i) ToFloats<kStored>(words[i], x + i * kPerWord);
  }

  // Dot products of the lane's key with all rows; the same in all lanes that share the key.
  JAX_ATTN_DEVICE void Scores(const Tile& tile, float (&x)[kRowCount]) const {
    const int num_rows = Fresh(s_.num_rows), query_stride = Fresh(query_stride_);
    const char* key = tile.k + lane_ % kTileKeys * k_stride_;
    const int head_dim = Fresh(static_cast<int>(p_.head_dim));
#pragma unroll
    for (int r = 0; r < kRowCount; ++r) x[r] = 0;
#pragma unroll 2
    for (int d = lane_ / kTileKeys * kVector; d < head_dim; d += kParts * kVector) {
      float k[kVector];
      Load(key + d * kSize, k);
#pragma unroll
      for (int r = 0; r < kRowCount; ++r) {
        if (r >= num_rows) break;
        const float4* q = reinterpret_cast<const float4*>(queries_ + r * query_stride + d);
#pragma unroll
        for (int e = 0; e < kVector; e += 4) {
          const float4 four = q[e / 4];
          x[r] = fmaf(k[e], four.x, x[r]);
          x[r] = fmaf(k[e + 1], four.y, x[r]);
          x[r] = fmaf(k[e + 2], four.z, x[r]);
          x[r] = fmaf(k[e + 3], four.w, x[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowCount; ++r) {
#pragma unroll
      for (int mask = kTileKeys; mask < kWave; mask *= 2) x[r] += ShuffleXor(x[r], mask);
    }
  }

  // Turns scores into weights in shared memory, and brings outputs to the new maximum.
  JAX_ATTN_DEVICE void Weigh(const Tile& tile, const float (&x)[kRowCount]) {
    const int num_rows = Fresh(s_.num_rows);
    const int key = lane_ % kTileKeys;
    const bool inside = tile.first_key + key < s_.keys.end;
    const float v_scale = s_.v_scale != nullptr ? tile.v_scale[key] : 1.0f;
    WaveFence();  // the weights of the tile before have been read
#pragma unroll
    for (int r = 0; r < kRowCount; ++r) {
      if (r >= num_rows) break;
      const float logit = inside ? Logit<true>(p_, s_, tile, key, r, x[r]) : -kInfinity;
      float top = logit;
#pragma unroll
      for (int mask = 1; mask < kTileKeys; mask *= 2) top = Max(top, ShuffleXor(top, mask));
      top = Max(top_[r], top);
      const float rescale = Exp2(top_[r] - Base(top));
      const float weight = Exp2(logit - Base(top));
      total_[r] = total_[r] * rescale + weight;
      if (lane_ < kTileKeys) weights_[r * kTileKeys + key] = weight * v_scale;
      if (top_[r] != top) {  // the same in all lanes
#pragma unroll
        for (int i = 0; i < kColumns * kVector; ++i) out_[r][i] *= rescale;
      }
      top_[r] = top;
    }
    WaveFence();
  }

  JAX_ATTN_DEVICE void Accumulate(const Tile& tile) {
    const int num_rows = Fresh(s_.num_rows), v_head_dim = Fresh(static_cast<int>(p_.v_head_dim));
#pragma unroll 2
    for (int i = 0; i < kTileKeys; i += kKeysAtOnce) {
      const int key = i + lane_ / kLanesPerRow;
      const char* row = tile.v + key * v_stride_;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int d = (c * kLanesPerRow + lane_ % kLanesPerRow) * kVector;
        if (d >= v_head_dim) continue;
        float v[kVector];
        Load(row + d * kSize, v);
#pragma unroll
        for (int r = 0; r < kRowCount; ++r) {
          if (r >= num_rows) break;
          const float weight = weights_[r * kTileKeys + key];
#pragma unroll
          for (int e = 0; e < kVector; ++e) {
            out_[r][c * kVector + e] = fmaf(weight, v[e], out_[r][c * kVector + e]);
          }
        }
      }
    }
  }

  const SplitKvAttentionParams& p_;
  const Segment& s_;
  const float* queries_;
  float* weights_;
  int query_stride_, k_stride_, v_stride_, lane_;
  float top_[kRowCount];
  float total_[kRowCount];  // of the lane's own key
  float out_[kRowCount][kColumns * kVector];
};

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_VECTOR_H_
