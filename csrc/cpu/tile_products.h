// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The inner loops of row_products.h with matrix instructions, for bfloat16 queries, keys and
// values: what the rows of a kv head cost then hardly depends on how many they are.

#ifndef JAX_ATTN_CSRC_CPU_TILE_PRODUCTS_H_
#define JAX_ATTN_CSRC_CPU_TILE_PRODUCTS_H_

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "matrix_tiles.h"
#include "simd.h"
#include "split_kv_kernel.h"

#if defined(JAX_ATTN_HAS_TILES)
namespace jax_attn::cpu::JAX_ATTN_TARGET {

static_assert(kLanes == kMaxTileRows && sizeof(F32) == kTileRowBytes && kTileKeys == 2 * kLanes,
              "a vector is a row of a tile, and two tiles hold the keys that are scored together");

// All tiles have the largest shape, so that each can serve for anything.
inline TileShapes WholeTiles() {
  TileShapes shapes;
  for (int tile = 0; tile < kNumTiles; ++tile) shapes.Set(tile, kMaxTileRows, kTileRowBytes);
  return shapes;
}

template <int kTile>
using TileNumber = std::integral_constant<int, kTile>;

// Rows cut into groups of at most `most`; the last begins earlier if it would have fewer than the
// others, so that all have as many.
struct RowGroups {
  int64_t rows, count, size;

  RowGroups(int64_t rows, int64_t most)
      : rows(rows), count((rows + most - 1) / most), size((rows + count - 1) / count) {}
  int64_t Begin(int64_t group) const { return group + 1 == count ? rows - size : group * size; }
  // Rows that the group before has already.
  int64_t Repeated(int64_t group) const { return group * size - Begin(group); }
};

// Queries are the columns of a tile; weights its rows, twice.
inline RowGroups QueryGroups(int64_t rows) { return RowGroups(rows, kMaxTileRows); }
inline RowGroups WeightGroups(int64_t rows) { return RowGroups(rows, kMaxTileRows / 2); }

// ---- Transposes

template <int kDistance, int... kLane>
inline void ExchangeBlocks(F32& a, F32& b, std::integer_sequence<int, kLane...>) {
  const F32 x = a, y = b;
  a = __builtin_shufflevector(x, y, (kLane & kDistance ? kLanes + (kLane ^ kDistance) : kLane)...);
  b = __builtin_shufflevector(x, y, (kLane & kDistance ? kLanes + kLane : kLane ^ kDistance)...);
}

// Transposes the blocks of kSize lanes that kSize vectors consist of.
template <int kSize, int kDistance = kSize / 2>
inline void TransposeBlocks(F32* v) {
  if constexpr (kDistance != 0) {
    JAX_ATTN_UNROLL
    for (int i = 0; i < kSize; ++i) {
      if ((i & kDistance) != 0) continue;
      ExchangeBlocks<kDistance>(v[i], v[i + kDistance], std::make_integer_sequence<int, kLanes>());
    }
    TransposeBlocks<kSize, kDistance / 2>(v);
  }
}

// Brings scores of 16 keys from [key][row], of 16 floats a key, to [row][kTileKeys].
inline void ScoresByRow(const float* by_key, int64_t num_rows, float* s) {
  F32 v[kLanes];
  if (num_rows <= kLanes / 2) {
    // Halves of two vectors side by side take half the exchanges.
    JAX_ATTN_UNROLL
    for (int i = 0; i < kLanes / 2; ++i) {
      memcpy(&v[i], by_key + i * kLanes, sizeof(F32) / 2);
      memcpy(reinterpret_cast<char*>(&v[i]) + sizeof(F32) / 2, by_key + (i + kLanes / 2) * kLanes,
             sizeof(F32) / 2);
    }
    TransposeBlocks<kLanes / 2>(v);
  } else {
    JAX_ATTN_UNROLL
    for (int i = 0; i < kLanes; ++i) v[i] = Load(by_key + i * kLanes);
    TransposeBlocks<kLanes>(v);
  }
  for (int64_t r = 0; r < num_rows; ++r) Store(s + r * kTileKeys, v[r]);
}

// ---- Queries times keys

// Words of a group's packed queries.
constexpr int64_t PackedQueries(int64_t head_dim) { return kMaxTileRows * head_dim / 2; }

// Packs a row as [group][tile of elements][pair of elements][row].
inline void PackQuery(const RowGroups& groups, int64_t row, const uint16_t* query, int64_t head_dim,
                      uint32_t* packed) {
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t column = row - groups.Begin(group);
    if (column < 0 || column >= groups.size) continue;
    uint32_t* to = packed + group * PackedQueries(head_dim) + column;
    for (int64_t pair = 0; pair < head_dim / 2; ++pair) {
      memcpy(to + pair * kMaxTileRows, query + 2 * pair, sizeof(uint32_t));
    }
  }
}

