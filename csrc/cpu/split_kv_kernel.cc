// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "split_kv_kernel.h"

#include "../math/convert.h"
#include "simd.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_inff();

// Stands in for keys that no row of the tile sees, so that what is stored there is never read.
alignas(64) constexpr char kZeroRow[kMaxHeadDim * sizeof(float)] = {};

float ExpTwo(float x) { return Exp2(Broadcast(x))[0]; }

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

  const char* Token(int64_t key) const {
    if (pages == nullptr) return data + key * token_bytes;
    return data + PageId(pages, key / page_size, num_pages) * page_bytes +
           key % page_size * token_bytes;
  }

  // Ids outside the pool are the caller's error; clipping them keeps every read inside it.
  static int64_t PageId(const int32_t* pages, int64_t index, int64_t num_pages) {
    const int64_t id = pages[index];
    return id < 0 ? 0 : id >= num_pages ? num_pages - 1 : id;
  }
};

int64_t LayerIndex(const SplitKvAttentionParams& p, int64_t batch_index) {
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

// Keys that are worked on together, and where they are; null for a key that no row of any head of
// the item sees.
struct Tile {
  int64_t first_key = 0;
  int64_t num_keys = 0;  // 0: there are no more
  const char* k[kTileKeys];
  const char* v[kTileKeys];
};

// The same for one head. Keys that none of its rows sees are zeros, whatever is stored.
struct HeadTile {
  bool seen[kTileKeys];
  const char* k[kTileKeys];
  const char* v[kTileKeys];
};

struct Sequence {
  const SplitKvAttentionParams& p;
  const SplitItem& item;
  int64_t length;
  int64_t group;
  KeyAddresses k, v;
  Scale k_scale, v_scale;

  Sequence(const SplitKvAttentionParams& p, const SplitItem& item, int64_t layer)
      : p(p),
        item(item),
        length(ContextLength(p, item.batch_index)),
        group(p.group_size()),
        k(p, p.key, item.batch_index, layer),
        v(p, p.value, item.batch_index, layer),
        k_scale(p, p.k_scale, item.batch_index, layer),
        v_scale(p, p.v_scale, item.batch_index, layer) {}

  int64_t QueryOf(int64_t row) const { return row / group; }
  int64_t HeadOf(int64_t kv_head, int64_t row) const { return kv_head * group + row % group; }

  const uint8_t* MaskRow(int64_t kv_head, int64_t row) const {
    return static_cast<const uint8_t*>(p.mask.data) +
           p.mask.batch.Offset(p.batch, item.batch_index) +
           HeadOf(kv_head, row) * p.mask.head_stride + QueryOf(row) * p.mask.query_stride;
  }
};

// Adds to `seen` the keys of a tile that some row of a head sees, by the mask and everything else.
void SeenThroughMask(const Sequence& s, int64_t kv_head, const Tile& tile, bool* seen) {
  // Where all queries share a mask, the keys that some query sees otherwise are those of the item,
  // without gaps, so one query stands for all. Where all heads share it, one row of each query.
  const bool one_query = s.p.mask.query_stride == 0, one_head = s.p.mask.head_stride == 0;
  for (int64_t row = s.item.rows.begin; row < s.item.rows.end; ++row) {
    if (one_query && row - s.item.rows.begin >= (one_head ? 1 : s.group)) break;
    if (one_head && row > s.item.rows.begin && s.QueryOf(row) == s.QueryOf(row - 1)) continue;
    const uint8_t* mask = s.MaskRow(kv_head, row) + tile.first_key;
    KeyRange keys = VisibleKeys(s.p, s.length, s.QueryOf(row));
    if (one_query) keys = s.item.keys;
    const int64_t first = keys.begin - tile.first_key, last = keys.end - tile.first_key;
    for (int64_t j = first < 0 ? 0 : first; j < last && j < tile.num_keys; ++j) {
      seen[j] |= mask[j] != 0;
    }
  }
}

// Finds the next tile at or after `key` with something to see, and the addresses of its keys.
void PrepareTile(const Sequence& s, int64_t key, Tile& tile) {
  const bool masked = s.p.mask.data != nullptr;
  const int64_t mask_heads_end =
      s.p.mask.head_stride == 0 ? s.item.head_begin + 1 : s.item.head_end;
  for (tile.num_keys = 0; key < s.item.keys.end; key += kTileKeys) {
    const int64_t rest = s.item.keys.end - key;
    tile.first_key = key;
    tile.num_keys = rest < kTileKeys ? rest : kTileKeys;
    bool seen[kTileKeys] = {};
    for (int64_t head = s.item.head_begin; masked && head < mask_heads_end; ++head) {
      SeenThroughMask(s, head, tile, seen);
    }
    bool any = false;
    for (int64_t j = 0; j < kTileKeys; ++j) {
      const bool read = j < tile.num_keys && (!masked || seen[j]);
      tile.k[j] = read ? s.k.Token(key + j) : nullptr;
      tile.v[j] = read ? s.v.Token(key + j) : nullptr;
      any |= read;
    }
    if (any) return;
    tile.num_keys = 0;
  }
}

void PrepareHead(const Sequence& s, const Tile& tile, int64_t head, HeadTile& out) {
  const bool masked = s.p.mask.head_stride != 0;
  bool through_mask[kTileKeys] = {};
  if (masked) SeenThroughMask(s, head, tile, through_mask);
  for (int64_t j = 0; j < kTileKeys; ++j) {
    out.seen[j] = j < tile.num_keys && tile.k[j] != nullptr && (!masked || through_mask[j]);
    out.k[j] = out.seen[j] ? tile.k[j] + head * s.k.head_bytes : kZeroRow;
    out.v[j] = out.seen[j] ? tile.v[j] + head * s.v.head_bytes : kZeroRow;
  }
}

// Addresses of a head's keys to come, for prefetching.
void UpcomingKeys(const Sequence& s, const Tile& tile, int64_t head, const char** rows) {
  for (int64_t j = 0; j < kTileKeys; ++j) {
    const bool read = j < tile.num_keys && tile.k[j] != nullptr;
    rows[j] = read ? tile.k[j] + head * s.k.head_bytes : kZeroRow;
  }
}

// Rows to fetch into the cache while others are computed with; null for none.
struct Upcoming {
  const char* const* rows = nullptr;
  int64_t bytes = 0;  // of a row

  // Whether a cache line of the rows begins at `offset`.
  bool HasLineAt(int64_t offset) const {
    return rows != nullptr && offset % 64 == 0 && offset < bytes;
  }
  void Prefetch(int64_t j, int64_t offset) const { __builtin_prefetch(rows[j] + offset, 0, 3); }
};

// Scores kRows rows of queries against the keys of a tile: s[r][j] = q[r] . k[j].
template <typename S, int kRows>
void ScoreRows(const float* q, int64_t q_stride, const char* const* keys, int64_t num_keys,
               int64_t head_dim, float* s, const Upcoming& upcoming) {
  // Sums stay in registers: 8 of 16, or 16 of 32.
  constexpr int kKeys = kRows == 4 && !kManyRegisters ? 2 : 4;
  constexpr int kSums = kRows * kKeys;
  using Element = typename S::Element;
  constexpr int64_t kPairBytes = kPair * sizeof(Element);
  const int64_t whole = head_dim / kPair;
  const int rest = static_cast<int>(head_dim % kPair);
  for (int64_t j = 0; j < num_keys; j += kKeys) {
    F32 sum[kSums];
    const Element* k[kKeys];
    JAX_ATTN_UNROLL
    for (int i = 0; i < kSums; ++i) sum[i] = F32{};
    JAX_ATTN_UNROLL
    for (int i = 0; i < kKeys; ++i) k[i] = reinterpret_cast<const Element*>(keys[j + i]);
    for (int64_t c = 0; c < whole; ++c) {
      F32 a[kKeys], b[kKeys];
      JAX_ATTN_UNROLL
      for (int i = 0; i < kKeys; ++i) S::LoadPair(k[i] + c * kPair, a[i], b[i]);
      if (upcoming.HasLineAt(c * kPairBytes)) {
        JAX_ATTN_UNROLL
        for (int i = 0; i < kKeys; ++i) upcoming.Prefetch(j + i, c * kPairBytes);
      }
      JAX_ATTN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const F32 qa = Load(q + r * q_stride + c * kPair);
        const F32 qb = Load(q + r * q_stride + c * kPair + kLanes);
        JAX_ATTN_UNROLL
        for (int i = 0; i < kKeys; ++i) sum[r * kKeys + i] += qa * a[i];
        JAX_ATTN_UNROLL
        for (int i = 0; i < kKeys; ++i) sum[r * kKeys + i] += qb * b[i];
      }
    }
    if (rest != 0) {
      JAX_ATTN_UNROLL
      for (int i = 0; i < kKeys; ++i) {
        F32 a, b;
        LoadPartialPair<S>(k[i] + whole * kPair, rest, a, b);
        JAX_ATTN_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const float* row = q + r * q_stride + whole * kPair;
          sum[r * kKeys + i] += Load(row) * a;
          sum[r * kKeys + i] += Load(row + kLanes) * b;
        }
      }
    }
    constexpr int kAtOnce = kSums < kLanes ? kSums : kLanes;
    JAX_ATTN_UNROLL
    for (int first = 0; first < kSums; first += kAtOnce) {
      const F32 totals = SumLanes<kAtOnce>(sum + first);
      JAX_ATTN_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int r = (first + i) / kKeys, key = (first + i) % kKeys;
        s[r * kTileKeys + j + key] = totals[i * (kLanes / kAtOnce)];
      }
    }
  }
}

