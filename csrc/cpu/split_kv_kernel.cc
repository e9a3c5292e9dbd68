// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "split_kv_kernel.h"

#include <type_traits>

#include "../math/convert.h"
#include "kv_tile.h"
#include "row_products.h"
#include "row_weights.h"
#include "simd.h"
#include "tile_products.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {
namespace {

constexpr float kLn2 = 0.6931471805599453f;

// ---- Rows in and out

void LoadElements(const void* data, DType dtype, int64_t offset, int64_t count, float* to) {
  if (dtype == DType::kFloat32) {
    memcpy(to, static_cast<const float*>(data) + offset, count * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) to[i] = FromBFloat16(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = FromFloat16(from[i]);
  }
}

// Stores value(i) as element i of the `count` elements from `offset` on.
template <typename Value>
void StoreElements(void* data, DType dtype, int64_t offset, int64_t count, const Value& value) {
  if (dtype == DType::kFloat32) {
    float* to = static_cast<float*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) to[i] = value(i);
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(data) + offset;
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) to[i] = ToBFloat16(value(i));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = ToFloat16(value(i));
  }
}

int64_t OutputRow(const SplitKvAttentionParams& p, int64_t batch_index, int64_t kv_head,
                  int64_t row) {
  const int64_t query = row / p.group_size(),
                head = kv_head * p.group_size() + row % p.group_size();
  return (batch_index * p.query_len + query) * p.num_q_heads + head;
}

// What a row has come to: the largest logit (base 2), and the sum of 2^(logit - top).
struct RowResult {
  float top = -kInfinity;
  float total = 0;
};

// Writes the output and lse of a row from its accumulated values, in the order of head_dim.
void FinishRow(const SplitKvAttentionParams& p, int64_t batch_index, int64_t kv_head, int64_t row,
               const float* values, RowResult state) {
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
  StoreElements(p.out, p.query_dtype, output_row * p.v_head_dim, p.v_head_dim,
                [&](int64_t i) { return empty ? 0.0f : values[i] * factor; });
  if (!p.lse_includes_sinks) top = state.top, total = state.total;
  const bool infinite = top == -kInfinity || top == kInfinity;
  p.lse[output_row] = infinite ? top : top * kLn2 + __builtin_logf(total);
}

// ---- The split kernel

// Keys of a tile that vectors compute with; those past its end are rows of zeros.
template <int64_t kKeys>
int64_t PaddedKeys(const Tile<kKeys>& tile) {
  return (tile.num_keys + 7) / 8 * 8;
}

// Scratch of an item.
struct Scratch {
  int64_t rows, q_stride;
  float* q;         // [head][row][q_stride], pairs in the order of the key storage
  float* s;         // [row][keys of a tile]
  RowStates state;  // [head][row], outputs in the order of the value storage

  Scratch(const SplitKvAttentionParams& p, const SplitItem& item)
      : rows(item.rows.size()), q_stride(Padded(p.head_dim)) {
    const int64_t all_rows = rows * (item.head_end - item.head_begin);
    q = item.scratch;
    s = q + QueryRows(rows) * (item.head_end - item.head_begin) * q_stride;
    state.stride = Padded(p.v_head_dim);
    state.outputs = s + rows * kBlockKeys;
    state.totals = state.outputs + all_rows * state.stride;
    state.tops = state.totals + all_rows * kLanes;
    state.Clear(all_rows);
  }

  float* QueryOf(const Sequence& seq, int64_t head, int64_t row) const {
    return q + ((head - seq.item.head_begin) * rows + row) * q_stride;
  }
  RowStates StateOf(const Sequence& seq, int64_t head, int64_t row) const {
    return state.From((head - seq.item.head_begin) * rows + row);
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
      LoadElements(p.query, p.query_dtype, offset, p.head_dim, to);
      for (int64_t c = 0; c < p.head_dim; c += kPair) {
        F32 a = Load(to + c), b = Load(to + c + kLanes);
        ToStorageOrder<S>(a, b);
        Store(to + c, a);
        Store(to + c + kLanes, b);
      }
    }
  }
}

// Calls body(size, row) for rows in groups of 8 (if registers allow), then 4, 2 and 1; `size` is a
// constant.
template <typename Body>
void ForRowGroups(int64_t rows, const Body& body) {
  int64_t row = 0;
  if constexpr (kManyRegisters) {
    for (; row + 8 <= rows; row += 8) body(std::integral_constant<int, 8>(), row);
  }
  for (; row + 4 <= rows; row += 4) body(std::integral_constant<int, 4>(), row);
  for (; row + 2 <= rows; row += 2) body(std::integral_constant<int, 2>(), row);
  for (; row < rows; ++row) body(std::integral_constant<int, 1>(), row);
}