// 16 rows that tiles can be loaded from: where they are if they are evenly apart, or a copy.
struct TileRows {
  static constexpr int64_t kCopyStride = kMaxHeadDim * sizeof(uint16_t) + kTileRowBytes;
  const char* first;
  int64_t stride;

  TileRows(const char* const* rows, int64_t row_bytes, char* copy) {
    first = rows[0];
    stride = rows[1] - rows[0];
    bool even = true;
    for (int i = 2; i < kMaxTileRows; ++i) even &= rows[i] - rows[i - 1] == stride;
    if (even) return;
    first = copy;
    stride = kCopyStride;
    for (int i = 0; i < kMaxTileRows; ++i) memcpy(copy + i * stride, rows[i], row_bytes);
  }
};

// Fetches a line of each of kTileKeys rows into the second-level cache: rows at distances of powers
// of two have few places in the first.
__attribute__((always_inline)) inline void FetchLines(const char* const* rows, int64_t offset) {
  for (int j = 0; j < kTileKeys; ++j) __builtin_prefetch(rows[j] + offset, 0, 2);
}

// Scores all rows of a kv head against the keys of a tile: s[row][key]. `upcoming` has kTileKeys
// rows to fetch meanwhile.
inline void ScoreRowsWithTiles(Tiles& tiles, int64_t num_rows, const uint32_t* queries,
                               const char* const* keys, int64_t head_dim, float* s,
                               const char* const* upcoming) {
  alignas(64) char copy[2][kMaxTileRows * TileRows::kCopyStride];
  alignas(64) float scores[2][kMaxTileRows * kLanes];
  const RowGroups groups = QueryGroups(num_rows);
  const int64_t row_bytes = head_dim * sizeof(uint16_t);
  const TileRows first(keys, row_bytes, copy[0]);
  const TileRows second(keys + kMaxTileRows, row_bytes, copy[1]);
  for (int64_t group = 0; group < groups.count; ++group) {
    tiles.Clear<0>();
    tiles.Clear<1>();
    // Adds the products of 32 elements; what is loaded next goes to other tiles.
    const auto add = [&](int64_t offset, auto query, auto first_keys, auto second_keys) {
      tiles.Load<query>(queries, kTileRowBytes);
      queries += kMaxTileRows * kLanes;
      tiles.Load<first_keys>(first.first + offset, first.stride);
      tiles.AddProducts<0, first_keys, query>();
      tiles.Load<second_keys>(second.first + offset, second.stride);
      tiles.AddProducts<1, second_keys, query>();
      if (group != 0) return;
      FetchLines(upcoming, offset);
    };
    for (int64_t offset = 0; offset < row_bytes; offset += 2 * kTileRowBytes) {
      add(offset, TileNumber<2>(), TileNumber<4>(), TileNumber<5>());
      if (offset + kTileRowBytes == row_bytes) break;
      add(offset + kTileRowBytes, TileNumber<3>(), TileNumber<6>(), TileNumber<7>());
    }
    tiles.Store<0>(scores[0], kTileRowBytes);
    tiles.Store<1>(scores[1], kTileRowBytes);
    float* to = s + groups.Begin(group) * kTileKeys;
    ScoresByRow(scores[0], groups.size, to);
    ScoresByRow(scores[1], groups.size, to + kLanes);
  }
}

// ---- Weights times values