// Adds p[r][j] * v[j] over the keys to the sums of kRows rows, for one pair of vectors.
template <typename S, int kRows, bool kWhole, bool kFetch>
inline void AccumulatePair(const float* p, const char* const* values, int64_t num_keys,
                           int64_t offset, int rest, F32* sum, const Upcoming& upcoming) {
  F32 total[2 * kRows];
  JAX_ATTN_UNROLL
  for (int i = 0; i < 2 * kRows; ++i) total[i] = sum[i];
  for (int64_t j = 0; j < num_keys; ++j) {
    F32 a, b;
    const auto* value = reinterpret_cast<const typename S::Element*>(values[j] + offset);
    if constexpr (kWhole) {
      S::LoadPair(value, a, b);
    } else {
      LoadPartialPair<S>(value, rest, a, b);
    }
    if constexpr (kFetch) upcoming.Prefetch(j, offset);
    JAX_ATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const F32 weight = Broadcast(p[r * kTileKeys + j]);
      total[2 * r] += weight * a;
      total[2 * r + 1] += weight * b;
    }
  }
  JAX_ATTN_UNROLL
  for (int i = 0; i < 2 * kRows; ++i) sum[i] = total[i];
}

// Accumulates o[r] += sum over keys of p[r][j] * v[j].
template <typename S, int kRows>
void AccumulateRows(const float* p, const char* const* values, int64_t num_keys, int64_t v_head_dim,
                    float* o, int64_t o_stride, const Upcoming& upcoming) {
  for (int64_t c = 0; c < v_head_dim; c += kPair) {
    F32 sum[2 * kRows];
    JAX_ATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[2 * r] = Load(o + r * o_stride + c);
      sum[2 * r + 1] = Load(o + r * o_stride + c + kLanes);
    }
    const int64_t offset = c * sizeof(typename S::Element);
    const int rest = static_cast<int>(v_head_dim - c);
    if (rest < kPair) {
      AccumulatePair<S, kRows, false, false>(p, values, num_keys, offset, rest, sum, upcoming);
    } else if (upcoming.HasLineAt(offset)) {
      AccumulatePair<S, kRows, true, true>(p, values, num_keys, offset, rest, sum, upcoming);
    } else {
      AccumulatePair<S, kRows, true, false>(p, values, num_keys, offset, rest, sum, upcoming);
    }
    JAX_ATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      Store(o + r * o_stride + c, sum[2 * r]);
      Store(o + r * o_stride + c + kLanes, sum[2 * r + 1]);
    }
  }
}

