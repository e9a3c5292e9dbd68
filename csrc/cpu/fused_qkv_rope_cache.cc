// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "fused_qkv_rope_cache.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "fused_qkv_kernel.h"
#include "instruction_sets.h"

namespace jax_attn::cpu {

#define JAX_ATTN_DECLARE(set)                    \
  namespace set {                                \
  extern const FusedQkvKernels kFusedQkvKernels; \
  }
JAX_ATTN_FOR_EACH_SET(JAX_ATTN_DECLARE)
#undef JAX_ATTN_DECLARE

namespace {

// Elements of qkv below which handing work to another thread costs more than it saves.
constexpr int64_t kMinParallelElements = 64 * 1024;

// Elements of qkv that an item should have at least, and the items that a thread should have.
constexpr int64_t kMinItemElements = 16 * 1024;
constexpr int64_t kItemsPerThread = 8;

// Bytes of results above which they will not stay in a cache until they are read.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

constexpr int64_t kCopyBytes = int64_t{1} << 20;

const FusedQkvKernels* KernelsOf(std::string_view variant) {
  if (variant == "amx" && !MayUseTiles()) return nullptr;
#define JAX_ATTN_TRY(set)                                        \
  if (variant.empty() ? CanRun(#set) : SetOf(variant) == #set) { \
    return CanRun(#set) ? &set::kFusedQkvKernels : nullptr;      \
  }
  JAX_ATTN_FOR_EACH_SET(JAX_ATTN_TRY)
#undef JAX_ATTN_TRY
  return nullptr;
}

// Which tokens are stored, and where: of those with the same slot the last one is.
template <typename Slot>
void FindSlots(const Slot* slots, int64_t num_tokens, int64_t capacity, int64_t* found) {
  bool increasing = true;
  int64_t last = -1;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t slot = slots[t];
    const bool stored = slot >= 0 && slot < capacity;
    found[t] = stored ? slot : kNoSlot;
    increasing &= !stored || slot > last;
    last = stored ? slot : last;
  }
  if (increasing) return;
  // A hash table of the slots that later tokens have taken, at most half full.
  int64_t bits = 2;
  while ((int64_t{1} << bits) < 2 * num_tokens) ++bits;
  std::vector<int64_t> taken(size_t{1} << bits, kNoSlot);
  for (int64_t t = num_tokens; t-- > 0;) {
    if (found[t] == kNoSlot) continue;
    // The high bits of the product depend on all bits of the slot (Fibonacci hashing).
    uint64_t at = (static_cast<uint64_t>(found[t]) * 0x9e3779b97f4a7c15u) >> (64 - bits);
    while (taken[at] != kNoSlot && taken[at] != found[t]) at = (at + 1) & (taken.size() - 1);
    if (taken[at] == found[t]) {
      found[t] = kNoSlot;
    } else {
      taken[at] = found[t];
    }
  }
}

void FindSlots(const FusedQkvRopeCacheParams& p, int64_t batch_index, int64_t* found) {
  const int64_t layer = p.layer.data == nullptr ? 0 : *p.layer.At(p.batch, batch_index);
  const bool has_layer = p.num_layers == 0 || (layer >= 0 && layer < p.num_layers);
  const int64_t capacity = has_layer ? p.num_pages * p.page_size : 0;
  if (p.slots_64.data != nullptr) {
    FindSlots(p.slots_64.At(p.batch, batch_index), p.num_tokens, capacity, found);
  } else {
    FindSlots(p.slots_32.At(p.batch, batch_index), p.num_tokens, capacity, found);
  }
}

std::vector<uint8_t> MropeAxes(const FusedQkvRopeCacheParams& p) {
  std::vector<uint8_t> axes;
  if (!p.has_mrope) return axes;
  const int64_t* sections = p.mrope_sections;
  for (int64_t pair = 0; pair < p.rotary_dim / 2; ++pair) {
    const int64_t turn = pair % 3;
    axes.push_back(p.mrope_interleaved                ? (pair < 3 * sections[turn] ? turn : 0)
                   : pair < sections[0]               ? 0
                   : pair < sections[0] + sections[1] ? 1
                                                      : 2);
  }
  return axes;
}

// A buffer that XLA did not alias must start as a copy.
void CopyIfMoved(const void* from, void* to, int64_t bytes, Executor& executor) {
  if (from == to || bytes == 0) return;
  ParallelFor(executor, executor.num_threads(), (bytes + kCopyBytes - 1) / kCopyBytes,
              [&](int64_t i, int64_t) {
                const int64_t begin = i * kCopyBytes;
                std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin,
                            std::min(kCopyBytes, bytes - begin));
              });
}

}  // namespace

std::string LaunchFusedQkvRopeCache(const FusedQkvRopeCacheParams& p, std::string_view variant,
                                    Executor& executor) {
  const FusedQkvKernels* const kernels = KernelsOf(variant);
  if (kernels == nullptr) return "variant '" + std::string(variant) + "' cannot run here";

  for (const PagesOperand* pages : {&p.k_pages, &p.v_pages}) {
    CopyIfMoved(pages->source, pages->data,
                p.batch.count * pages->batch_stride * SizeOf(pages->dtype), executor);
  }
  for (const DynamicScales* scales : {&p.k_scales_out, &p.v_scales_out}) {
    CopyIfMoved(scales->source, scales->data,
                p.batch.count * scales->batch_stride * int64_t{sizeof(float)}, executor);
  }
  const int64_t units = p.num_tokens * p.num_units(), elements = p.num_tokens * p.columns();
  if (p.batch.count * elements == 0) return "";

  const int64_t total = p.batch.count * elements;
  const int64_t num_threads = total < kMinParallelElements ? 1 : executor.num_threads();
  std::vector<int64_t> slots(p.batch.count * p.num_tokens);
  ParallelFor(executor, num_threads, p.batch.count,
              [&](int64_t i, int64_t) { FindSlots(p, i, slots.data() + i * p.num_tokens); });

  // Items are cut between units, so that few tokens can still occupy all threads, and between
  // tokens where there are many, so that a token's angles are looked up once.
  const int64_t wanted = num_threads == 1 ? total : total / (num_threads * kItemsPerThread);
  int64_t item_units = std::max(wanted, kMinItemElements) / (p.columns() / p.num_units() + 1) + 1;
  if (item_units > p.num_units()) item_units -= item_units % p.num_units();
  const int64_t items_per_batch = (units + item_units - 1) / item_units;

  const std::vector<uint8_t> mrope_axes = MropeAxes(p);
  const bool stream = total * SizeOf(p.dtype) >= kStreamBytes;
  ParallelFor(executor, num_threads, p.batch.count * items_per_batch, [&](int64_t i, int64_t) {
    QkvItem item;
    item.batch_index = i / items_per_batch;
    item.unit_begin = i % items_per_batch * item_units;
    item.unit_end = std::min(units, item.unit_begin + item_units);
    item.slots = slots.data() + item.batch_index * p.num_tokens;
    item.mrope_axes = mrope_axes.data();
    item.stream = stream;
    kernels->run(p, item);
  });
  return "";
}

}  // namespace jax_attn::cpu
