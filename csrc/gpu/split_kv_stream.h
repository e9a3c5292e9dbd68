// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Split-KV attention as a stream: 16-bit keys and values that come through tensor maps, without
// extras. Each wave has a ring of tiles, and begins the copy of a tile as soon as there is room,
// also when that tile belongs to the next entry. So copies never pause, and one block fills a core.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_STREAM_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_STREAM_H_

#include <cstdint>

#include "matrix.h"
#include "split_kv_finish.h"
#include "split_kv_work.h"
#include "tensor_copies.h"

namespace jax_attn::gpu {

#if JAX_ATTN_TENSOR_COPIES

// Fetches a parameter, each wave a part of it: all of it at once, instead of piece by piece when
// they are needed.
template <typename T>
JAX_ATTN_DEVICE void TouchParameters(const T& parameter, int wave) {
  constexpr int kLine = 64, kLines = sizeof(T) / kLine;
  const int line = wave % (kLines > 0 ? kLines : 1);
  const uint32_t word = reinterpret_cast<const uint32_t*>(&parameter)[line * (kLine / 4)];
  asm volatile("" ::"r"(word));
}

// Brings to L2 what a block with lengths asks for first: lengths, and the page ids that it needs if
// all contexts are full. L2 sees what the kernel before may still write.
JAX_ATTN_DEVICE void PrefetchStart(const StreamParams& p, const SplitWork& w, int group, int step) {
  constexpr int kLine = 128 / sizeof(int32_t);
  const int num_batches = w.row_blocks.Divide(w.num_entries);
  if (p.kv_lengths.data != nullptr && Lane() * kLine < num_batches) {
    PrefetchLine(p.kv_lengths.At(p.batch, Lane() * kLine));
  }
  if (p.page_size == 0) return;
  const int64_t place = int64_t{group} * w.num_entries;
  const int entry = static_cast<int>(place / w.num_groups);
  const int64_t rest = place - int64_t{entry} * w.num_groups;
  const int key = static_cast<int>(rest * p.kv_len / w.num_groups) + Lane() * step;
  if (key >= p.kv_len) return;
  PrefetchLine(p.page_table.At(p.batch, w.row_blocks.Divide(entry)) + p.pages.Divide(key));
}

// The tile that a wave is at, in the parts of its block. Tiles begin at multiples of their keys,
// so that none has keys of two pages.
template <int kTileKeys, int kWaves>
class TileWalk {
 public:
  JAX_ATTN_DEVICE TileWalk(const StreamParams& p, const SplitWork& w, int group, int wave)
      : p_(p), w_(w), wave_(wave), parts_(p, w, group) {
    more_ = NextPart();
  }

  static constexpr int kStep = kTileKeys * kWaves;

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

  JAX_ATTN_DEVICE int key() const { return key_; }  // the first of the tile
  JAX_ATTN_DEVICE const KeyRange& keys() const { return keys_; }
  JAX_ATTN_DEVICE const KeyRange& common() const { return common_; }  // that all rows see
  JAX_ATTN_DEVICE const EntryRows& rows() const { return rows_; }
  JAX_ATTN_DEVICE const Context& context() const { return context_; }
  JAX_ATTN_DEVICE int64_t slot() const { return slot_; }
  JAX_ATTN_DEVICE int wave() const { return wave_; }
  JAX_ATTN_DEVICE int num_batches() const { return w_.row_blocks.Divide(w_.num_entries); }
  JAX_ATTN_DEVICE ShareEnd End() const { return parts_.End(); }

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

// Row `row` of an entry in the queries.
JAX_ATTN_DEVICE const uint16_t* QueryRow(const StreamParams& p, const EntryRows& rows, int kv_head,
                                         int row, int dim) {
  return static_cast<const uint16_t*>(p.query) + p.query_stride * rows.batch_index +
         RowIndex(p, kv_head, rows.first_row + row) * dim;
}

// The copies of a wave.
template <int kDim, int kTileKeys, int kWaves, int kStages>
class TileStream {
 public:
  static constexpr int kSideBytes = kTileKeys * kDim * 2;

