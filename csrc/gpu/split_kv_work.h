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

// `Params` is SplitKvAttentionParams or StreamParams.

// By a division of 32 bits, which takes a third of the time.
JAX_ATTN_DEVICE int GroupSize(const SplitKvAttentionParams& p) {
  return static_cast<int>(p.num_q_heads) / static_cast<int>(p.num_kv_heads);
}

JAX_ATTN_DEVICE int GroupSize(const StreamParams& p) { return p.group.divisor(); }

// The query of a row of a kv head. Most problems have one.
JAX_ATTN_DEVICE int QueryOfRow(const SplitKvAttentionParams& p, int row) {
  return p.query_len == 1 ? 0 : row / GroupSize(p);
}
JAX_ATTN_DEVICE int QueryOfRow(const StreamParams& p, int row) { return p.group.Divide(row); }

// The keys that a sequence has, and the position of its first query among them, or outside.
struct Context {
  int length;
  int first_query;
};

template <typename Params>
JAX_ATTN_DEVICE int LengthOf(const Params& p, int64_t batch_index) {
  const int all = static_cast<int>(p.kv_len);
  if (p.kv_lengths.data == nullptr) return all;
  return min(max(*p.kv_lengths.At(p.batch, batch_index), 0), all);
}

template <typename Params>
JAX_ATTN_DEVICE Context ContextOf(const Params& p, const SplitWork& w, int64_t batch_index) {
  const int length = LengthOf(p, batch_index);
  Context context{length, length - static_cast<int>(p.query_len)};
  if (w.sees_all) return context;
  if (p.query_offset.data != nullptr) {
    // So far outside that no sum with it leaves 32 bits.
    constexpr int kFar = 1 << 30;
    context.first_query = min(max(*p.query_offset.At(p.batch, batch_index), -kFar), kFar);
  } else if (p.causal == Causal::kTopLeft) {
    context.first_query = 0;
  }
  return context;
}

// Keys that a query may see by length, causality and window.
template <typename Params>
JAX_ATTN_DEVICE KeyRange VisibleKeys(const Params& p, const Context& context, int query) {
  const int position = context.first_query + query;
  KeyRange keys{0, context.length};
  if (p.causal != Causal::kNone) keys.end = min(keys.end, position + 1);
  if (p.sliding_window != 0) {
    keys.begin = max(keys.begin, position - static_cast<int>(p.sliding_window) + 1);
  }
  return keys;
}

// The rows of an entry.
struct EntryRows {
  int64_t batch_index;
  int first_row, num_rows;

  EntryRows() = default;
  template <typename Params>
  JAX_ATTN_DEVICE EntryRows(const Params&, const SplitWork& w, int index)
      : batch_index(w.row_blocks.Divide(index)),
        first_row((index - static_cast<int>(batch_index) * w.num_row_blocks) * w.rows_per_block),
        num_rows(min(w.rows_per_block, w.num_rows - first_row)) {}
};

// Units of so many keys; an entry without keys has one, since its rows must be written too.
JAX_ATTN_DEVICE int UnitsOf(const SplitWork& w, int num_keys) {
  return max(1, w.unit.Divide(num_keys + w.unit_keys - 1));
}

// Rows and the keys that they see.
struct Entry : EntryRows {
  Context context;
  KeyRange keys;    // that some row sees
  KeyRange common;  // that all rows see, but for the mask

  template <typename Params>
  JAX_ATTN_DEVICE Entry(const Params& p, const SplitWork& w, int index)
      : EntryRows(p, w, index), context(ContextOf(p, w, batch_index)) {
    keys = common = {0, context.length};
    if (w.sees_all) return;  // the rest would be half of what a block does before its first copy
    // Both ends of what a query sees move forward with the query.
    const KeyRange first = VisibleKeys(p, context, QueryOfRow(p, first_row));
    const KeyRange last = VisibleKeys(p, context, QueryOfRow(p, first_row + num_rows - 1));
    keys = {first.begin, last.end};
    common = {last.begin, first.end};
  }

  JAX_ATTN_DEVICE int units(const SplitWork& w) const { return UnitsOf(w, keys.size()); }
};

template <typename Params>
JAX_ATTN_DEVICE int UnitsOfEntry(const Params& p, const SplitWork& w, int index) {
  if (!w.sees_all) return Entry(p, w, index).units(w);
  return UnitsOf(w, LengthOf(p, w.row_blocks.Divide(index)));
}

// The splits of an entry that is cut by itself.
struct FixedSplits {
  int first_end;  // of the first split
  int size;
  KeyRange keys;  // of the entry

  JAX_ATTN_DEVICE FixedSplits(const SplitWork& w, const KeyRange& keys) : keys(keys) {
    if (w.cut == Cut::kSize) {
      // At multiples of the size, wherever the visible keys begin.
      size = w.split.divisor();
      first_end = (w.split.Divide(keys.begin) + 1) * size;
    } else {
      size = max(1, CeilDiv(w.splits.Divide(keys.size() + w.max_splits - 1), 16)) * 16;
      first_end = keys.begin + size;
    }
  }

  JAX_ATTN_DEVICE int count() const {
    return keys.end <= first_end ? 1 : 1 + CeilDiv(keys.end - first_end, size);
  }
  JAX_ATTN_DEVICE KeyRange Split(int i) const {
    return {i == 0 ? keys.begin : first_end + (i - 1) * size, min(keys.end, first_end + i * size)};
  }
};

JAX_ATTN_DEVICE int SumOfLanesBefore(int x) {
  int sum = x;
#pragma unroll
  for (int d = 1; d < kWave; d *= 2) {
    const int before = ShuffleUp(sum, d);
    if (Lane() >= d) sum += before;
  }
  return sum - x;
}

