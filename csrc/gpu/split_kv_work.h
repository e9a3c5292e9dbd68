// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Which keys a block works on, found on the device from the lengths that are there.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_WORK_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_WORK_H_

#include <cstdint>

#include "split_kv_kernel.h"
#include "wave.h"

namespace jax_attn::gpu {

struct KeyRange {
  int begin, end;

  constexpr int size() const { return end > begin ? end - begin : 0; }
};

// By a division of 32 bits, which takes a third of the time.
JAX_ATTN_DEVICE int GroupSize(const SplitKvAttentionParams& p) {
  return static_cast<int>(p.num_q_heads) / static_cast<int>(p.num_kv_heads);
}

JAX_ATTN_DEVICE int ContextLength(const SplitKvAttentionParams& p, int64_t batch_index) {
  const int longest = static_cast<int>(p.kv_len);
  if (p.kv_lengths.data == nullptr) return longest;
  return min(max(*p.kv_lengths.At(p.batch, batch_index), 0), longest);
}

JAX_ATTN_DEVICE int QueryPosition(const SplitKvAttentionParams& p, int length, int query) {
  return p.causal == Causal::kTopLeft ? query : length - static_cast<int>(p.query_len) + query;
}

// Keys that a query may see by length, causality and window.
JAX_ATTN_DEVICE KeyRange VisibleKeys(const SplitKvAttentionParams& p, int length, int query) {
  const int position = QueryPosition(p, length, query);
  KeyRange keys{0, length};
  if (p.causal != Causal::kNone) keys.end = min(keys.end, position + 1);
  if (p.sliding_window != 0) {
    keys.begin = max(keys.begin, position - static_cast<int>(p.sliding_window) + 1);
  }
  return keys;
}

struct Entry {
  int64_t batch_index;
  int first_row, num_rows;
  int length;
  KeyRange keys;  // that some row sees

  JAX_ATTN_DEVICE Entry(const SplitKvAttentionParams& p, const SplitWork& w, int index)
      : batch_index(index / w.num_row_blocks) {
    const int group = GroupSize(p);
    const int all_rows = static_cast<int>(p.query_len) * group;
    first_row = index % w.num_row_blocks * w.rows_per_block;
    num_rows = min(w.rows_per_block, all_rows - first_row);
    length = ContextLength(p, batch_index);
    // Both ends of what a query sees move forward with the query.
    keys.begin = VisibleKeys(p, length, first_row / group).begin;
    keys.end = VisibleKeys(p, length, (first_row + num_rows - 1) / group).end;
  }

  // Units of keys; an entry without keys has one, since its rows must be written too.
  JAX_ATTN_DEVICE int units(const SplitWork& w) const {
    return max(1, CeilDiv(keys.size(), w.unit_keys));
  }
};

// The splits of an entry that is cut by itself.
struct FixedSplits {
  int first_end;  // of the first split
  int size;
  int count;

  JAX_ATTN_DEVICE FixedSplits(const SplitWork& w, const KeyRange& keys) {
    if (w.cut == Cut::kSize) {
      // At multiples of the size, wherever the visible keys begin.
      size = static_cast<int>(w.split_size);
      first_end = (keys.begin / size + 1) * size;
    } else {
      size = max(1, CeilDiv(CeilDiv(keys.size(), w.max_splits), 16)) * 16;
      first_end = keys.begin + size;
    }
    count = keys.end <= first_end ? 1 : 1 + CeilDiv(keys.end - first_end, size);
  }

  JAX_ATTN_DEVICE KeyRange Split(const KeyRange& keys, int i) const {
    return {i == 0 ? keys.begin : first_end + (i - 1) * size, min(keys.end, first_end + i * size)};
  }
};

// Where a share begins.
struct Place {
  int share = 0;  // units
  int entry = 0;
  int offset = 0;  // units of the entry that belong to groups before
  int units = 0;   // of this share
};

// Finds the share of a group; every lane of the wave calls it. The first group writes down where
// entries start if `writes`. Without units there is none.
JAX_ATTN_DEVICE Place FindShare(const SplitKvAttentionParams& p, const SplitWork& w, int group,
                                bool writes) {
  Place place;
  if (w.uniform) {
    const int units = Entry(p, w, 0).units(w);
    const int total = units * w.num_entries;
    place.share = CeilDiv(total, w.num_groups);
    const int start = group * place.share;
    place.entry = start / units;
    place.offset = start % units;
    place.units = min(place.share, total - start);
    return place;
  }
  const int lane = Lane();
  // Lengths of several rounds are asked for at once.
  constexpr int kAtOnce = 4;
  int64_t total = 0;
  // First all units are counted, then those before the share.
  for (int round = 0; round < 2; ++round) {
    const int64_t start = static_cast<int64_t>(group) * place.share;
    int64_t base = 0;
#pragma unroll 1
    for (int several = 0; several < w.num_entries; several += kAtOnce * kWave) {
      int units[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int index = several + i * kWave + lane;
        units[i] = index < w.num_entries ? Entry(p, w, index).units(w) : 0;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int first = several + i * kWave;
        if (first >= w.num_entries) break;
        int sum = units[i];
#pragma unroll
        for (int d = 1; d < kWave; d *= 2) {
          const int before = ShuffleUp(sum, d);
          if (lane >= d) sum += before;
        }
        if (round == 0) {
          if (writes && first + lane < w.num_entries) {
            w.starts[first + lane] = static_cast<int>(base) + sum - units[i];
          }
        } else if (const uint64_t here = Ballot(base + sum > start); here != 0) {
          const int found = __ffsll(static_cast<unsigned long long>(here)) - 1;
          place.entry = first + found;
          place.offset = static_cast<int>(start - base) - Broadcast(sum - units[i], found);
          return place;
        }
        base += Broadcast(sum, kWave - 1);
      }
    }
    total = base;
    if (writes && lane == 0) w.starts[w.num_entries] = static_cast<int>(total);
    place.share = CeilDiv(total, w.num_groups);
    const int64_t rest = total - static_cast<int64_t>(group) * place.share;
    place.units = static_cast<int>(min(static_cast<int64_t>(place.share), rest));
    if (place.units <= 0) break;
  }
  return place;
}

// ---- Addresses

// Number of the row of a token in the sequence or the pool, before that of the head is added. Keys,
// values and scales of tokens are addressed by it alike.
JAX_ATTN_DEVICE int64_t RowOfToken(const SplitKvAttentionParams& p, const SplitWork& w, int page,
                                   int token) {
  if (p.page_size == 0) return token * w.token_rows;
  // Ids outside the pool are the caller's error; clipping them keeps every read inside it.
  const int64_t id = min(max(static_cast<int64_t>(page), int64_t{0}), p.num_pages - 1);
  return id * w.page_rows + token * w.token_rows;
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_WORK_H_
