// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The tiles of keys and values that a wave works on, and how they get to shared memory. Each wave
// has its own ring of tiles, so that waves never wait for each other.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_TILES_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_TILES_H_

#include <cstdint>

#include "../dtype.h"
#include "split_kv_kernel.h"
#include "split_kv_work.h"
#include "wave.h"

namespace jax_attn::gpu {

// Where the operands of a batch index begin, in elements.
struct BatchOffsets {
  int64_t query, key, value, bias, mask, page_table, layer, alibi_slopes, sinks, k_scale, v_scale;
};

inline constexpr int kNumBatchOffsets = sizeof(BatchOffsets) / sizeof(int64_t);
static_assert(sizeof(SplitWork::batch_strides) == sizeof(BatchOffsets));

// Fills `at`, a thread for each operand: offsets take divisions if there are several dimensions.
JAX_ATTN_DEVICE void FindOffsets(const SplitKvAttentionParams& p, const SplitWork& w,
                                 int64_t batch_index, BatchOffsets& at) {
  const int i = FreshOfLane(static_cast<int>(threadIdx.x));
  if (i >= kNumBatchOffsets) return;
  int64_t* const offsets = reinterpret_cast<int64_t*>(&at);
  if (w.one_batch_dim) {
    offsets[i] = w.batch_strides[i] * batch_index;
    return;
  }
  const BatchStrides* const batches[] = {
      &p.query_batch, &p.key.batch,        &p.value.batch,  &p.bias.batch,
      &p.mask.batch,  &p.page_table.batch, &p.layer.batch,  &p.alibi_slopes.batch,
      &p.sinks.batch, &p.k_scale.batch,    &p.v_scale.batch};
  const BatchStrides* batch = batches[0];
#pragma unroll
  for (int j = 1; j < kNumBatchOffsets; ++j) {
    if (i == j) batch = batches[j];
  }
  offsets[i] = batch->Offset(p.batch, batch_index);
}

// One row of the block: a query with a head.
struct RowInfo {
  KeyRange keys;
  int position;
  float slope;   // ALiBi
  int64_t bias;  // offset of key 0
  int64_t mask;
};

// A part of an entry that a block does at once, for one kv head.
struct Segment {
  int64_t batch_index;
  int kv_head;
  int first_row, num_rows;
  KeyRange keys;    // of the part
  KeyRange common;  // that all rows see, but for the mask
  int64_t slot;     // of its partial result; negative: it has all keys of its rows
  const char* k;    // row 0 of the head
  const char* v;
  const int32_t* pages;  // null: dense
  const float* k_scale;  // of tokens; null: none
  const float* v_scale;
  float logit_factor;   // scale, and that of the head's keys
  float value_factor;   // scale of the head's values
  const RowInfo* rows;  // shared memory

  JAX_ATTN_DEVICE Segment(const SplitKvAttentionParams& p, const Entry& entry, int kv_head,
                          const KeyRange& keys, int64_t slot, const RowInfo* rows,
                          const BatchOffsets& at)
      : batch_index(entry.batch_index),
        kv_head(kv_head),
        first_row(entry.first_row),
        num_rows(entry.num_rows),
        keys(keys),
        common(entry.common),
        slot(slot),
        rows(rows) {
    int64_t layer = 0;
    if (p.layer.data != nullptr) {
      layer = min(max(int64_t{p.layer.data[at.layer]}, int64_t{0}), p.num_layers - 1);
    }
    k = Data(p.key, at.key, layer);
    v = Data(p.value, at.value, layer);
    pages = p.page_size == 0 ? nullptr : p.page_table.data + at.page_table;
    k_scale = Scales(p.k_scale, at.k_scale, layer);
    v_scale = Scales(p.v_scale, at.v_scale, layer);
    // The factor of all tokens of the head, unless each has its own.
    logit_factor = p.scale;
    if (k_scale != nullptr && p.k_scale.token_stride == 0) logit_factor *= *k_scale;
    if (p.k_scale.token_stride == 0) k_scale = nullptr;
    value_factor = 1.0f;
    if (v_scale != nullptr && p.v_scale.token_stride == 0) value_factor = *v_scale;
    if (p.v_scale.token_stride == 0) v_scale = nullptr;
  }

 private:
  JAX_ATTN_DEVICE const char* Data(const KvOperand& x, int64_t batch, int64_t layer) const {
    const int64_t offset = batch + layer * x.layer_stride + kv_head * x.head_stride;
    return static_cast<const char*>(x.data) + offset * SizeOf(x.dtype);
  }