JAX_ATTN_DEVICE int SumOfLanes(int x) {
#pragma unroll
  for (int d = 1; d < kWave; d *= 2) x += ShuffleXor(x, d);
  return x;
}

// The first lane that says so; kWave if none does.
JAX_ATTN_DEVICE int FirstLane(bool x) {
  const uint64_t lanes = Ballot(x);
  return lanes == 0 ? kWave : __ffsll(static_cast<unsigned long long>(lanes)) - 1;
}

// Where a share begins.
struct Place {
  Shares shares;
  int start;  // units of all entries that belong to groups before
  int units;  // of this share
  int entry = 0;
  int offset = 0;  // units of the entry that belong to groups before

  // That of a group, where entries have `total` units. The entry is still to be found.
  JAX_ATTN_DEVICE Place(const Shares& shares, int group, int total)
      : shares(shares),
        start(static_cast<int>(min(shares.Begin(group), static_cast<uint32_t>(total)))),
        units(static_cast<int>(min(shares.Begin(group + 1), static_cast<uint32_t>(total))) -
              start) {}
};

// Finds the share of a group; every lane of the wave calls it. Without units there is none.
template <typename Params>
JAX_ATTN_DEVICE Place FindShare(const Params& p, const SplitWork& w, int group) {
  if (w.uniform) {
    Place place(w.shares, group, w.units.divisor() * w.num_entries);
    place.entry = w.units.Divide(place.start);
    place.offset = place.start - place.entry * w.units.divisor();
    return place;
  }
  const auto count = [&](int i, int end) { return i < end ? UnitsOfEntry(p, w, i) : 0; };
  // Each lane counts entries that follow each other.
  const int lane = Lane(), per_lane = CeilDiv(w.num_entries, kWave), first = lane * per_lane;
  int own = 0;
  if (w.sees_all) {
    // Without branches, so that lengths are asked for together.
#pragma unroll 4
    for (int i = first; i < first + per_lane; ++i) {
      const int index = w.row_blocks.Divide(min(i, w.num_entries - 1));
      const int units = UnitsOf(w, LengthOf(p, index));
      own += i < w.num_entries ? units : 0;
    }
  } else {
#pragma unroll 1
    for (int i = first; i < first + per_lane; ++i) own += count(i, w.num_entries);
  }
  int sum = SumOfLanesBefore(own);
  const int total = Broadcast(sum + own, kWave - 1);
  Place place(w.SharesOf(total), group, total);
  if (place.units <= 0) return place;
  const int start = place.start;
  // The share begins in the entries of this lane, which all lanes look through.
  int found = FirstLane(sum + own > start), base = Broadcast(sum, found);
  place.entry = found * per_lane;
  if (per_lane > 1) {
    const int end = min(place.entry + per_lane, w.num_entries);
    for (;; place.entry += kWave) {
      own = count(place.entry + lane, end);
      sum = base + SumOfLanesBefore(own);
      found = FirstLane(sum + own > start);
      if (found < kWave) break;
      base = Broadcast(sum + own, kWave - 1);
    }
    place.entry += found;
    base = Broadcast(sum, found);
  }
  place.offset = start - base;
  return place;
}

// The parts of entries that a group works on, one after the other.
class Parts {
 public:
  template <typename Params>
  JAX_ATTN_DEVICE Parts(const Params& p, const SplitWork& w, int group) : group_(group) {
    if (w.cut == Cut::kShares) {
      const Place place = FindShare(p, w, group);
      entry_ = Uniform(place.entry);
      offset_ = Uniform(place.offset);
      units_ = Uniform(place.units);
    } else {
      entry_ = w.splits.Divide(group);
      offset_ = 0;
      units_ = 1;
    }
  }

  JAX_ATTN_DEVICE bool More() const { return units_ > 0; }
  JAX_ATTN_DEVICE int entry() const { return entry_; }
  JAX_ATTN_DEVICE int group() const { return group_; }

  // Goes on to the next part, of `entry`: its keys, and the slot of its partial result, which is
  // negative if these are all keys of the entry. False if the entry has no such part.
  JAX_ATTN_DEVICE bool Next(const SplitWork& w, const Entry& entry, KeyRange& keys, int64_t& slot) {
    if (w.cut != Cut::kShares) {
      const FixedSplits splits(w, entry.keys);
      const int split = w.splits.Remainder(group_);
      keys = splits.Split(split);
      slot = entry.keys.end <= splits.first_end ? -1 : group_;
      units_ = 0;
      return split == 0 || keys.begin < keys.end;
    }
    const int units = entry.units(w), taken = min(units - offset_, units_);
    const int begin = entry.keys.begin + offset_ * w.unit_keys;
    keys = {begin, min(entry.keys.end, begin + taken * w.unit_keys)};
    slot = taken == units ? -1 : int64_t{2} * group_ + later_;
    later_ = 1;
    units_ -= taken;
    offset_ = 0;
    ++entry_;
    return true;
  }

  // While a part is worked on, this waits in registers of lanes, of which AMD GPUs have more.
  JAX_ATTN_DEVICE void Rest() {
    for (int* x : {&group_, &entry_, &offset_, &units_, &later_}) *x = FreshOfLane(*x);
  }
  JAX_ATTN_DEVICE void Resume() {
    for (int* x : {&group_, &entry_, &offset_, &units_, &later_}) *x = Uniform(*x);
  }

 private:
  int group_;
  int entry_;
  int offset_;     // units of the entry that belong to groups before
  int units_;      // that are left of the share
  int later_ = 0;  // 1 after the first part
};

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
