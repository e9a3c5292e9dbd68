// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The tiles of a stream kernel: which a wave has, and how they come to its ring.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_STREAM_TILES_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_STREAM_TILES_H_

#include <cstdint>

#include "split_kv_finish.h"
#include "split_kv_work.h"
#include "tensor_copies.h"

#if JAX_ATTN_TENSOR_COPIES

namespace jax_attn::gpu {

// The tile that a wave is at, in the parts of its block. Tiles begin at multiples of their keys,
// so that none has keys of two pages.
template <int kTile, int kWaves>
class TileWalk {
 public:
  static constexpr int kTileKeys = kTile;
  static constexpr int kStep = kTileKeys * kWaves;
  static constexpr bool kHasOneEntry = false;

  JAX_ATTN_DEVICE TileWalk(const StreamParams& p, const SplitWork& w, int group, int wave)
      : p_(p), w_(w), wave_(wave), parts_(p, w, group) {
    more_ = NextPart();
  }

  // Whether there is a part.
  JAX_ATTN_DEVICE bool more() const { return more_; }
  // Whether the wave has another tile in the part.
  JAX_ATTN_DEVICE bool InPart() const { return key_ < keys_.end; }
  JAX_ATTN_DEVICE void NextTile() { key_ += kStep; }

  JAX_ATTN_DEVICE bool NextPart() {
    if (!parts_.More()) return false;
    const Entry entry(p_, w_, parts_.entry());
    if (!parts_.Next(w_, entry, keys_, slot_)) return false;
    rows_ = entry;
    context_ = entry.context;
    common_ = {max(entry.common.begin, keys_.begin), min(entry.common.end, keys_.end)};
    key_ = keys_.begin / kTileKeys * kTileKeys + wave_ * kTileKeys;
    return true;
  }

  static constexpr JAX_ATTN_DEVICE int step() { return kStep; }  // keys from tile to tile
  JAX_ATTN_DEVICE int key() const { return key_; }               // the first of the tile
  JAX_ATTN_DEVICE const KeyRange& keys() const { return keys_; }
  JAX_ATTN_DEVICE const KeyRange& common() const { return common_; }  // that all rows see
  JAX_ATTN_DEVICE const EntryRows& rows() const { return rows_; }
  JAX_ATTN_DEVICE const Context& context() const { return context_; }
  JAX_ATTN_DEVICE int64_t slot() const { return slot_; }
  JAX_ATTN_DEVICE int wave() const { return wave_; }
  JAX_ATTN_DEVICE int num_batches() const { return w_.row_blocks.Divide(w_.num_entries); }

 private:
  const StreamParams& p_;
  const SplitWork& w_;
  int wave_;
  Parts parts_;
  bool more_;
  EntryRows rows_;
  Context context_;
  KeyRange keys_, common_;
  int64_t slot_;
  int key_;
};

// The tiles of a wave in a cluster kernel, whose cluster has one entry. Its blocks take tiles in
// turn, so that none has more than one tile more than another.
template <int kTile, int kWaves>
class ClusterWalk {
 public:
  static constexpr int kTileKeys = kTile;
  static constexpr bool kHasOneEntry = true;

  JAX_ATTN_DEVICE ClusterWalk(const StreamParams& p, const SplitWork& w, int index, int rank,
                              int wave)
      : wave_(wave) {
    const Entry entry(p, w, index);
    rows_ = entry;
    context_ = entry.context;
    const int first = entry.keys.begin / kTileKeys;
    const int tiles = entry.keys.size() == 0 ? 0 : CeilDiv(entry.keys.end, kTileKeys) - first;
    num_parts_ = min(tiles, w.splits.divisor());
    keys_ = tiles == 0 ? KeyRange{0, 0} : entry.keys;
    common_ = entry.common;
    key_ = (first + wave * w.splits.divisor() + rank) * kTileKeys;
    step_ = kTileKeys * kWaves * w.splits.divisor();
  }

  JAX_ATTN_DEVICE bool more() const { return true; }
  JAX_ATTN_DEVICE bool InPart() const { return key_ < keys_.end; }
  JAX_ATTN_DEVICE void NextTile() { key_ += step_; }
  JAX_ATTN_DEVICE bool NextPart() { return false; }