  JAX_ATTN_DEVICE TileStream(const TensorMap& k, const TensorMap& v, const StreamParams& p,
                             const TileWalk<kTileKeys, kWaves>& walk, int kv_head, char* ring,
                             uint64_t* barriers, bool active)
      : k_(k), v_(v), p_(p), kv_head_(kv_head), ring_(ring), barriers_(barriers), walk_(walk) {
    if (p.page_size != 0 && p.layer != nullptr) {
      first_page_ = min(max(*p.layer, 0), p.num_layers - 1) * p.num_pages;
    }
    active_ = active && walk_.more();
    if (active_) BeginPart();
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) Begin(i);
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
  using Walk = TileWalk<kTileKeys, kWaves>;

  // Begins the copy of the next tile, if there is one, to a stage that nobody reads.
  JAX_ATTN_DEVICE void Begin(int stage) {
    while (active_ && !walk_.InPart()) {
      active_ = walk_.NextPart();
      if (active_) BeginPart();
    }
    if (!active_) return;
    int row = walk_.key(), outer = walk_.rows().batch_index * p_.kv_batch;
    if (p_.page_size != 0) {
      if (tile_ == kWave) {
        pages_ = next_pages_;
        next_pages_ = LoadPages(walk_.key() + kWave * Walk::kStep);
        tile_ = 0;
      }
      // Ids outside the pool are the caller's error; clipping them keeps every read inside it.
      outer = first_page_ + min(max(Broadcast(pages_, tile_), 0), p_.num_pages - 1);
      row = p_.pages.Remainder(row);
      ++tile_;
    }
    if (Lane() == 0) {
      const CopyBarrier barrier(barriers_ + stage);
      const uint32_t to = SharedAddress(ring_) + stage * (2 * kSideBytes);
      barrier.Expect(2 * kSideBytes);
      TensorCopy(to, k_, barrier, row, kv_head_, outer);
      TensorCopy(to + kSideBytes, v_, barrier, row, kv_head_, outer);
    }
    walk_.NextTile();
  }

  // What a wave reads before it can work on the part is asked for before the tiles of the part,
  // since later requests wait behind them.
  JAX_ATTN_DEVICE void BeginPart() {
    if (walk_.wave() == 0) PrefetchQueries();
    if (p_.page_size == 0) return;
    if (walk_.wave() == 0) PrefetchPagesOfNextEntry();
    pages_ = LoadPages(walk_.key());
    next_pages_ = LoadPages(walk_.key() + kWave * Walk::kStep);
    tile_ = 0;
  }

  JAX_ATTN_DEVICE void PrefetchQueries() const {
    constexpr int kLines = kDim * 2 / 128;
    const EntryRows& rows = walk_.rows();
    for (int i = Lane(); i < rows.num_rows * kLines; i += kWave) {
      PrefetchLine(QueryRow(p_, rows, kv_head_, i / kLines, kDim) + i % kLines * 64);
    }
  }

  // The first ones that LoadPages will ask for, if the entry is not the last.
  JAX_ATTN_DEVICE void PrefetchPagesOfNextEntry() const {
    const int64_t next = walk_.rows().batch_index + 1;
    const int key = Lane() * Walk::kStep;
    if (next >= walk_.num_batches() || key >= p_.kv_len) return;
    PrefetchLine(p_.page_table.At(p_.batch, next) + p_.pages.Divide(key));
  }

