// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Where tokens are stored. Of tokens with the same slot the last is stored, and nobody can know
// that without seeing the slots of all tokens after it: a wave looks through them for its token
// where there are few, and otherwise a block does so for all of its tokens at once.

#ifndef JAX_ATTN_CSRC_GPU_FUSED_QKV_SLOTS_H_
#define JAX_ATTN_CSRC_GPU_FUSED_QKV_SLOTS_H_

#include <cstdint>

#include "fused_qkv_work.h"
#include "wave.h"

namespace jax_attn::gpu {

// A slot of a token that is not stored.
inline constexpr int64_t kNoSlot = -1;

// What a lane has read to find out whether a token is stored.
struct SlotReads {
  int64_t slot = kNoSlot;   // of the token
  int64_t later = kNoSlot;  // of a later one
};

// The slots of a batch index.
class QkvSlots {
 public:
  const int32_t* const narrow;  // one of the two
  const int64_t* const wide;
  const int64_t capacity;
  const int num_tokens;

  JAX_ATTN_DEVICE QkvSlots(const int32_t* narrow_slots, const int64_t* wide_slots, int64_t capacity,
                           int num_tokens)
      : narrow(narrow_slots), wide(wide_slots), capacity(capacity), num_tokens(num_tokens) {}

  JAX_ATTN_DEVICE int64_t operator[](int token) const {
    return wide != nullptr ? wide[token] : narrow[token];
  }
  JAX_ATTN_DEVICE int64_t Stored(int token) const {
    const int64_t slot = (*this)[token];
    return slot >= 0 && slot < capacity ? slot : kNoSlot;
  }

  // Begins to read for StoredLast.
  JAX_ATTN_DEVICE SlotReads Read(int token) const {
    const int later = token + 1 + Lane();
    return {(*this)[token], later < num_tokens ? (*this)[later] : kNoSlot};
  }

  // The slot of `token`, kNoSlot if it is not stored, as where a token after it has its slot. Asked
  // by a whole wave.
  JAX_ATTN_DEVICE int64_t StoredLast(int token, const SlotReads& reads) const {
    const int64_t slot = reads.slot;
    const int more = token + 1 + Lane() + kWave;
    bool taken = reads.later == slot;
    taken |= wide != nullptr ? IsIn(wide, more, slot) : IsIn(narrow, more, slot);
    return Any(taken) || slot < 0 || slot >= capacity ? kNoSlot : slot;
  }

 private:
  template <typename T>
  JAX_ATTN_DEVICE bool IsIn(const T* slots, int first, int64_t slot) const {
    bool taken = false;
#pragma unroll 4
    for (int t = first; t < num_tokens; t += kWave) taken |= slots[t] == slot;
    return taken;
  }
};

// The slots of consecutive tokens, in a hash table in shared memory.
class BlockSlots {
 public:
  // Called by all threads of the block; ends with a barrier.
  JAX_ATTN_DEVICE void Find(const QkvSlots& slots, int first, int count) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    for (int i = thread; i < kEntries; i += threads) entries_[i] = 0;
    for (int i = thread; i < kFilterWords; i += threads) filter_[i] = 0;
    for (int i = thread; i < count; i += threads) {
      slots_[i] = slots.Stored(first + i);
      taken_[i] = 0;
    }
    __syncthreads();
    for (int i = thread; i < count; i += threads) {
      if (slots_[i] != kNoSlot) Insert(i);
    }
    __syncthreads();
    const int next = first + count;
    if (slots.narrow != nullptr && reinterpret_cast<uintptr_t>(slots.narrow) % 16 == 0) {
      const int aligned = (next + 3) & ~3;
      if (next + thread < min(aligned, slots.num_tokens)) Look(slots.narrow[next + thread]);
      LookAtVectors(slots, aligned);
    } else {
      for (int t = next + thread; t < slots.num_tokens; t += kAhead * threads) {
        int64_t later[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          later[i] = slots[min(t + i * threads, slots.num_tokens - 1)];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) Look(later[i]);
      }
    }
    __syncthreads();
  }

  // The slot of token `i` of the block, kNoSlot if it is not stored.
  JAX_ATTN_DEVICE int64_t Of(int i) const {
    const int64_t slot = slots_[i];
    return slot != kNoSlot && Lookup(slot) == i && taken_[i] == 0 ? slot : kNoSlot;
  }