// ---- From scores to weights

void AddBias(const RowOperand& bias, int64_t offset, int64_t num_keys, float* s) {
  if (bias.dtype == DType::kFloat32) {
    const float* row = static_cast<const float*>(bias.data) + offset;
    for (int64_t j = 0; j < num_keys; ++j) s[j] += row[j];
  } else {
    const uint16_t* row = static_cast<const uint16_t*>(bias.data) + offset;
    const bool is_bfloat16 = bias.dtype == DType::kBFloat16;
    for (int64_t j = 0; j < num_keys; ++j) {
      s[j] += is_bfloat16 ? FromBFloat16(row[j]) : FromFloat16(row[j]);
    }
  }
}

// Turns one row's dot products into logits in base 2; keys that the row does not see get -inf.
void Logits(const Sequence& seq, const Tile& tile, const bool* seen, int64_t kv_head, int64_t row,
            float* s) {
  const SplitKvAttentionParams& p = seq.p;
  const int64_t query = seq.QueryOf(row), head = seq.HeadOf(kv_head, row);
  const bool plain = p.logits_soft_cap == 0 && p.bias.data == nullptr &&
                     p.alibi_slopes.data == nullptr && !seq.k_scale.per_token();
  const float factor = p.scale * seq.k_scale.OfHead(kv_head) * (plain ? kLog2E : 1.0f);
  for (int64_t j = 0; j < kTileKeys; j += kLanes) Store(s + j, Load(s + j) * factor);
  if (!plain) {
    if (seq.k_scale.per_token()) {
      for (int64_t j = 0; j < tile.num_keys; ++j) {
        if (seen[j]) s[j] *= seq.k_scale.OfToken(seq.k, kv_head, tile.first_key + j);
      }
    }
    if (p.logits_soft_cap != 0) {
      const float cap = p.logits_soft_cap;
      for (int64_t j = 0; j < kTileKeys; j += kLanes) {
        Store(s + j, cap * Tanh(Load(s + j) * (1.0f / cap)));
      }
    }
    if (p.bias.data != nullptr) {
      const int64_t offset = p.bias.batch.Offset(p.batch, seq.item.batch_index) +
                             head * p.bias.head_stride + query * p.bias.query_stride +
                             tile.first_key;
      AddBias(p.bias, offset, tile.num_keys, s);
    }
    if (p.alibi_slopes.data != nullptr) {
      const float slope = p.alibi_slopes.At(p.batch, seq.item.batch_index)[head];
      const int64_t position =
          p.causal == Causal::kTopLeft ? query : seq.length - p.query_len + query;
      for (int64_t j = 0; j < tile.num_keys; ++j) {
        const int64_t distance = position - (tile.first_key + j);
        s[j] -= slope * static_cast<float>(distance < 0 ? -distance : distance);
      }
    }
    for (int64_t j = 0; j < kTileKeys; j += kLanes) Store(s + j, Load(s + j) * kLog2E);
  }
  const KeyRange visible = VisibleKeys(p, seq.length, query);
  const int64_t first = visible.begin - tile.first_key;
  int64_t last = visible.end - tile.first_key;
  if (last > tile.num_keys) last = tile.num_keys;
  for (int64_t j = 0; j < first && j < kTileKeys; ++j) s[j] = -kInfinity;
  for (int64_t j = last < 0 ? 0 : last; j < kTileKeys; ++j) s[j] = -kInfinity;
  if (p.mask.data != nullptr) {
    const uint8_t* mask = seq.MaskRow(kv_head, row) + tile.first_key;
    for (int64_t j = 0; j < tile.num_keys; ++j) {
      if (mask[j] == 0) s[j] = -kInfinity;
    }
  }
}