  // Page ids of as many tiles as there are lanes, one a lane.
  JAX_ATTN_DEVICE int LoadPages(int first_key) const {
    const int key = first_key + Lane() * Walk::kStep;
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
  int stage_ = 0;
  uint32_t parity_ = 0;
  int first_page_ = 0;
  int tile_ = 0;  // in pages_
  int pages_ = 0, next_pages_ = 0;
};

// What a wave does with its tiles.
template <DType kT, int kDim, int kRowCount, int kTileKeys>
class StreamCore {
 public:
  // Begins with the rows of an entry.
  JAX_ATTN_DEVICE StreamCore(const StreamParams& p, const EntryRows& rows, int kv_head) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const int row = n * Fragments::kRows + Lane() / 4;
      const bool exists = row < rows.num_rows;
      const uint32_t* const elements = reinterpret_cast<const uint32_t*>(
          QueryRow(p, rows, kv_head, exists ? row : 0, kDim) + Lane() % 4 * 2);
#pragma unroll
      for (int c = 0; c < kSteps; ++c) {
        query_[c][n].words[0] = exists ? elements[c * 8] : 0;
        query_[c][n].words[1] = exists ? elements[c * 8 + 4] : 0;
      }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        top_[n][slot] = -kInfinity;
        total_[n][slot] = 0;
      }
#pragma unroll
      for (int h = 0; h < kSteps; ++h) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) out_[h][n][i] = 0;
      }
    }
  }

  // `tile`: keys, then values; the walk is at it.
  template <typename Walk>
  JAX_ATTN_DEVICE void Attend(const StreamParams& p, const Walk& walk, char* tile) {
    const int last = walk.key() + kTileKeys;
    const bool whole = walk.key() >= walk.keys().begin && last <= walk.keys().end;
    if (!whole) ClearValues(walk, tile);
    const int lane = Lane();
    // 64 elements of a key are a line of 128 bytes, with piece i of 16 bytes at i ^ key % 8.
    const uint32_t keys = SharedAddress(tile) + lane % 16 * 128 + ((lane / 16 ^ lane % 8) * 16);
    float x[kBlocks][kElements], other[kBlocks][kElements];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) x[n][i] = other[n][i] = 0;
    }
#pragma unroll
    for (int c = 0; c < kSteps; ++c) {
      Fragments::A a;
      LoadMatrices((keys ^ (c % 4 * 32)) + c / 4 * kHalfBytes, a.words);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        Fragments::MultiplyAdd<kT>(a, query_[c][n], c % 2 == 0 ? x[n] : other[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) x[n][i] += other[n][i];
    }
    Fragments::B weights[kBlocks];
    const bool all_seen = walk.key() >= walk.common().begin && last <= walk.common().end;
    if (!all_seen) Hide(p, walk, x);
    Weigh(p.scale * kLog2E, x, weights);
    const uint32_t values = SharedAddress(tile) + kTileKeys * kDim * 2 +
                            (lane % 8 + lane / 16 * 8) * 128 + ((lane / 8 % 2 ^ lane % 8) * 16);
#pragma unroll
    for (int h = 0; h < kSteps; ++h) {
      Fragments::A a;
      LoadMatricesTransposed((values ^ (h % 4 * 32)) + h / 4 * kHalfBytes, a.words);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) Fragments::MultiplyAdd<kT>(a, weights[n], out_[h][n]);
    }
  }

  // Leaves unnormalised outputs, tops and totals in shared memory.
  JAX_ATTN_DEVICE void Finish(float* outputs, float* tops, float* totals) const {
    const int lane = Lane();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const int row = n * Fragments::kRows + Fragments::Row(lane, slot);
        // The same from every lane that has the row.
        tops[row] = top_[n][slot];
        totals[row] = Fragments::SumOverKeys(total_[n][slot]);
      }