  JAX_ATTN_DEVICE int step() const { return step_; }
  JAX_ATTN_DEVICE int key() const { return key_; }  // the first of the tile
  JAX_ATTN_DEVICE const KeyRange& keys() const { return keys_; }
  JAX_ATTN_DEVICE const KeyRange& common() const { return common_; }  // that all rows see
  JAX_ATTN_DEVICE const EntryRows& rows() const { return rows_; }
  JAX_ATTN_DEVICE const Context& context() const { return context_; }
  JAX_ATTN_DEVICE int wave() const { return wave_; }
  // Blocks of the cluster that have tiles: the first ones.
  JAX_ATTN_DEVICE int num_parts() const { return num_parts_; }

 private:
  int wave_;
  EntryRows rows_;
  Context context_;
  KeyRange keys_, common_;
  int num_parts_;
  int step_;
  int key_;
};

// Row `row` of an entry in the queries.
JAX_ATTN_DEVICE const uint16_t* QueryRow(const StreamParams& p, const EntryRows& rows, int kv_head,
                                         int row, int dim) {
  return static_cast<const uint16_t*>(p.query) + p.query_stride * rows.batch_index +
         RowIndex(p, kv_head, rows.first_row + row) * dim;
}

// Calls visit(line) for lines of memory that have the queries of an entry, a lane for each.
template <int kDim, typename Visit>
JAX_ATTN_DEVICE void ForQueryLines(const StreamParams& p, const EntryRows& rows, int kv_head,
                                   const Visit& visit) {
  constexpr int kLines = kDim * 2 / 128;
#pragma unroll 1
  for (int i = Lane(); i < rows.num_rows * kLines; i += kWave) {
    visit(QueryRow(p, rows, kv_head, i / kLines, kDim) + i % kLines * 64);
  }
}

// Brings the queries of an entry to L2.
template <int kDim>
JAX_ATTN_DEVICE void PrefetchQueries(const StreamParams& p, const EntryRows& rows, int kv_head) {
  ForQueryLines<kDim>(p, rows, kv_head, [](const uint16_t* line) { PrefetchLine(line); });
}

// The copies of a wave. The queries of the first part are there or on their way.
template <typename Walk, int kDim, int kStages>
class TileStream {
 public:
  static constexpr int kTileKeys = Walk::kTileKeys;
  static constexpr int kSideBytes = kStreamRowBytes * kDim;

  JAX_ATTN_DEVICE TileStream(const TensorMap& k, const TensorMap& v, const StreamParams& p,
                             const Walk& walk, int kv_head, char* ring, uint64_t* barriers,
                             bool active)
      : k_(k), v_(v), p_(p), kv_head_(kv_head), ring_(ring), barriers_(barriers), walk_(walk) {
    if (p.page_size != 0 && p.layer != nullptr) {
      first_page_ = min(max(*p.layer, 0), p.num_layers - 1) * p.num_pages;
    }
    in_parts_ = StreamBoxKeys(kTileKeys, kDim, p.page_size) < kTileKeys;
    active_ = active && walk_.more();
    if (active_) BeginPages();
    int stage = 0;
    // Those of the first part on their own: the code of all that may come between tiles is long,
    // and each line of it a wait.
#pragma unroll 1
    for (; stage < kStages && active_ && walk_.InPart(); ++stage) {
      BeginTile(stage);
      walk_.NextTile();
    }
    if constexpr (Walk::kHasOneEntry) return;
#pragma unroll 1
    for (; stage < kStages; ++stage) Begin(stage);
  }

  // The next tile, once it is there.
  JAX_ATTN_DEVICE char* Wait() const {
    CopyBarrier(barriers_ + stage_).Wait(parity_);
    return ring_ + stage_ * (2 * kSideBytes);
  }