// Running state of a row: `top` is the largest logit (base 2), `total` the sum of 2^(s - top).
struct RowState {
  float top = -kInfinity;
  float total = 0;
};

// Folds a tile's logits into the state and replaces them by weights. Returns the factor that
// earlier accumulations must be multiplied with.
float Normalise(float* s, RowState& state) {
  F32 top = Load(s);
  for (int64_t j = kLanes; j < kTileKeys; j += kLanes) top = Max(Load(s + j), top);
  float new_top = MaxLane(top);
  new_top = state.top > new_top ? state.top : new_top;
  if (new_top == -kInfinity) {
    // Nothing seen yet: 0 stands in for the maximum, since -inf - -inf would be NaN.
    for (int64_t j = 0; j < kTileKeys; j += kLanes) Store(s + j, F32{});
    return 1.0f;
  }
  F32 total = {};
  for (int64_t j = 0; j < kTileKeys; j += kLanes) {
    const F32 weight = Exp2(Load(s + j) - new_top);
    Store(s + j, weight);
    total += weight;
  }
  const float rescale = state.top == new_top ? 1.0f : ExpTwo(state.top - new_top);
  state.total = state.total * rescale + Sum(total);
  state.top = new_top;
  return rescale;
}

void ScaleRow(float* row, int64_t padded_size, float factor) {
  for (int64_t i = 0; i < padded_size; i += kLanes) Store(row + i, Load(row + i) * factor);
}

