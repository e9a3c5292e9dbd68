// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Where the keys and values of a sequence are, and which of them are worked on together.

#ifndef JAX_ATTN_CSRC_CPU_KV_TILE_H_
#define JAX_ATTN_CSRC_CPU_KV_TILE_H_

#include <cstdint>

#include "split_kv_kernel.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {

// Stands in for keys that no row of the tile sees, so that what is stored there is never read.
alignas(64) inline constexpr char kZeroRow[kMaxHeadDim * sizeof(float)] = {};

// ---- Addresses

// Where the keys (or values) of one sequence are. Dense contexts are a single page.
struct KeyAddresses {
  const char* data;  // of the sequence, or of the pool's layer
  int64_t page_bytes, token_bytes, head_bytes;
  const int32_t* pages;  // null: dense
  int64_t page_size, num_pages;

  KeyAddresses(const SplitKvAttentionParams& p, const KvOperand& x, int64_t batch_index,
               int64_t layer)
      : pages(p.page_size == 0 ? nullptr : p.page_table.At(p.batch, batch_index)),
        page_size(p.page_size),
        num_pages(p.num_pages) {
    const int64_t element = SizeOf(x.dtype);
    data = static_cast<const char*>(x.data) +
           (x.batch.Offset(p.batch, batch_index) + layer * x.layer_stride) * element;
    page_bytes = x.page_stride * element;
    token_bytes = x.token_stride * element;
    head_bytes = x.head_stride * element;
  }

  // The addresses of `count` tokens from `key` on, page by page.
  void Tokens(int64_t key, int64_t count, const char** out) const {
    if (pages == nullptr) {
      for (int64_t j = 0; j < count; ++j) out[j] = data + (key + j) * token_bytes;
      return;
    }
    int64_t page = key / page_size, offset = key % page_size;
    for (int64_t j = 0; j < count; ++page, offset = 0) {
      const char* first = data + PageId(pages, page, num_pages) * page_bytes;
      for (; offset < page_size && j < count; ++j, ++offset) out[j] = first + offset * token_bytes;
    }
  }

  // Ids outside the pool are the caller's error; clipping them keeps every read inside it.
  static int64_t PageId(const int32_t* pages, int64_t index, int64_t num_pages) {
    const int64_t id = pages[index];
    return id < 0 ? 0 : id >= num_pages ? num_pages - 1 : id;
  }
};

inline int64_t LayerIndex(const SplitKvAttentionParams& p, int64_t batch_index) {
  if (p.layer.data == nullptr) return 0;
  const int64_t layer = *p.layer.At(p.batch, batch_index);
  return layer < 0 ? 0 : layer >= p.num_layers ? p.num_layers - 1 : layer;
}

struct Scale {
  const float* data;  // null: all 1
  int64_t page_stride, token_stride, head_stride;

  Scale(const SplitKvAttentionParams& p, const ScaleOperand& x, int64_t batch_index, int64_t layer)
      : data(x.data == nullptr
                 ? nullptr
                 : x.data + x.batch.Offset(p.batch, batch_index) + layer * x.layer_stride),
        page_stride(x.page_stride),
        token_stride(x.token_stride),
        head_stride(x.head_stride) {}

  bool per_token() const { return data != nullptr && token_stride != 0; }
  // The factor of all tokens of a head, 1 if each token has its own.
  float OfHead(int64_t head) const {
    return data == nullptr || per_token() ? 1.0f : data[head * head_stride];
  }
  float OfToken(const KeyAddresses& keys, int64_t head, int64_t key) const {
    int64_t page = 0;
    if (keys.pages != nullptr) {
      page = KeyAddresses::PageId(keys.pages, key / keys.page_size, keys.num_pages);
      key %= keys.page_size;
    }
    return data[page * page_stride + key * token_stride + head * head_stride];
  }
};

// ---- One tile of keys

// Up to kKeys keys that are worked on together, and where they are; null for a key that no row of
// any head of the item sees.
template <int64_t kKeys>
struct Tile {
  int64_t first_key = 0;
  int64_t num_keys = 0;  // 0: there are no more
  const char* k[kKeys];
  const char* v[kKeys];
};

// The same for one head. Keys that none of its rows sees are zeros, whatever is stored.
template <int64_t kKeys>
struct HeadTile {
  bool seen[kKeys];
  const char* k[kKeys];
  const char* v[kKeys];
};

struct Sequence {
  const SplitKvAttentionParams& p;
  const SplitItem& item;
  Context context;
  int64_t group;
  KeyRange common;  // what all rows see, by everything but the mask
  KeyAddresses k, v;
  Scale k_scale, v_scale;

  Sequence(const SplitKvAttentionParams& p, const SplitItem& item, int64_t layer)
      : p(p),
        item(item),
        context(ContextOf(p, item.batch_index)),
        group(p.group_size()),
        k(p, p.key, item.batch_index, layer),
        v(p, p.value, item.batch_index, layer),
        k_scale(p, p.k_scale, item.batch_index, layer),
        v_scale(p, p.v_scale, item.batch_index, layer) {
    // Both ends of what a query sees move forward with the query.
    common.begin = VisibleKeys(p, context, QueryOf(item.rows.end - 1)).begin;
    common.end = VisibleKeys(p, context, QueryOf(item.rows.begin)).end;
  }