// Turns the scores of kRows rows against a tile into weights of its values.
template <int kRows, int64_t kKeys>
void WeighRows(const Sequence& seq, const Scratch& scratch, const Tile<kKeys>& tile, int64_t head,
               const bool* seen, int64_t row) {
  const SplitKvAttentionParams& p = seq.p;
  float* s = scratch.s + row * kKeys;
  float factor = 1.0f;
  if (SeenByAll(seq, tile) && LogitsAreProducts(seq)) {
    factor = p.scale * seq.k_scale.OfHead(head) * kLog2E;
  } else {
    for (int r = 0; r < kRows; ++r) {
      for (int64_t j = PaddedKeys(tile); j < kKeys; ++j) s[r * kKeys + j] = 0;
      Logits(seq, tile, seen, head, seq.item.rows.begin + row + r, s + r * kKeys);
    }
  }
  Weigh<kRows, kKeys>(factor, s, scratch.StateOf(seq, head, row));
  if (!seq.v_scale.per_token()) return;
  for (int64_t j = 0; j < tile.num_keys; ++j) {
    if (!seen[j]) continue;
    const float v_scale = seq.v_scale.OfToken(seq.v, head, tile.first_key + j);
    for (int r = 0; r < kRows; ++r) {
      if (s[r * kKeys + j] != 0) s[r * kKeys + j] *= v_scale;
    }
  }
}

// The rows of one head against one tile: all scores, then all weights, then all accumulations. So
// keys, and then values, serve all rows while they are in the nearest cache, and what comes next is
// fetched all the time: values during scores, the keys to come during accumulations.
template <typename S>
void AttendHead(const Sequence& seq, const Scratch& scratch, const Tile<kTileKeys>& tile,
                int64_t head, const HeadTile<kTileKeys>& keys, const char* const* next_k) {
  const SplitKvAttentionParams& p = seq.p;
  const int64_t padded_keys = PaddedKeys(tile);
  const bool seen_by_all = SeenByAll(seq, tile);
  // Each group of rows fetches its share of what comes next.
  const auto share = [&](int64_t row) {
    return kTileKeys * row / scratch.rows / kFetchGroup * kFetchGroup;
  };
  // Rows are in the order of queries, so the last sees furthest and the first least far back.
  const auto sees_tile = [&](int64_t row, int64_t size) {
    if (seen_by_all) return true;
    const int64_t begin = seq.item.rows.begin + row;
    const KeyRange first = VisibleKeys(p, seq.context, seq.QueryOf(begin));
    const KeyRange last = VisibleKeys(p, seq.context, seq.QueryOf(begin + size - 1));
    return last.end > tile.first_key && first.begin < tile.first_key + tile.num_keys;
  };
  ForRowGroups(scratch.rows, [&](auto size, int64_t row) {
    if (!sees_tile(row, size)) return;
    ScoreRows<S, size>(scratch.QueryOf(seq, head, row), scratch.q_stride, keys.k, padded_keys,
                       p.head_dim, scratch.s + row * kTileKeys,
                       Upcoming{keys.v, share(row), share(row + size)});
    WeighRows<size>(seq, scratch, tile, head, keys.seen, row);
  });
  ForRowGroups(scratch.rows, [&](auto size, int64_t row) {
    if (!sees_tile(row, size)) return;
    const RowStates state = scratch.StateOf(seq, head, row);
    AccumulateRows<S, size>(scratch.s + row * kTileKeys, keys.v, padded_keys, p.v_head_dim,
                            state.outputs, state.stride,
                            Upcoming{next_k, share(row), share(row + size)});
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
      float* o = scratch.state.From(state_row).outputs;
      for (int64_t c = 0; c < p.v_head_dim; c += kPair) {
        F32 a = Load(o + c) * v_scale, b = Load(o + c + kLanes) * v_scale;
        ToElementOrder<S>(a, b);
        Store(o + c, a);
        Store(o + c + kLanes, b);
      }
      const RowResult result{scratch.state.tops[state_row], scratch.state.Total(state_row)};
      if (item.partial != nullptr) {
        float* partial = item.partial + (head * scratch.rows + row) * partial_size;
        memcpy(partial, o, p.v_head_dim * sizeof(float));
        partial[p.v_head_dim] = result.top;
        partial[p.v_head_dim + 1] = result.total;
      } else {
        FinishRow(p, item.batch_index, head, item.rows.begin + row, o, result);
      }
    }
  }
}