// ---- Rows in and out

inline float LoadElement(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(data)[i];
    case DType::kBFloat16:
      return FromBFloat16(static_cast<const uint16_t*>(data)[i]);
    default:
      return FromFloat16(static_cast<const uint16_t*>(data)[i]);
  }
}

inline void StoreElement(void* data, DType dtype, int64_t i, float x) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(data)[i] = x;
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(data)[i] = ToBFloat16(x);
      break;
    default:
      static_cast<uint16_t*>(data)[i] = ToFloat16(x);
  }
}

int64_t OutputRow(const SplitKvAttentionParams& p, int64_t batch_index, int64_t kv_head,
                  int64_t row) {
  const int64_t query = row / p.group_size(),
                head = kv_head * p.group_size() + row % p.group_size();
  return (batch_index * p.query_len + query) * p.num_q_heads + head;
}

// Writes the output and lse of a row from its accumulated values, in the order of head_dim.
void FinishRow(const SplitKvAttentionParams& p, int64_t batch_index, int64_t kv_head, int64_t row,
               const float* values, RowState state) {
  const int64_t output_row = OutputRow(p, batch_index, kv_head, row);
  float top = state.top, total = state.total;
  // What brings the accumulated values, relative to state.top, to the final maximum.
  float to_top = 1.0f;
  if (p.sinks.data != nullptr) {
    const float sink = p.sinks.At(p.batch, batch_index)[output_row % p.num_q_heads] * kLog2E;
    if (sink > top) top = sink;
    if (top != -kInfinity && top != kInfinity) {
      to_top = ExpTwo(state.top - top);
      total = total * to_top + ExpTwo(sink - top);
    }
  }
  const bool empty = state.top == -kInfinity || top == kInfinity;
  const float factor = to_top / total;
  for (int64_t i = 0; i < p.v_head_dim; ++i) {
    StoreElement(p.out, p.query_dtype, output_row * p.v_head_dim + i,
                 empty ? 0.0f : values[i] * factor);
  }
  if (!p.lse_includes_sinks) top = state.top, total = state.total;
  const bool infinite = top == -kInfinity || top == kInfinity;
  p.lse[output_row] = infinite ? top : top * kLn2 + __builtin_logf(total);
}

// ---- The split kernel

// Scratch of an item, in floats.
struct Scratch {
  int64_t rows, q_stride, o_stride;
  float* q;       // [head][row][q_stride], pairs in the order of the key storage
  float* o;       // [head][row][o_stride], pairs in the order of the value storage
  float* s;       // [row][kTileKeys]
  float* states;  // [head][row][2]

  Scratch(const SplitKvAttentionParams& p, const SplitItem& item)
      : rows(item.rows.size()), q_stride(Padded(p.head_dim)), o_stride(Padded(p.v_head_dim)) {
    const int64_t all_rows = rows * (item.head_end - item.head_begin);
    q = item.scratch;
    o = q + all_rows * q_stride;
    s = o + all_rows * o_stride;
    states = s + rows * kTileKeys;
    for (int64_t i = 0; i < all_rows * o_stride; ++i) o[i] = 0;
    for (int64_t i = 0; i < all_rows; ++i) {
      states[2 * i] = -kInfinity;
      states[2 * i + 1] = 0;
    }
  }
};

template <typename S>
void LoadQueries(const Sequence& seq, const Scratch& scratch) {
  const SplitKvAttentionParams& p = seq.p;
  const SplitItem& item = seq.item;
  const int64_t batch_offset = p.query_batch.Offset(p.batch, item.batch_index);
  float* to = scratch.q;
  for (int64_t head = item.head_begin; head < item.head_end; ++head) {
    for (int64_t row = item.rows.begin; row < item.rows.end; ++row, to += scratch.q_stride) {
      const int64_t offset =
          batch_offset + (seq.QueryOf(row) * p.num_q_heads + seq.HeadOf(head, row)) * p.head_dim;
      for (int64_t i = 0; i < scratch.q_stride; ++i) to[i] = 0;
      for (int64_t c = 0; c < p.head_dim; c += kPair) {
        const int count = static_cast<int>(p.head_dim - c < kPair ? p.head_dim - c : kPair);
        for (int i = 0; i < count; ++i) {
          to[c + PairPosition<S>(i)] = LoadElement(p.query, p.query_dtype, offset + c + i);
        }
      }
    }
  }
}