  int64_t QueryOf(int64_t row) const { return row / group; }
  int64_t HeadOf(int64_t kv_head, int64_t row) const { return kv_head * group + row % group; }

  const uint8_t* MaskRow(int64_t kv_head, int64_t row) const {
    return static_cast<const uint8_t*>(p.mask.data) +
           p.mask.batch.Offset(p.batch, item.batch_index) +
           HeadOf(kv_head, row) * p.mask.head_stride + QueryOf(row) * p.mask.query_stride;
  }
};

// Adds to `seen` the keys of a tile that some row of a head sees, by the mask and everything else.
template <int64_t kKeys>
inline void SeenThroughMask(const Sequence& s, int64_t kv_head, const Tile<kKeys>& tile,
                            bool* seen) {
  // Where all queries share a mask, the keys that some query sees otherwise are those of the item,
  // without gaps, so one query stands for all. Where all heads share it, one row of each query.
  const bool one_query = s.p.mask.query_stride == 0, one_head = s.p.mask.head_stride == 0;
  for (int64_t row = s.item.rows.begin; row < s.item.rows.end; ++row) {
    if (one_query && row - s.item.rows.begin >= (one_head ? 1 : s.group)) break;
    if (one_head && row > s.item.rows.begin && s.QueryOf(row) == s.QueryOf(row - 1)) continue;
    const uint8_t* mask = s.MaskRow(kv_head, row) + tile.first_key;
    KeyRange keys = VisibleKeys(s.p, s.context, s.QueryOf(row));
    if (one_query) keys = s.item.keys;
    const int64_t first = keys.begin - tile.first_key, last = keys.end - tile.first_key;
    for (int64_t j = first < 0 ? 0 : first; j < last && j < tile.num_keys; ++j) {
      seen[j] |= mask[j] != 0;
    }
  }
}

// Finds the next tile at or after `key` with something to see, and the addresses of its keys.
template <int64_t kKeys>
inline void PrepareTile(const Sequence& s, int64_t key, Tile<kKeys>& tile) {
  const bool masked = s.p.mask.data != nullptr;
  const int64_t mask_heads_end =
      s.p.mask.head_stride == 0 ? s.item.head_begin + 1 : s.item.head_end;
  for (tile.num_keys = 0; key < s.item.keys.end; key += kKeys) {
    const int64_t rest = s.item.keys.end - key;
    tile.first_key = key;
    tile.num_keys = rest < kKeys ? rest : kKeys;
    bool seen[kKeys] = {};
    for (int64_t head = s.item.head_begin; masked && head < mask_heads_end; ++head) {
      SeenThroughMask(s, head, tile, seen);
    }
    bool any = !masked;
    for (int64_t j = 0; j < kKeys; ++j) any |= seen[j];
    if (any) {
      s.k.Tokens(key, tile.num_keys, tile.k);
      s.v.Tokens(key, tile.num_keys, tile.v);
      for (int64_t j = 0; j < kKeys; ++j) {
        const bool read = j < tile.num_keys && (!masked || seen[j]);
        if (!read) tile.k[j] = tile.v[j] = nullptr;
      }
      return;
    }
    tile.num_keys = 0;
  }
}

// Whether every row sees every key of a full tile.
template <int64_t kKeys>
inline bool SeenByAll(const Sequence& s, const Tile<kKeys>& tile) {
  return s.p.mask.data == nullptr && tile.num_keys == kKeys && s.common.begin <= tile.first_key &&
         tile.first_key + kKeys <= s.common.end;
}

template <int64_t kKeys>
inline void PrepareHead(const Sequence& s, const Tile<kKeys>& tile, int64_t head,
                        HeadTile<kKeys>& out) {
  if (SeenByAll(s, tile)) {
    for (int64_t j = 0; j < kKeys; ++j) {
      out.seen[j] = true;
      out.k[j] = tile.k[j] + head * s.k.head_bytes;
      out.v[j] = tile.v[j] + head * s.v.head_bytes;
    }
    return;
  }
  const bool masked = s.p.mask.head_stride != 0;
  bool through_mask[kKeys] = {};
  if (masked) SeenThroughMask(s, head, tile, through_mask);
  for (int64_t j = 0; j < kKeys; ++j) {
    out.seen[j] = j < tile.num_keys && tile.k[j] != nullptr && (!masked || through_mask[j]);
    out.k[j] = out.seen[j] ? tile.k[j] + head * s.k.head_bytes : kZeroRow;
    out.v[j] = out.seen[j] ? tile.v[j] + head * s.v.head_bytes : kZeroRow;
  }
}

// Addresses of a head's keys to come, for prefetching.
template <int64_t kKeys>
inline void UpcomingKeys(const Sequence& s, const Tile<kKeys>& tile, int64_t head,
                         const char** rows) {
  if (SeenByAll(s, tile)) {
    for (int64_t j = 0; j < kKeys; ++j) rows[j] = tile.k[j] + head * s.k.head_bytes;
    return;
  }
  for (int64_t j = 0; j < kKeys; ++j) {
    const bool read = j < tile.num_keys && tile.k[j] != nullptr;
    rows[j] = read ? tile.k[j] + head * s.k.head_bytes : kZeroRow;
  }
}

}  // namespace jax_attn::cpu::JAX_ATTN_TARGET

#endif  // JAX_ATTN_CSRC_CPU_KV_TILE_H_