#pragma unroll
      for (int h = 0; h < kSteps; ++h) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          const int row = n * Fragments::kRows + Fragments::Row(lane, Fragments::SlotOf(i));
          const int d = h * 16 + Fragments::Element<kT>(lane, i);
          outputs[row * (StreamOutputStride(kDim) / 4) + d] = out_[h][n][i];
        }
      }
    }
  }

 private:
  static constexpr int kBlocks = kRowCount / Fragments::kRows;
  static constexpr int kSteps = kDim / 16;
  static constexpr int kElements = Fragments::kElements;
  static constexpr int kSlots = Fragments::kSlots;
  static constexpr int kHalfBytes = kTileKeys * 128;
  static_assert(kTileKeys == kFragmentKeys && kDim % 64 == 0);

  // Values of keys outside the part, which may be anything, become 0: a weight of 0 would not do.
  template <typename Walk>
  static JAX_ATTN_DEVICE void ClearValues(const Walk& walk, char* tile) {
    constexpr int kLines = kDim / 64;
    for (int i = Lane(); i < kTileKeys * kLines * 8; i += kWave) {
      const int key = walk.key() + i / 8 % kTileKeys;
      if (key < walk.keys().begin || key >= walk.keys().end) {
        reinterpret_cast<uint4*>(tile + kTileKeys * kDim * 2)[i] = {0, 0, 0, 0};
      }
    }
    OrderStoresBeforeCopies();
    WaveFence();
  }

  // Scores of keys that a row does not see become -inf.
  template <typename Walk>
  static JAX_ATTN_DEVICE void Hide(const StreamParams& p, const Walk& walk,
                                   float (&x)[kBlocks][kElements]) {
    const int lane = Lane();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const int row = n * Fragments::kRows + Fragments::Row(lane, slot);
        const int query = QueryOfRow(p, walk.rows().first_row + row);
        const KeyRange seen = VisibleKeys(p, walk.context(), query);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          if (Fragments::SlotOf(i) != slot) continue;
          const int key = walk.key() + Fragments::Key(lane, i);
          const bool visible =
              key >= max(seen.begin, walk.keys().begin) && key < min(seen.end, walk.keys().end);
          if (!visible) x[n][i] = -kInfinity;
        }
      }
    }
  }

  JAX_ATTN_DEVICE void Weigh(float factor, float (&x)[kBlocks][kElements],
                             Fragments::B (&weights)[kBlocks]) {
    float rescale[kBlocks][kSlots];
    bool any_rescale = false;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      float top[kSlots];
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) top[slot] = -kInfinity;
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        x[n][i] *= factor;
        top[Fragments::SlotOf(i)] = Max(top[Fragments::SlotOf(i)], x[n][i]);
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
        x[n][i] = Exp2(x[n][i] - top[Fragments::SlotOf(i)]);
        total_[n][Fragments::SlotOf(i)] += x[n][i];
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

  Fragments::B query_[kSteps][kBlocks];
  float top_[kBlocks][kSlots];
  float total_[kBlocks][kSlots];  // of the lane's own keys
  float out_[kSteps][kBlocks][kElements];
};

// Merges the partial results of the blocks of a cluster, each a part of the rows. Without writing,
// those of other blocks are not touched.
JAX_ATTN_DEVICE void MergeCluster(const StreamParams& p, const SplitWork& w, const EntryRows& rows,
                                  int kv_head, const float* partial, int v_head_dim, int rank,
                                  const BlockThreads& threads) {
  const int columns = v_head_dim / 4;
  const int first = threads.index * kMaxCluster + rank;
  for (int i = first; i < rows.num_rows * columns; i += threads.count * kMaxCluster) {
    const int row = i / columns, column = i % columns;
    RowState state;
#pragma unroll
    for (int block = 0; block < kMaxCluster; ++block) {
      state.Add(
          LoadPartial(InBlock(threads.write ? block : rank, partial), w, v_head_dim, row, column));
    }
    FinishRow(p, rows.batch_index, kv_head, rows.first_row + row, column * 4, state.sum, state.top,
              state.total, 0, threads.write);
  }
}

#endif  // JAX_ATTN_TENSOR_COPIES

#if JAX_ATTN_NVIDIA

// Waves of a block: those that have tiles, and a spare one.
template <int kDim, int kRows>
inline constexpr int kStreamThreads = (StreamShape(kDim, kRows).waves + 1) * kWave;