// The rows of one head against one tile, kRows at a time.
template <typename S, int kRows>
int64_t AttendRows(const Sequence& seq, const Scratch& scratch, const Tile& tile, int64_t head,
                   int64_t first_row, const HeadTile& keys, const char* const* next_k) {
  const SplitKvAttentionParams& p = seq.p;
  const int64_t local_head = head - seq.item.head_begin;
  const int64_t padded_keys = (tile.num_keys + 7) / 8 * 8;
  int64_t row = first_row;
  for (; row + kRows <= scratch.rows; row += kRows) {
    const int64_t state_row = local_head * scratch.rows + row;
    // Rows are in the order of queries, so the last sees furthest and the first least far back.
    const KeyRange first = VisibleKeys(p, seq.length, seq.QueryOf(seq.item.rows.begin + row));
    const KeyRange last =
        VisibleKeys(p, seq.length, seq.QueryOf(seq.item.rows.begin + row + kRows - 1));
    if (last.end <= tile.first_key || first.begin >= tile.first_key + tile.num_keys) continue;
    float* s = scratch.s + row * kTileKeys;
    // The first rows bring in the values while they work on keys, and the other way round.
    Upcoming values, next_keys;
    if (row == 0) {
      values = {keys.v, p.v_head_dim * SizeOf(p.value.dtype)};
      next_keys = {next_k, p.head_dim * SizeOf(p.key.dtype)};
    }
    ScoreRows<S, kRows>(scratch.q + state_row * scratch.q_stride, scratch.q_stride, keys.k,
                        padded_keys, p.head_dim, s, values);
    for (int64_t j = padded_keys; j < kTileKeys; ++j) {
      for (int r = 0; r < kRows; ++r) s[r * kTileKeys + j] = 0;
    }
    for (int r = 0; r < kRows; ++r) {
      float* weights = s + r * kTileKeys;
      Logits(seq, tile, keys.seen, head, seq.item.rows.begin + row + r, weights);
      float* stored = scratch.states + 2 * (state_row + r);
      RowState state{stored[0], stored[1]};
      const float rescale = Normalise(weights, state);
      stored[0] = state.top;
      stored[1] = state.total;
      if (rescale != 1.0f) {
        ScaleRow(scratch.o + (state_row + r) * scratch.o_stride, scratch.o_stride, rescale);
      }
      if (seq.v_scale.per_token()) {
        for (int64_t j = 0; j < tile.num_keys; ++j) {
          if (weights[j] != 0) {
            weights[j] *= seq.v_scale.OfToken(seq.v, head, tile.first_key + j);
          }
        }
      }
    }
    AccumulateRows<S, kRows>(s, keys.v, padded_keys, p.v_head_dim,
                             scratch.o + state_row * scratch.o_stride, scratch.o_stride, next_keys);
  }
  return row;
}

template <typename S>
void FinishItem(const Sequence& seq, const Scratch& scratch) {
  const SplitKvAttentionParams& p = seq.p;
  const SplitItem& item = seq.item;
  const int64_t partial_size = PartialSize(p.v_head_dim);
  for (int64_t head = item.head_begin; head < item.head_end; ++head) {
    const float v_scale = seq.v_scale.OfHead(head);
    for (int64_t row = 0; row < scratch.rows; ++row) {
      const int64_t state_row = (head - item.head_begin) * scratch.rows + row;
      const float* o = scratch.o + state_row * scratch.o_stride;
      const RowState state{scratch.states[2 * state_row], scratch.states[2 * state_row + 1]};
      float buffer[kMaxHeadDim];
      float* ordered = item.partial != nullptr
                           ? item.partial + (head * scratch.rows + row) * partial_size
                           : buffer;
      for (int64_t c = 0; c < p.v_head_dim; c += kPair) {
        const int count = static_cast<int>(p.v_head_dim - c < kPair ? p.v_head_dim - c : kPair);
        for (int i = 0; i < count; ++i) ordered[c + i] = o[c + PairPosition<S>(i)] * v_scale;
      }
      if (item.partial != nullptr) {
        ordered[p.v_head_dim] = state.top;
        ordered[p.v_head_dim + 1] = state.total;
      } else {
        FinishRow(p, item.batch_index, head, item.rows.begin + row, ordered, state);
      }
    }
  }
}

