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
JAX_ATTN_DEVICE Context ContextOf(const Params& p, int64_t batch_index) {
  Context context{static_cast<int>(p.kv_len), 0};
  if (p.kv_lengths.data != nullptr) {
    context.length = min(max(*p.kv_lengths.At(p.batch, batch_index), 0), context.length);
  }
  if (p.query_offset.data != nullptr) {
    // So far outside that no sum with it leaves 32 bits.
    constexpr int kFar = 1 << 30;
    context.first_query = min(max(*p.query_offset.At(p.batch, batch_index), -kFar), kFar);
  } else if (p.causal != Causal::kTopLeft) {
    context.first_query = context.length - static_cast<int>(p.query_len);
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

struct Entry : EntryRows {
  Context context;
  KeyRange keys;    // that some row sees
  KeyRange common;  // that all rows see, but for the mask

  template <typename Params>
  JAX_ATTN_DEVICE Entry(const Params& p, const SplitWork& w, int index)
      : EntryRows(p, w, index), context(ContextOf(p, batch_index)) {
    // Both ends of what a query sees move forward with the query.
    const KeyRange first = VisibleKeys(p, context, QueryOfRow(p, first_row));
    const KeyRange last = VisibleKeys(p, context, QueryOfRow(p, first_row + num_rows - 1));
    keys = {first.begin, last.end};
    common = {last.begin, first.end};
  }

  // Units of keys; an entry without keys has one, since its rows must be written too.
  JAX_ATTN_DEVICE int units(const SplitWork& w) const {
    return max(1, w.unit.Divide(keys.size() + w.unit_keys - 1));
  }
};

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

// The first lane that says so; kWave if none does.
JAX_ATTN_DEVICE int FirstLane(bool x) {
  const uint64_t lanes = Ballot(x);
  return lanes == 0 ? kWave : __ffsll(static_cast<unsigned long long>(lanes)) - 1;
}

// Where a share begins.
struct Place {
  int share = 0;  // units
  int entry = 0;
  int offset = 0;  // units of the entry that belong to groups before
  int units = 0;   // of this share
};

// Finds the share of a group; every lane of the wave calls it. Without units there is none.
template <typename Params>
JAX_ATTN_DEVICE Place FindShare(const Params& p, const SplitWork& w, int group) {
  Place place;
  if (w.uniform) {
    place.share = w.share;
    const int start = group * place.share;
    place.entry = w.units.Divide(start);
    place.offset = start - place.entry * w.units.divisor();
    place.units = min(place.share, w.units.divisor() * w.num_entries - start);
    return place;
  }
  // Without branches, so that lengths are asked for together.
  const auto count = [&](int i, int end) {
    const int units = Entry(p, w, min(i, w.num_entries - 1)).units(w);
    return i < end ? units : 0;
  };
  // Each lane counts entries that follow each other.
  const int lane = Lane(), per_lane = CeilDiv(w.num_entries, kWave);
  int own = 0;
#pragma unroll 4
  for (int i = 0; i < per_lane; ++i) own += count(lane * per_lane + i, w.num_entries);
  int sum = SumOfLanesBefore(own);
  const int total = Broadcast(sum + own, kWave - 1);
  place.share = w.groups.Divide(total + w.num_groups - 1);
  const int64_t start = static_cast<int64_t>(group) * place.share;
  place.units = static_cast<int>(min(static_cast<int64_t>(place.share), total - start));
  if (place.units <= 0) return place;
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
  place.offset = static_cast<int>(start - base);
  return place;
}

// The parts of entries that a group works on, one after the other.
class Parts {
 public:
  template <typename Params>
  JAX_ATTN_DEVICE Parts(const Params& p, const SplitWork& w, int group) : group_(group) {
    if (w.cut == Cut::kShares) {
      const Place place = FindShare(p, w, group);
      place_.share = Uniform(place.share);
      place_.entry = Uniform(place.entry);
      place_.offset = Uniform(place.offset);
      place_.units = Uniform(place.units);
    } else {
      place_.entry = w.splits.Divide(group);
      place_.units = 1;
    }
  }

  JAX_ATTN_DEVICE bool More() const { return place_.units > 0; }
  JAX_ATTN_DEVICE int entry() const { return place_.entry; }
  JAX_ATTN_DEVICE int group() const { return group_; }

  // Goes on to the next part, of `entry`: its keys, and the slot of its partial result, which is
  // negative if these are all keys of the entry. False if the entry has no such part.
  JAX_ATTN_DEVICE bool Next(const SplitWork& w, const Entry& entry, KeyRange& keys, int64_t& slot) {
    if (w.cut != Cut::kShares) {
      const FixedSplits splits(w, entry.keys);
      const int split = w.splits.Remainder(group_);
      keys = splits.Split(split);
      slot = entry.keys.end <= splits.first_end ? -1 : group_;
      place_.units = 0;
      return split == 0 || keys.begin < keys.end;
    }
    units_ = entry.units(w);
    const int taken = min(units_ - place_.offset, place_.units);
    const int begin = entry.keys.begin + place_.offset * w.unit_keys;
    keys = {begin, min(entry.keys.end, begin + taken * w.unit_keys)};
    slot = taken == units_ ? -1 : int64_t{2} * group_ + (done_ == 0 ? 0 : 1);
    begin_ = group_ * place_.share + done_ - place_.offset;
    done_ += taken;
    place_.units -= taken;
    place_.offset = 0;
    ++place_.entry;
    return true;
  }

  // While a part is worked on, this waits in registers of lanes, of which AMD GPUs have more.
  JAX_ATTN_DEVICE void Rest() {
    for (int* x : {&group_, &place_.share, &place_.entry, &place_.offset, &place_.units, &done_,
                   &begin_, &units_}) {
      *x = FreshOfLane(*x);
    }
  }
  JAX_ATTN_DEVICE void Resume() {
    for (int* x : {&group_, &place_.share, &place_.entry, &place_.offset, &place_.units, &done_,
                   &begin_, &units_}) {
      *x = Uniform(*x);
    }
  }

  // Of the share, once there are no more parts.
  JAX_ATTN_DEVICE ShareEnd End() const {
    return {place_.entry - 1, begin_, begin_ + units_, place_.share};
  }

 private:
  int group_;
  Place place_;
  int done_ = 0;               // units of the parts before
  int begin_ = 0, units_ = 0;  // of the last entry, counted from the first of all
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