 private:
  static constexpr int kEntryBits = 10;
  static constexpr int kEntries = 1 << kEntryBits;
  static_assert(kEntries >= 2 * kMaxBlockTokens, "a search must end at an empty entry");
  static constexpr int kNone = -1;
  static constexpr int kAhead = 4;  // slots, or vectors of them, that a thread reads at once

  // Nearly all slots that are not of the block are found out by a bit of a filter.
  static constexpr int kFilterBits = 14;
  static constexpr int kFilterWords = (1 << kFilterBits) / 32;

  JAX_ATTN_DEVICE static uint32_t Hash(int64_t slot) {
    const uint32_t low = static_cast<uint32_t>(slot), high = static_cast<uint32_t>(slot >> 32);
    return (low ^ high) * 0x9e3779b1u;
  }
  JAX_ATTN_DEVICE static int Begin(int64_t slot) {
    return static_cast<int>(Hash(slot) >> (32 - kEntryBits));
  }

  JAX_ATTN_DEVICE bool MayHave(int64_t slot) const {
    const uint32_t bit = Hash(slot) >> (32 - kFilterBits);
    return (filter_[bit / 32] >> bit % 32 & 1u) != 0;
  }

  // An entry is the last token of a slot, counted from 1; 0 if it is empty.
  JAX_ATTN_DEVICE void Insert(int i) {
    const uint32_t bit = Hash(slots_[i]) >> (32 - kFilterBits);
    atomicOr(&filter_[bit / 32], 1u << bit % 32);
    for (int at = Begin(slots_[i]);; at = (at + 1) & (kEntries - 1)) {
      const int other = atomicCAS(&entries_[at], 0, i + 1);
      if (other == 0) return;
      if (slots_[other - 1] == slots_[i]) {
        atomicMax(&entries_[at], i + 1);
        return;
      }
    }
  }

  JAX_ATTN_DEVICE int Lookup(int64_t slot) const {
    for (int at = Begin(slot);; at = (at + 1) & (kEntries - 1)) {
      const int entry = entries_[at];
      if (entry == 0 || slots_[entry - 1] == slot) return entry - 1;
    }
  }

  // Looks at the slot of a later token.
  JAX_ATTN_DEVICE void Look(int64_t slot) {
    if (!MayHave(slot)) return;
    const int found = Lookup(slot);
    if (found != kNone) taken_[found] = 1;  // all who write, write this
  }

  // The same for all tokens from `first`, a multiple of 4.
  JAX_ATTN_DEVICE void LookAtVectors(const QkvSlots& slots, int first) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int tokens = slots.num_tokens, vectors = tokens / 4;
    const uint4* const from = reinterpret_cast<const uint4*>(slots.narrow);
    for (int v = first / 4 + thread; v < vectors; v += kAhead * threads) {
      uint4 read[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) read[i] = from[min(v + i * threads, vectors - 1)];
      uint32_t wanted = 0;  // a bit for each vector
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const uint32_t slots_read[] = {read[i].x, read[i].y, read[i].z, read[i].w};
        bool any = false;
#pragma unroll
        for (const uint32_t slot : slots_read) any |= MayHave(Slot(slot));
        wanted |= static_cast<uint32_t>(any) << i;
      }
#pragma unroll 1
      for (int i = 0; wanted >> i != 0; ++i) {
        if ((wanted >> i & 1u) == 0) continue;
        const uint4 again = from[min(v + i * threads, vectors - 1)];
        Look(Slot(again.x));
        Look(Slot(again.y));
        Look(Slot(again.z));
        Look(Slot(again.w));
      }
    }
    if (max(4 * vectors, first) + thread < tokens) {
      Look(slots.narrow[max(4 * vectors, first) + thread]);
    }
  }
  JAX_ATTN_DEVICE static int64_t Slot(uint32_t word) { return static_cast<int32_t>(word); }

  int64_t slots_[kMaxBlockTokens];
  int entries_[kEntries];
  int taken_[kMaxBlockTokens];
  uint32_t filter_[kFilterWords];
};

static_assert(sizeof(BlockSlots) == kBlockSlotsBytes);

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_FUSED_QKV_SLOTS_H_