  // Gives up the tile, so that another can take its place.
  JAX_ATTN_DEVICE void Release() {
    WaveFence();  // all lanes have read it
    Begin(stage_);
    if (++stage_ == kStages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  // Of a tile; each may come from a page of its own.
  static constexpr int kParts = kTileKeys / kStreamMinKeys;
  static_assert(kParts == 1 || kParts == 2);
  static constexpr int kPagedTiles = kWave / kParts;  // that a wave has page ids of

  // Begins the copy of the next tile, if there is one, to a stage that nobody reads.
  JAX_ATTN_DEVICE void Begin(int stage) {
    for (; active_; active_ = NextPart()) {
      if (!walk_.InPart()) continue;
      BeginTile(stage);
      walk_.NextTile();
      return;
    }
  }

  JAX_ATTN_DEVICE bool NextPart() {
    if (!walk_.NextPart()) return false;
    // What a wave reads before it can work on the part is asked for before the tiles of the part,
    // since later requests wait behind them.
    if (walk_.wave() == 0) PrefetchQueries<kDim>(p_, walk_.rows(), kv_head_);
    BeginPages();
    return true;
  }

  JAX_ATTN_DEVICE void BeginTile(int stage) {
    int row = walk_.key(), outer = walk_.rows().batch_index * p_.kv_batch;
    int second_row = row + kStreamMinKeys, second_outer = outer;
    if (p_.page_size != 0) {
      if (tile_ == kPagedTiles) {
        pages_ = next_pages_;
        next_pages_ = LoadPages(walk_.key() + kPagedTiles * walk_.step());
        tile_ = 0;
      }
      outer = PageAt(tile_ * kParts);
      row = p_.pages.Remainder(row);
      if constexpr (kParts > 1) {
        second_outer = PageAt(tile_ * kParts + 1);
        second_row = p_.pages.Remainder(second_row);
      }
      ++tile_;
    }
    if (Lane() == 0) {
      const CopyBarrier barrier(barriers_ + stage);
      const uint32_t to = SharedAddress(ring_) + stage * (2 * kSideBytes);
      barrier.Expect(2 * kSideBytes);
      TensorCopy(to, k_, barrier, row, kv_head_, outer);
      TensorCopy(to + kSideBytes, v_, barrier, row, kv_head_, outer);
      if constexpr (kParts > 1) {
        if (in_parts_) {
          const uint32_t second = to + kSideBytes / kParts;
          TensorCopy(second, k_, barrier, second_row, kv_head_, second_outer);
          TensorCopy(second + kSideBytes, v_, barrier, second_row, kv_head_, second_outer);
        }
      }
    }
  }

  // Page `i` of those that were loaded.
  JAX_ATTN_DEVICE int PageAt(int i) const {
    // Ids outside the pool are the caller's error; clipping them keeps every read inside it.
    return first_page_ + min(max(Broadcast(pages_, i), 0), p_.num_pages - 1);
  }

  JAX_ATTN_DEVICE void BeginPages() {
    if (p_.page_size == 0) return;
    if constexpr (!Walk::kHasOneEntry) {
      if (walk_.wave() == 0) PrefetchPagesOfNextEntry();
    }
    pages_ = LoadPages(walk_.key());
    next_pages_ = LoadPages(walk_.key() + kPagedTiles * walk_.step());
    tile_ = 0;
  }

  // The first ones that LoadPages will ask for, if the entry is not the last.
  JAX_ATTN_DEVICE void PrefetchPagesOfNextEntry() const {
    const int64_t next = walk_.rows().batch_index + 1;
    const int key = Lane() * Walk::kStep;
    if (next >= walk_.num_batches() || key >= p_.kv_len) return;
    PrefetchLine(p_.page_table.At(p_.batch, next) + p_.pages.Divide(key));
  }

  // Page ids of kPagedTiles tiles, a lane for each part of one.
  JAX_ATTN_DEVICE int LoadPages(int first_key) const {
    const int part = Lane() % kParts * kStreamMinKeys;
    const int key = first_key + Lane() / kParts * walk_.step() + part;
    if (key >= walk_.keys().end) return 0;
    return p_.page_table.At(p_.batch, walk_.rows().batch_index)[p_.pages.Divide(key)];
  }

  const TensorMap& k_;
  const TensorMap& v_;
  const StreamParams& p_;
  int kv_head_;
  char* ring_;
  uint64_t* barriers_;
  Walk walk_;
  bool active_;
  bool in_parts_;
  int stage_ = 0;
  uint32_t parity_ = 0;
  int first_page_ = 0;
  int tile_ = 0;  // in pages_
  int pages_ = 0, next_pages_ = 0;
};

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_TENSOR_COPIES

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_STREAM_TILES_H_
