// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The inner loops of row_products.h with matrix instructions, for bfloat16 queries, keys and
// values: what the rows of a kv head cost then depends less on how many they are.

#ifndef JAX_ATTN_CSRC_CPU_TILE_PRODUCTS_H_
#define JAX_ATTN_CSRC_CPU_TILE_PRODUCTS_H_

#include <cstdint>
#include <cstring>
#include <utility>

#include "matrix_tiles.h"
#include "simd.h"
#include "split_kv_kernel.h"
#include "tile_rows.h"

#if defined(JAX_ATTN_HAS_TILES)
namespace jax_attn::cpu::JAX_ATTN_TARGET {

static_assert(kLanes == kMaxTileRows && sizeof(F32) == kTileRowBytes,
              "a vector is a row of a tile");

// All tiles have the largest shape, so that each can serve for anything. No more than four are
// used: a load into a tile waits until what used it has ended, unless the core has another to
// rename it to, and each that holds something is one less.
inline TileShapes WholeTiles() {
  TileShapes shapes;
  for (int tile = 0; tile < kNumTiles; ++tile) shapes.Set(tile, kMaxTileRows, kTileRowBytes);
  return shapes;
}

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

template <typename V, int... kLane>
inline auto Join(V a, V b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, kLane...);
}

typedef float HalfF32 __attribute__((vector_size(2 * kLanes)));
typedef float QuarterF32 __attribute__((vector_size(kLanes)));

// A vector of parts of kCount floats, `distance` apart.
template <int kCount>
inline F32 LoadParts(const float* from, int64_t distance) {
  constexpr std::make_integer_sequence<int, kLanes> kAll;
  if constexpr (kCount == kLanes) {
    return Load(from);
  } else if constexpr (kCount == kLanes / 2) {
    return Join(LoadAs<HalfF32>(from), LoadAs<HalfF32>(from + distance), kAll);
  } else {
    static_assert(kCount == kLanes / 4);
    constexpr std::make_integer_sequence<int, kLanes / 2> kHalf;
    const auto load = [&](int i) { return LoadAs<QuarterF32>(from + i * distance); };
    return Join(Join(load(0), load(1), kHalf), Join(load(2), load(3), kHalf), kAll);
  }
}

// Brings scores of 16 keys from [key][row], of 16 floats a key, to [row][kBlockKeys]. Where there
// are few rows, parts of several vectors side by side take fewer exchanges.
template <int kRows>
inline void ScoresByRow(const float* by_key, int64_t num_rows, float* s) {
  F32 v[kRows];
  JAX_ATTN_UNROLL
  for (int i = 0; i < kRows; ++i) v[i] = LoadParts<kRows>(by_key + i * kLanes, kRows * kLanes);
  TransposeBlocks<kRows>(v);
  for (int64_t r = 0; r < num_rows; ++r) Store(s + r * kBlockKeys, v[r]);
}