template <typename S>
void Split(const SplitKvAttentionParams& p, const SplitItem& item) {
  const Sequence seq(p, item, LayerIndex(p, item.batch_index));
  const Scratch scratch(p, item);
  LoadQueries<S>(seq, scratch);
  Tile tiles[2];
  int current = 0;
  PrepareTile(seq, item.keys.begin, tiles[0]);
  while (tiles[current].num_keys != 0) {
    const Tile& tile = tiles[current];
    Tile& next = tiles[1 - current];
    PrepareTile(seq, tile.first_key + kTileKeys, next);
    for (int64_t head = item.head_begin; head < item.head_end; ++head) {
      const bool last_head = head + 1 == item.head_end;
      HeadTile head_tile;
      PrepareHead(seq, tile, head, head_tile);
      const char* next_k[kTileKeys];
      UpcomingKeys(seq, last_head ? next : tile, last_head ? item.head_begin : head + 1, next_k);
      int64_t row = AttendRows<S, 4>(seq, scratch, tile, head, 0, head_tile, next_k);
      row = AttendRows<S, 2>(seq, scratch, tile, head, row, head_tile, next_k);
      AttendRows<S, 1>(seq, scratch, tile, head, row, head_tile, next_k);
    }
    current = 1 - current;
  }
  FinishItem<S>(seq, scratch);
}

void SplitKernel(const SplitKvAttentionParams& p, const SplitItem& item) {
  switch (p.key.dtype) {
    case DType::kFloat32:
      return Split<Storage<DType::kFloat32>>(p, item);
    case DType::kBFloat16:
      return Split<Storage<DType::kBFloat16>>(p, item);
    case DType::kFloat16:
      return Split<Storage<DType::kFloat16>>(p, item);
    case DType::kInt8:
      return Split<Storage<DType::kInt8>>(p, item);
    case DType::kFloat8E4M3FN:
      return Split<Storage<DType::kFloat8E4M3FN>>(p, item);
    case DType::kFloat8E4M3FNUZ:
      return Split<Storage<DType::kFloat8E4M3FNUZ>>(p, item);
    case DType::kFloat8E5M2:
      return Split<Storage<DType::kFloat8E5M2>>(p, item);
  }
}

// ---- The merge kernel

void MergeKernel(const SplitKvAttentionParams& p, const MergeItem& item) {
  const int64_t rows = item.rows.size(), partial_size = PartialSize(p.v_head_dim);
  for (int64_t row = 0; row < rows; ++row) {
    const float* first = item.partials + (item.head * rows + row) * partial_size;
    RowState state;
    for (int64_t i = 0; i < item.num_splits; ++i) {
      const float top = first[i * item.partial_stride + p.v_head_dim];
      if (top > state.top || top != top) state.top = top;
    }
    float values[kMaxHeadDim] = {};
    for (int64_t i = 0; i < item.num_splits && state.top != -kInfinity; ++i) {
      const float* partial = first + i * item.partial_stride;
      const float top = partial[p.v_head_dim];
      if (top == -kInfinity) continue;
      const float weight = top == state.top ? 1.0f : ExpTwo(top - state.top);
      state.total += weight * partial[p.v_head_dim + 1];
      for (int64_t c = 0; c < p.v_head_dim; ++c) values[c] += weight * partial[c];
    }
    FinishRow(p, item.batch_index, item.head, item.rows.begin + row, values, state);
  }
}

}  // namespace

// Not inline, and declared again where the sets are chosen among: see split_kv_attention.cc.
extern const SplitKvKernels kSplitKvKernels;
#define JAX_ATTN_STRING(x) #x
#define JAX_ATTN_NAME(x) JAX_ATTN_STRING(x)
const SplitKvKernels kSplitKvKernels = {JAX_ATTN_NAME(JAX_ATTN_TARGET), SplitKernel, MergeKernel};

}  // namespace jax_attn::cpu::JAX_ATTN_TARGET