template <DType kT, int kDim, int kRows>
__global__ void __launch_bounds__(kStreamThreads<kDim, kRows>, 1)
    StreamKernel(JAX_ATTN_PARAMETER TensorMap k, JAX_ATTN_PARAMETER TensorMap v,
                 JAX_ATTN_PARAMETER StreamParams p, JAX_ATTN_PARAMETER SplitWork w) {
#if JAX_ATTN_TENSOR_COPIES
  constexpr KernelShape kShape = StreamShape(kDim, kRows);
  constexpr int kWaves = kShape.waves, kStages = kShape.stages, kTileKeys = kShape.tile_keys;
  extern __shared__ __align__(1024) char rings[];
  const int wave = Broadcast(WaveIndex(), 0);  // the same in all lanes, as the compiler can see
  TouchParameters(p, wave);
  TouchParameters(w, wave);
  // Keys of the call before have thrown instructions and parameters out of the caches, and each is
  // a wait. The spare wave goes through the end of an entry at once, so that they are there when
  // the others come to it; later it only keeps step.
  const bool is_spare = wave == kWaves;
  float* const outputs = reinterpret_cast<float*>(rings + StreamRingBytes(kShape));
  float* const tops = outputs + StreamOutputBytes(kShape) / 4;
  float* const totals = tops + kWaves * kRows;
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(totals + kWaves * kRows) + wave * kStages;
  if (Lane() == 0 && !is_spare) {
    PrefetchMap(k);
    PrefetchMap(v);
#pragma unroll
    for (int i = 0; i < kStages; ++i) CopyBarrier(barriers + i).Initialize();
    CopyBarrier::Publish();
  }
  WaveFence();
  // Kernels with many rows have no registers left for clusters.
  const int cluster = kRows == kMatrixRows[0] ? w.cluster : 1;
  const int rank = cluster == 1 ? 0 : RankInCluster();
  const int block = cluster == 1 ? blockIdx.x : blockIdx.x / kMaxCluster;
  const int kv_head = w.kv_heads.Remainder(block);
  const int group = w.kv_heads.Divide(block) * cluster + rank;
  // The kernel before may still run, and write what this one reads: all but its parameters.
  if (!w.uniform) {
    if (is_spare) PrefetchStart(p, w, group, kWaves * kTileKeys);
    WaitForPreviousKernel();
  }
  TileWalk<kTileKeys, kWaves> walk(p, w, group, wave);
  WaitForPreviousKernel();
  // Before any copy: it waits for those that are under way.
  if (w.merged || w.allows_next) AllowNextKernel();
  TileStream<kDim, kTileKeys, kWaves, kStages> tiles(
      k, v, p, walk, kv_head, rings + wave * kStages * StreamStageBytes(kShape), barriers,
      !is_spare);
  bool rehearses = is_spare;
  for (bool more = walk.more(); more;) {
    StreamCore<kT, kDim, kRows, kTileKeys> core(p, walk.rows(), kv_head);
    if (!is_spare) {
      for (; walk.InPart(); walk.NextTile()) {
        core.Attend(p, walk, tiles.Wait());
        tiles.Release();
      }
    }
    if (!rehearses) __syncthreads();  // what the waves exchanged before has been read
    constexpr int kRowStride = StreamOutputStride(kDim) / 4;
    const int at = is_spare ? 0 : wave * kRows;
    if (!is_spare || rehearses) core.Finish(outputs + at * kRowStride, tops + at, totals + at);
    if (!rehearses) __syncthreads();
    if (!is_spare || rehearses) {
      const WaveResults results{outputs, kRows * kRowStride, kRowStride, tops, totals};
      const BlockThreads threads{is_spare ? Lane() : static_cast<int>(threadIdx.x), kWaves * kWave,
                                 !rehearses};
      // Blocks of a cluster leave their partial results where their tiles were.
      float* const partial = cluster == 1 ? nullptr : reinterpret_cast<float*>(rings);
      MergeWaves<kWaves, kRows>(p, w, walk.rows(), kv_head, walk.slot(), partial, results, kDim,
                                1.0f, 0, threads);
    }
    if (cluster > 1) {
      if (!rehearses) SyncCluster();
      if (!is_spare || rehearses) {
        MergeCluster(
            p, w, walk.rows(), kv_head, reinterpret_cast<const float*>(rings), kDim, rank,
            {is_spare ? Lane() : static_cast<int>(threadIdx.x), kWaves * kWave, !rehearses});
      }
      if (!rehearses) SyncCluster();  // a block stays while others read its shared memory
    }
    if (!rehearses) more = walk.NextPart();
    rehearses = false;
  }
  if (w.ends != nullptr && kv_head == 0 && threadIdx.x == 0) w.ends[group] = walk.End();
#endif
}

#endif  // JAX_ATTN_NVIDIA

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_STREAM_H_