// Weights of a group of rows, for 16 keys. A weight is the sum of two bfloat16, so that it keeps 16
// bits: the first rows of a tile are the upper halves, the others what those leave.
//
// An instruction multiplies pairs of elements that are adjacent in a row of values. With 0 as every
// other weight it sums the even elements, or the odd ones, and values need not be rearranged.
struct PackedWeights {
  alignas(64) U32 even[kMaxTileRows];
  alignas(64) U32 odd[kMaxTileRows];

  PackedWeights(const RowGroups& groups, int64_t group, const float* s) {
    for (int64_t r = 0; r < kMaxTileRows / 2; ++r) {
      U32 upper{}, rest{};
      if (groups.Repeated(group) <= r && r < groups.size) {
        const F32 weights = Load(s + (groups.Begin(group) + r) * kTileKeys);
        upper = AsBits(weights) & 0xffff0000u;
        rest = RoundToBFloat16(weights - AsFloat(upper)) & 0xffff0000u;
      }
      even[r] = upper >> 16;
      odd[r] = upper;
      even[r + kMaxTileRows / 2] = rest >> 16;
      odd[r + kMaxTileRows / 2] = rest;
    }
  }
};

// Accumulates o[row] += sum over the keys of a tile of s[row][key] * v[key], for all rows. Elements
// of `o` are in the order of the storage. `upcoming` has kTileKeys rows to fetch meanwhile.
inline void AccumulateRowsWithTiles(Tiles& tiles, int64_t num_rows, const float* s,
                                    const char* const* values, int64_t v_head_dim, float* o,
                                    int64_t o_stride, const char* const* upcoming) {
  alignas(64) char copy[2][kMaxTileRows * TileRows::kCopyStride];
  alignas(64) float sums[2][2][kMaxTileRows * kLanes];
  const RowGroups groups = WeightGroups(num_rows);
  const int64_t row_bytes = v_head_dim * sizeof(uint16_t);
  const TileRows first(values, row_bytes, copy[0]);
  const TileRows second(values + kMaxTileRows, row_bytes, copy[1]);
  for (int64_t group = 0; group < groups.count; ++group) {
    const PackedWeights first_weights(groups, group, s);
    const PackedWeights second_weights(groups, group, s + kLanes);
    tiles.Load<0>(first_weights.even, kTileRowBytes);
    tiles.Load<1>(first_weights.odd, kTileRowBytes);
    tiles.Load<2>(second_weights.even, kTileRowBytes);
    tiles.Load<3>(second_weights.odd, kTileRowBytes);
    for (int64_t offset = 0; offset < row_bytes; offset += kTileRowBytes) {
      tiles.Clear<6>();
      tiles.Clear<7>();
      tiles.Load<4>(first.first + offset, first.stride);
      tiles.AddProducts<6, 0, 4>();
      tiles.AddProducts<7, 1, 4>();
      tiles.Load<5>(second.first + offset, second.stride);
      tiles.AddProducts<6, 2, 5>();
      tiles.AddProducts<7, 3, 5>();
      auto& sum = sums[offset / kTileRowBytes % 2];
      tiles.Store<6>(sum[0], kTileRowBytes);
      tiles.Store<7>(sum[1], kTileRowBytes);
      if (group == 0) {
        FetchLines(upcoming, offset);
      }
      // A row of bytes holds half as many elements of values as of outputs.
      float* to = o + groups.Begin(group) * o_stride + offset / sizeof(uint16_t);
      for (int64_t r = 0; r < groups.size; ++r, to += o_stride) {
        const float* even = sum[0] + r * kLanes;
        const float* odd = sum[1] + r * kLanes;
        constexpr int64_t kRest = kMaxTileRows / 2 * kLanes;
        Store(to, Load(to) + (Load(even) + Load(even + kRest)));
        Store(to + kLanes, Load(to + kLanes) + (Load(odd) + Load(odd + kRest)));
      }
    }
  }
}

}  // namespace jax_attn::cpu::JAX_ATTN_TARGET
#endif

#endif  // JAX_ATTN_CSRC_CPU_TILE_PRODUCTS_H_