  JAX_ATTN_DEVICE const float* Scales(const ScaleOperand& x, int64_t batch, int64_t layer) const {
    if (x.data == nullptr) return nullptr;
    return x.data + batch + layer * x.layer_stride + kv_head * x.head_stride;
  }
};

// A tile in shared memory, of one wave.
struct Tile {
  const char* k;
  const char* v;
  const float* k_scale;
  const float* v_scale;
  int first_key;
};

template <DType kStored, int kMaxDim, int kTileKeys, int kStages, bool kExtras>
class TileRing {
 public:
  JAX_ATTN_DEVICE TileRing(const SplitKvAttentionParams& p, const SplitWork& w,
                           const Segment& segment, char* shared, int wave, int num_waves)
      : p_(p),
        w_(w),
        s_(segment),
        shared_(shared),
        k_stride_(SharedStride(p.head_dim, kSize)),
        v_stride_(SharedStride(p.v_head_dim, kSize)),
        stage_bytes_(StageBytes(p.head_dim, p.v_head_dim, kSize, kTileKeys)),
        step_(num_waves * kTileKeys),
        key_(segment.keys.begin + wave * kTileKeys) {
    Find();
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) Begin();
  }

  // Whether there are tiles to come.
  JAX_ATTN_DEVICE bool More() const { return at_ < begun_; }

  // Goes on by one tile, which stays until the next step.
  JAX_ATTN_DEVICE void Next(Tile& tile) {
    char* stage = shared_ + at_ % kStages * stage_bytes_;
    if constexpr (kCopiesThroughRegisters) {
      WaveFence();  // the tile before has been read
      Land(stage);
    } else {
      WaitForBatches<kAhead - 1>();
    }
    WaveFence();
    tile.k = stage;
    tile.v = stage + kTileKeys * k_stride_;
    const char* header = tile.v + kTileKeys * v_stride_;
    tile.k_scale = reinterpret_cast<const float*>(header);
    tile.v_scale = tile.k_scale + kTileKeys;
    tile.first_key = *reinterpret_cast<const int*>(header + 2 * kTileKeys * 4);
    Begin();
    ++at_;
  }

 private:
  static constexpr int kSize = static_cast<int>(SizeOf(kStored));
  // Batches under way while a tile is worked on.
  static constexpr int kAhead = kCopiesThroughRegisters ? 1 : kStages - 1;
  static constexpr int kChunks = kMaxDim * kSize / 16;  // of 16 bytes in a row
  static constexpr int kLanesPerRow = kChunks < kWave ? kChunks : kWave;
  static constexpr int kRowsAtOnce = kWave / kLanesPerRow;
  static constexpr int kPasses = kTileKeys / kRowsAtOnce > 0 ? kTileKeys / kRowsAtOnce : 1;
  static constexpr int kColumns = kChunks / kLanesPerRow;
  static constexpr int kCopies = kPasses * kColumns;
  // Registers hold this many chunks of keys, and of values. Rows of 8-bit elements that are not
  // whole chunks are rare, and theirs are not held.
  static constexpr int kMaxHeld = kWave == 64 ? 8 : 4;
  using Chunks = Copies<16, kCopies, (kCopies < kMaxHeld ? kCopies : kMaxHeld)>;
  struct Nothing {};
  using Halves = std::conditional_t<kSize == 1, Copies<8, 2 * kCopies, 0>, Nothing>;
  static constexpr bool kLandReadsHalves = kCopiesThroughRegisters && kSize == 1;
  static constexpr uint32_t kAllKeys = (uint32_t{1} << kTileKeys) - 1;

  // Finds the keys of the tile to begin next, from key_ on, and where they are.
  JAX_ATTN_DEVICE void Find() {
    const int lane = Lane() % kTileKeys;
    for (; key_ < s_.keys.end; key_ += step_) {
      const int rest = s_.keys.end - key_;
      wanted_ = rest >= kTileKeys ? kAllKeys : (uint32_t{1} << rest) - 1;
      if constexpr (kExtras) {
        if (p_.mask.data != nullptr) wanted_ &= SeenThroughMask();
      }
      if (wanted_ != 0) break;
    }
    const bool exists = key_ < s_.keys.end;
    if (!exists) wanted_ = 0;
    token_ = key_ + lane;
    page_ = 0;
    if (s_.pages != nullptr && exists && (wanted_ >> lane & 1) != 0) {
      // Turned into an address when the copies begin, by when it has arrived.
      const int index = token_ / static_cast<int>(p_.page_size);
      page_ = s_.pages[index];
      token_ -= index * static_cast<int>(p_.page_size);
    }
  }

  // Bit j: some row sees key j of the tile, by the mask and everything else.
  JAX_ATTN_DEVICE uint32_t SeenThroughMask() const {
    constexpr int kParts = kWave / kTileKeys;
    const int key = key_ + Lane() % kTileKeys;
    bool seen = false;
    for (int r = Lane() / kTileKeys; r < s_.num_rows; r += kParts) {
      const RowInfo& row = s_.rows[r];
      if (key >= row.keys.begin && key < row.keys.end) {
        seen |= static_cast<const uint8_t*>(p_.mask.data)[row.mask + key] != 0;
      }
    }
    uint64_t bits = Ballot(seen);
#pragma unroll
    for (int shift = kWave / 2; shift >= kTileKeys; shift /= 2) bits |= bits >> shift;
    return static_cast<uint32_t>(bits) & kAllKeys;
  }