// Calls attend(tile, head, next tile, head to come in either) for all tiles and heads. The next
// tile has no keys if there is none.
template <int64_t kKeys, typename Attend>
void ForTilesAndHeads(const Sequence& seq, const Attend& attend) {
  const SplitItem& item = seq.item;
  Tile<kKeys> tiles[2];
  int current = 0;
  PrepareTile(seq, item.keys.begin, tiles[0]);
  while (tiles[current].num_keys != 0) {
    const Tile<kKeys>& tile = tiles[current];
    Tile<kKeys>& next = tiles[1 - current];
    PrepareTile(seq, tile.first_key + kKeys, next);
    for (int64_t head = item.head_begin; head < item.head_end; ++head) {
      const bool last_head = head + 1 == item.head_end;
      attend(tile, head, last_head ? next : tile, last_head ? item.head_begin : head + 1);
    }
    current = 1 - current;
  }
}

template <typename S>
void Split(const SplitKvAttentionParams& p, const SplitItem& item) {
  const Sequence seq(p, item, LayerIndex(p, item.batch_index));
  const Scratch scratch(p, item);
  LoadQueries<S>(seq, scratch);
  using KeyTile = Tile<kTileKeys>;
  ForTilesAndHeads<kTileKeys>(
      seq, [&](const KeyTile& tile, int64_t head, const KeyTile& next, int64_t next_head) {
        HeadTile<kTileKeys> keys;
        PrepareHead(seq, tile, head, keys);
        const char* next_k[kTileKeys];
        UpcomingKeys(seq, next, next_head, next_k);
        AttendHead<S>(seq, scratch, tile, head, keys, next_k);
      });
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

// ---- The split kernel with matrix instructions

#if defined(JAX_ATTN_HAS_TILES)

// Rows of a kv head from which on matrix instructions are faster.
constexpr int64_t kMinRowsForTiles = 3;

// Rows of values that are fetched while a block is scored; the others while scores become weights.
constexpr int64_t kFetchedDuringScores = kBlockKeys / 4 * 3;

bool FitsTiles(const SplitKvAttentionParams& p, const SplitItem& item) {
  constexpr int64_t kElements = kTileRowBytes / sizeof(uint16_t);
  return p.query_dtype == DType::kBFloat16 && p.key.dtype == DType::kBFloat16 &&
         p.value.dtype == DType::kBFloat16 && p.head_dim % kElements == 0 &&
         p.v_head_dim % kElements == 0 && item.rows.size() >= kMinRowsForTiles;
}

// Attends to blocks, one head at a time. Blocks that all rows see need no addresses of each key of
// each head.
template <int kSlots>
class BlockAttention {
 public:
  BlockAttention(const Sequence& seq, const Scratch& scratch) : seq_(seq), scratch_(scratch) {}

  void Attend(const uint32_t* queries, const Tile<kBlockKeys>& tile, int64_t head,
              const Tile<kBlockKeys>& next, int64_t next_head) {
    const SplitKvAttentionParams& p = seq_.p;
    HeadTile<kBlockKeys> of_head;
    const int64_t k_bytes = p.head_dim * sizeof(uint16_t);
    const int64_t v_bytes = p.v_head_dim * sizeof(uint16_t);
    int64_t k_offset = head * seq_.k.head_bytes, v_offset = head * seq_.v.head_bytes;
    const char *const *k = tile.k, *const *v = tile.v;
    if (SeenByAll(seq_, tile)) {
      if (head == seq_.item.head_begin) even_k_ = EvenGroups(k), even_v_ = EvenGroups(v);
    } else {
      PrepareHead(seq_, tile, head, of_head);
      k = of_head.k, v = of_head.v, k_offset = v_offset = 0;
      even_k_ = EvenGroups(k), even_v_ = EvenGroups(v);
    }

    TileRows rows[kKeyGroups];
    FindTileRows(k, k_offset, k_bytes, even_k_, copies_, rows);
    RowFetcher fetch_v(v, v_offset, v_bytes);
    ScoreRowsWithTiles(tiles_, scratch_.rows, queries, rows, p.head_dim, scratch_.s, fetch_v,
                       kFetchedDuringScores);
    const int64_t step = RowFetcher::Step(kBlockKeys - kFetchedDuringScores, scratch_.rows);
    for (int64_t row = 0; row < scratch_.rows; row += 2) {
      fetch_v.Advance(2 * step);
      if (row + 1 < scratch_.rows) {
        WeighRows<2>(seq_, scratch_, tile, head, of_head.seen, row);
      } else {
        WeighRows<1>(seq_, scratch_, tile, head, of_head.seen, row);
      }
    }

    const char* next_k[kBlockKeys];
    RowFetcher fetch_k(next.k, next_head * seq_.k.head_bytes, k_bytes);
    if (!SeenByAll(seq_, next)) {
      UpcomingKeys(seq_, next, next_head, next_k);
      fetch_k = RowFetcher(next_k, 0, k_bytes);
    }
    FindTileRows(v, v_offset, v_bytes, even_v_, copies_, rows);
    const RowStates state = scratch_.StateOf(seq_, head, 0);
    AccumulateRowsWithTiles(tiles_, scratch_.rows, scratch_.s, rows, p.v_head_dim, state.outputs,
                            state.stride, fetch_k, weights_);
  }

 private:
  const Sequence& seq_;
  const Scratch& scratch_;
  Tiles tiles_{WholeTiles()};
  EvenGroups even_k_, even_v_;
  PackedWeights<kSlots> weights_;
  RowCopies copies_;
};

// Returns false if something is NaN: a weight is two numbers here, and what each makes of an
// infinite value may be NaN where their sum is not.
bool SplitWithTiles(const SplitKvAttentionParams& p, const SplitItem& item) {
  using S = Storage<DType::kBFloat16>;
  const Sequence seq(p, item, LayerIndex(p, item.batch_index));
  const Scratch scratch(p, item);
  const RowGroups groups = QueryGroups(scratch.rows);
  const auto queries_of = [&](int64_t head) {
    return reinterpret_cast<uint32_t*>(scratch.q) +
           (head - item.head_begin) * groups.count * PackedQueries(p.head_dim);
  };
  const uint16_t* query =
      static_cast<const uint16_t*>(p.query) + p.query_batch.Offset(p.batch, item.batch_index);
  for (int64_t head = item.head_begin; head < item.head_end; ++head) {
    for (int64_t r = 0; r < scratch.rows; ++r) {
      const int64_t row = item.rows.begin + r;
      const int64_t index = seq.QueryOf(row) * p.num_q_heads + seq.HeadOf(head, row);
      PackQuery(groups, r, query + index * p.head_dim, p.head_dim, queries_of(head));
    }
  }
  const auto attend = [&](auto slots) {
    BlockAttention<slots> attention(seq, scratch);
    using KeyTile = Tile<kBlockKeys>;
    ForTilesAndHeads<kBlockKeys>(
        seq, [&](const KeyTile& tile, int64_t head, const KeyTile& next, int64_t next_head) {
          attention.Attend(queries_of(head), tile, head, next, next_head);
        });
  };
  if (scratch.rows <= 4) {
    attend(std::integral_constant<int, 4>());
  } else {
    attend(std::integral_constant<int, 8>());
  }
  I32 is_nan = {};
  const int64_t all_rows = scratch.rows * (item.head_end - item.head_begin);
  for (int64_t i = 0; i < all_rows * scratch.state.stride; i += kLanes) {
    const F32 output = Load(scratch.state.outputs + i);
    is_nan |= output != output;
  }
  if (Any(is_nan)) return false;
  FinishItem<S>(seq, scratch);
  return true;
}

void SplitKernelWithTiles(const SplitKvAttentionParams& p, const SplitItem& item) {
  if (!FitsTiles(p, item) || !SplitWithTiles(p, item)) SplitKernel(p, item);
}

#endif

// ---- The merge kernel

void MergeKernel(const SplitKvAttentionParams& p, const MergeItem& item) {
  const int64_t rows = item.rows.size(), partial_size = PartialSize(p.v_head_dim);
  for (int64_t row = 0; row < rows; ++row) {
    const float* first = item.partials + (item.head * rows + row) * partial_size;
    RowResult state;
    for (int64_t i = 0; i < item.num_splits; ++i) {
      const float top = first[i * item.partial_stride + p.v_head_dim];
      if (top > state.top || top != top) state.top = top;
    }
    float values[kMaxHeadDim];
    for (int64_t c = 0; c < p.v_head_dim; ++c) values[c] = 0;
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
#if defined(JAX_ATTN_HAS_TILES)
extern const SplitKvKernels kSplitKvTileKernels;
const SplitKvKernels kSplitKvTileKernels = {"amx", SplitKernelWithTiles, MergeKernel};
#endif
#define JAX_ATTN_STRING(x) #x
#define JAX_ATTN_NAME(x) JAX_ATTN_STRING(x)
const SplitKvKernels kSplitKvKernels = {JAX_ATTN_NAME(JAX_ATTN_TARGET), SplitKernel, MergeKernel};

}  // namespace jax_attn::cpu::JAX_ATTN_TARGET
