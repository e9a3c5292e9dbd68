// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "split_kv_kernel.h"

#include <type_traits>

#include "../math/convert.h"
#include "kv_tile.h"
#include "row_products.h"
#include "simd.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_inff();

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
  const float rescale = state.top == new_top ? 1.0f : Exp2(state.top - new_top);
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
      to_top = Exp2(state.top - top);
      total = total * to_top + Exp2(sink - top);
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

template <typename S, bool kDot>
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
      if constexpr (kDot) {
        memcpy(to, static_cast<const uint16_t*>(p.query) + offset, p.head_dim * sizeof(uint16_t));
        continue;
      }
      for (int64_t c = 0; c < p.head_dim; c += kPair) {
        const int count = static_cast<int>(p.head_dim - c < kPair ? p.head_dim - c : kPair);
        for (int i = 0; i < count; ++i) {
          to[c + PairPosition<S>(i)] = LoadElement(p.query, p.query_dtype, offset + c + i);
        }
      }
    }
  }
}

// Calls body(size, row) for rows in groups of 4, then 2, then 1; `size` is a constant.
template <typename Body>
void ForRowGroups(int64_t rows, const Body& body) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) body(std::integral_constant<int, 4>(), row);
  for (; row + 2 <= rows; row += 2) body(std::integral_constant<int, 2>(), row);
  for (; row < rows; ++row) body(std::integral_constant<int, 1>(), row);
}

// Replaces a row's scores by weights, and brings its accumulator to the new maximum.
void WeighRow(const Sequence& seq, const Scratch& scratch, const Tile& tile, const HeadTile& keys,
              int64_t head, int64_t row, int64_t state_row) {
  float* weights = scratch.s + row * kTileKeys;
  Logits(seq, tile, keys.seen, head, seq.item.rows.begin + row, weights);
  float* stored = scratch.states + 2 * state_row;
  RowState state{stored[0], stored[1]};
  const float rescale = Normalise(weights, state);
  stored[0] = state.top;
  stored[1] = state.total;
  if (rescale != 1.0f) {
    ScaleRow(scratch.o + state_row * scratch.o_stride, scratch.o_stride, rescale);
  }
  if (!seq.v_scale.per_token()) return;
  for (int64_t j = 0; j < tile.num_keys; ++j) {
    if (weights[j] != 0) weights[j] *= seq.v_scale.OfToken(seq.v, head, tile.first_key + j);
  }
}

// The rows of one head against one tile: all scores, then all weights, then all accumulations. So
// keys, and then values, serve all rows while they are in the nearest cache, and what comes next is
// fetched all the time: values during scores, the keys to come during accumulations.
template <typename S, bool kDot>
void AttendHead(const Sequence& seq, const Scratch& scratch, const Tile& tile, int64_t head,
                const HeadTile& keys, const char* const* next_k) {
  const SplitKvAttentionParams& p = seq.p;
  const int64_t first_state = (head - seq.item.head_begin) * scratch.rows;
  const int64_t padded_keys = (tile.num_keys + 7) / 8 * 8;
  // Each group of rows fetches its share of what comes next.
  const auto upcoming = [&](const char* const* rows, int64_t bytes, int64_t row, int64_t size) {
    return Upcoming{rows, bytes, kTileKeys * row / scratch.rows,
                    kTileKeys * (row + size) / scratch.rows};
  };
  // Rows are in the order of queries, so the last sees furthest and the first least far back.
  const auto sees_tile = [&](int64_t row, int64_t size) {
    const int64_t begin = seq.item.rows.begin + row;
    const KeyRange first = VisibleKeys(p, seq.length, seq.QueryOf(begin));
    const KeyRange last = VisibleKeys(p, seq.length, seq.QueryOf(begin + size - 1));
    return last.end > tile.first_key && first.begin < tile.first_key + tile.num_keys;
  };
  ForRowGroups(scratch.rows, [&](auto size, int64_t row) {
    if (!sees_tile(row, size)) return;
    float* s = scratch.s + row * kTileKeys;
    ScoreRows<S, kDot, size>(scratch.q + (first_state + row) * scratch.q_stride, scratch.q_stride,
                             keys.k, padded_keys, p.head_dim, s,
                             upcoming(keys.v, p.v_head_dim * SizeOf(p.value.dtype), row, size));
    for (int r = 0; r < size; ++r) {
      for (int64_t j = padded_keys; j < kTileKeys; ++j) s[r * kTileKeys + j] = 0;
      WeighRow(seq, scratch, tile, keys, head, row + r, first_state + row + r);
    }
  });
  ForRowGroups(scratch.rows, [&](auto size, int64_t row) {
    if (!sees_tile(row, size)) return;
    AccumulateRows<S, size>(scratch.s + row * kTileKeys, keys.v, padded_keys, p.v_head_dim,
                            scratch.o + (first_state + row) * scratch.o_stride, scratch.o_stride,
                            upcoming(next_k, p.head_dim * SizeOf(p.key.dtype), row, size));
  });
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

template <typename S, bool kDot = false>
void Split(const SplitKvAttentionParams& p, const SplitItem& item) {
  const Sequence seq(p, item, LayerIndex(p, item.batch_index));
  const Scratch scratch(p, item);
  LoadQueries<S, kDot>(seq, scratch);
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
      AttendHead<S, kDot>(seq, scratch, tile, head, head_tile, next_k);
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
      if (kHasBFloat16Dot && p.query_dtype == DType::kBFloat16) {
        return Split<Storage<DType::kBFloat16>, kHasBFloat16Dot>(p, item);
      }
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
      const float weight = top == state.top ? 1.0f : Exp2(top - state.top);
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