  // Begins the copies of the tile that was found, and finds the one after it.
  JAX_ATTN_DEVICE void Begin() {
    if (wanted_ != 0) {
      char* stage = shared_ + begun_ % kStages * stage_bytes_;
      held_wanted_ = wanted_;
      row_ = RowOfToken(p_, w_, page_, token_);
      ForEachChunk<true>(stage, k_, v_);
      char* header = stage + kTileKeys * (k_stride_ + v_stride_);
      if constexpr (kExtras) {
        const int lane = FreshOfLane(Lane());
        const bool scales_k = Fresh(s_.k_scale != nullptr);
        const bool scales_v = Fresh(s_.v_scale != nullptr);
        if (scales_k || scales_v) {
          const bool wanted = (wanted_ >> lane % kTileKeys & 1) != 0;
          if (lane < kTileKeys) {
            float* to = reinterpret_cast<float*>(header) + lane;
            if (scales_k) scales_.Begin(0, to, s_.k_scale + row_, wanted);
            if (scales_v) scales_.Begin(1, to + kTileKeys, s_.v_scale + row_, wanted);
          }
        }
      }
      held_key_ = key_;
      if constexpr (!kCopiesThroughRegisters) StoreHeader(header);
      ++begun_;
      key_ += step_;
      Find();
    }
    EndBatch();
  }

  JAX_ATTN_DEVICE void StoreHeader(char* header) const {
    if (FreshOfLane(Lane()) == 0) *reinterpret_cast<int*>(header + 2 * kTileKeys * 4) = held_key_;
  }

  JAX_ATTN_DEVICE void Land(char* stage) {
    ForEachChunk<false>(stage, k_, v_);
    char* header = stage + kTileKeys * (k_stride_ + v_stride_);
    if constexpr (kExtras) {
      if (FreshOfLane(Lane()) < kTileKeys) {
        float* to = reinterpret_cast<float*>(header) + Lane();
        if (Fresh(s_.k_scale != nullptr)) scales_.Land(0, to, nullptr, false);
        if (Fresh(s_.v_scale != nullptr)) scales_.Land(1, to + kTileKeys, nullptr, false);
      }
    }
    StoreHeader(header);
  }

  template <bool kBegin>
  JAX_ATTN_DEVICE void ForEachChunk(char* stage, Chunks& k, Chunks& v) {
    Side<kBegin>(stage, s_.k, static_cast<int>(p_.head_dim) * kSize, k_stride_, k, k_halves_);
    Side<kBegin>(stage + kTileKeys * k_stride_, s_.v, static_cast<int>(p_.v_head_dim) * kSize,
                 v_stride_, v, v_halves_);
  }

  template <bool kBegin, typename Halves>
  JAX_ATTN_DEVICE void Side(char* tile, const char* from, int row_bytes, int stride, Chunks& copies,
                            Halves& halves) {
    const int lane = Lane();
    const int padded = CeilDiv(row_bytes / kSize, 16) * 16 * kSize;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = pass * kRowsAtOnce + lane / kLanesPerRow;
      const bool wanted = (held_wanted_ >> row & 1) != 0;
      const char* source = from;
      if constexpr (kBegin || Chunks::kLandReads || kLandReadsHalves) {
        source += Broadcast(row_, row) * row_bytes;
      }
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const int at = (column * kLanesPerRow + lane % kLanesPerRow) * 16;
        const int i = pass * kColumns + column;
        if (at >= padded) continue;
        char* to = tile + row * stride + at;
        if (kSize > 1 || row_bytes % 16 == 0) {
          // Past the row are zeros: there matrix instructions meet those of the queries.
          const bool inside = at < row_bytes;
          if constexpr (kBegin) {
            copies.Begin(i, to, inside ? source + at : from, wanted && inside);
          } else {
            copies.Land(i, to, inside ? source + at : from, wanted && inside);
          }
        } else if constexpr (kSize == 1) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int start = at + half * 8;
            const bool inside = start < row_bytes;
            const char* const chunk = inside ? source + start : from;
            if constexpr (kBegin) {
              halves.Begin(2 * i + half, to + half * 8, chunk, wanted && inside);
            } else {
              halves.Land(2 * i + half, to + half * 8, chunk, wanted && inside);
            }
          }
        }
      }
    }
  }

  const SplitKvAttentionParams& p_;
  const SplitWork& w_;
  const Segment& s_;
  char* shared_;
  int k_stride_, v_stride_, stage_bytes_, step_;
  int key_;          // of the tile to begin next
  uint32_t wanted_;  // its keys that are read; 0: there is none
  int token_;        // of the lane's key, in its page if there are pages
  int page_;
  int64_t row_;  // of the lane's key in the tile begun last
  int begun_ = 0, at_ = 0;
  uint32_t held_wanted_ = 0;  // of the tile begun last
  int held_key_ = 0;
  Chunks k_, v_;
  Halves k_halves_, v_halves_;
  Copies<4, 2> scales_;
};

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_TILES_H_