inline void ScoresByRow(const float* by_key, int64_t num_rows, float* s) {
  if (num_rows <= kLanes / 4) {
    ScoresByRow<kLanes / 4>(by_key, num_rows, s);
  } else if (num_rows <= kLanes / 2) {
    ScoresByRow<kLanes / 2>(by_key, num_rows, s);
  } else {
    ScoresByRow<kLanes>(by_key, num_rows, s);
  }
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

// Scores all rows of a kv head against the keys of a block: s[row][key]. Fetches some rows
// meanwhile.
inline void ScoreRowsWithTiles(Tiles& tiles, int64_t num_rows, const uint32_t* queries,
                               const TileRows* keys, int64_t head_dim, float* s,
                               RowFetcher& upcoming, int64_t num_upcoming) {
  alignas(64) float scores[kKeyGroups][kMaxTileRows * kLanes];
  const RowGroups groups = QueryGroups(num_rows);
  const int64_t row_bytes = head_dim * sizeof(uint16_t);
  const int64_t step =
      RowFetcher::Step(num_upcoming, groups.count * kKeyGroups * row_bytes / kTileRowBytes);
  for (int64_t group = 0; group < groups.count; ++group, queries += PackedQueries(head_dim)) {
    for (int g = 0; g < kKeyGroups; g += 2) {
      tiles.Clear<0>();
      tiles.Clear<1>();
      // Products of 32 elements with two groups of keys.
      for (int64_t offset = 0; offset < row_bytes; offset += kTileRowBytes) {
        tiles.Load<2>(queries + offset / kTileRowBytes * kMaxTileRows * kLanes, kTileRowBytes);
        tiles.Load<3>(keys[g].first + offset, keys[g].stride);
        tiles.AddProducts<0, 3, 2>();
        upcoming.Advance(step);
        tiles.Load<3>(keys[g + 1].first + offset, keys[g + 1].stride);
        tiles.AddProducts<1, 3, 2>();
        upcoming.Advance(step);
      }
      tiles.Store<0>(scores[g], kTileRowBytes);
      tiles.Store<1>(scores[g + 1], kTileRowBytes);
    }
    float* to = s + groups.Begin(group) * kBlockKeys;
    for (int g = 0; g < kKeyGroups; ++g) ScoresByRow(scores[g], groups.size, to + g * kLanes);
  }
}

// ---- Weights times values

// Weights of a group of rows, for 16 keys. A weight is the sum of two bfloat16, so that it keeps 16
// bits: the first rows of a tile are the upper halves, the others what those leave.
//
// An instruction multiplies pairs of elements that are adjacent in a row of values. With 0 as every
// other weight it sums the even elements, or the odd ones, and values need not be rearranged.
//
// So each row has four: for even and for odd elements, the upper half and the rest. With up to 4
// rows, kSlots, one tile has all of a group of keys; with up to 8, two.
template <int kSlots>
struct PackedWeights {
  static constexpr int kTiles = kSlots / 4;  // of a group of keys
  alignas(64) U32 rows[kKeyGroups][4 * kSlots] = {};

  // Rows [0, groups.size) of the group; other rows stay 0.
  void Pack(const RowGroups& groups, int64_t group, const float* s) {
    const int64_t repeated = groups.Repeated(group);
    for (int64_t r = 0; r < groups.size; ++r) {
      const float* row = s + (groups.Begin(group) + r) * kBlockKeys;
      JAX_ATTN_UNROLL
      for (int g = 0; g < kKeyGroups; ++g) {
        const F32 weights = r < repeated ? F32{} : Load(row + g * kLanes);
        const U32 upper = AsBits(weights) & 0xffff0000u;
        const U32 rest = RoundToBFloat16(weights - AsFloat(upper)) & 0xffff0000u;
        U32* to = rows[g] + r;
        to[0] = upper >> 16;
        to[kSlots] = rest >> 16;
        to[2 * kSlots] = upper;
        to[3 * kSlots] = rest;
      }
    }
  }
  const U32* Tile(int group, int tile) const { return rows[group] + tile * kMaxTileRows; }
};

// Adds what was summed for 32 elements of values, as [even or odd][upper half or rest][row], to
// `o`: the even elements come first.
template <int kSlots>
inline void AddSums(const float* sums, int64_t num_rows, float* o, int64_t o_stride) {
  constexpr int64_t kRest = kSlots * kLanes, kOdd = 2 * kRest;
  for (int64_t r = 0; r < num_rows; ++r, o += o_stride, sums += kLanes) {
    Store(o, Load(o) + (Load(sums) + Load(sums + kRest)));
    Store(o + kLanes, Load(o + kLanes) + (Load(sums + kOdd) + Load(sums + kOdd + kRest)));
  }
}

// Sums the products of a block's weights with elements of values from `offset` bytes on: 32 of them
// where weights have two tiles for each group of keys, else 64, or 32 if there are no more. Two
// tiles of sums, so that what is loaded serves both. Calls fetch() for each tile of values.
template <int kSlots, typename Fetch>
inline void SumValues(Tiles& tiles, const PackedWeights<kSlots>& weights, const TileRows* values,
                      int64_t offset, int64_t num_tiles, float* sums, const Fetch& fetch) {
  tiles.Clear<0>();
  tiles.Clear<1>();
  for (int g = 0; g < kKeyGroups; ++g) {
    const char* value = values[g].first + offset;
    if constexpr (PackedWeights<kSlots>::kTiles == 2) {
      tiles.Load<2>(value, values[g].stride);
      tiles.Load<3>(weights.Tile(g, 0), kTileRowBytes);
      tiles.AddProducts<0, 3, 2>();
      tiles.Load<3>(weights.Tile(g, 1), kTileRowBytes);
      tiles.AddProducts<1, 3, 2>();
    } else {
      tiles.Load<2>(weights.Tile(g, 0), kTileRowBytes);
      tiles.Load<3>(value, values[g].stride);
      tiles.AddProducts<0, 2, 3>();
      if (num_tiles == 2) {
        fetch();
        tiles.Load<3>(value + kTileRowBytes, values[g].stride);
        tiles.AddProducts<1, 2, 3>();
      }
    }
    fetch();
  }
  tiles.Store<0>(sums, kTileRowBytes);
  tiles.Store<1>(sums + kMaxTileRows * kLanes, kTileRowBytes);
}

// Accumulates o[row] += sum over the keys of a block of s[row][key] * v[key], for all rows, of
// which a group has at most kSlots. Elements of `o` are in the order of the storage. `weights`
// serves all calls with as many rows. Fetches the upcoming rows meanwhile.
template <int kSlots>
inline void AccumulateRowsWithTiles(Tiles& tiles, int64_t num_rows, const float* s,
                                    const TileRows* values, int64_t v_head_dim, float* o,
                                    int64_t o_stride, RowFetcher& upcoming,
                                    PackedWeights<kSlots>& weights) {
  // Two, so that one is added to `o` while the other is stored to.
  alignas(64) float sums[2][2 * kMaxTileRows * kLanes];
  const RowGroups groups = WeightGroups(num_rows);
  const int64_t row_bytes = v_head_dim * sizeof(uint16_t);
  const int64_t step =
      RowFetcher::Step(kBlockKeys, groups.count * kKeyGroups * row_bytes / kTileRowBytes);
  constexpr int64_t kMostTiles = 2 / PackedWeights<kSlots>::kTiles;
  for (int64_t group = 0; group < groups.count; ++group) {
    weights.Pack(groups, group, s);
    int turn = 0;
    for (int64_t offset = 0; offset < row_bytes; turn = 1 - turn) {
      const int64_t num_tiles = offset + kMostTiles * kTileRowBytes <= row_bytes ? kMostTiles : 1;
      SumValues<kSlots>(tiles, weights, values, offset, num_tiles, sums[turn],
                        [&] { upcoming.Advance(step); });
      for (int64_t tile = 0; tile < num_tiles; ++tile, offset += kTileRowBytes) {
        // A row of bytes holds half as many elements of values as of outputs.
        float* to = o + groups.Begin(group) * o_stride + offset / sizeof(uint16_t);
        AddSums<kSlots>(sums[turn] + tile * kMaxTileRows * kLanes, groups.size, to, o_stride);
      }
    }
  }
}

}  // namespace jax_attn::cpu::JAX_ATTN_TARGET
#endif

#endif  // JAX_ATTN_CSRC_CPU_TILE_PRODUCTS_H_
