// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The inner loops of row_products.h with matrix instructions, for bfloat16 queries, keys and
// values: what the rows of a kv head cost then depends less on how many they are.

#ifndef JAX_ATTN_CSRC_CPU_TILE_PRODUCTS_H_
#define JAX_ATTN_CSRC_CPU_TILE_PRODUCTS_H_

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "matrix_tiles.h"
#include "simd.h"
#include "split_kv_kernel.h"
#include "tile_rows.h"

#if defined(JAX_ATTN_HAS_TILES)
namespace jax_attn::cpu::JAX_ATTN_TARGET {

static_assert(kLanes == kMaxTileRows && sizeof(F32) == kTileRowBytes,
              "a vector is a row of a tile");

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
// meanwhile. A tile is loaded again as late as there are tiles for: a core whose other thread is
// busy too has no others to rename it to.
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
      // Adds the products of 32 elements of two groups of keys.
      const auto add = [&](int64_t offset, auto query, auto first_keys, auto second_keys) {
        tiles.Load<query>(queries + offset / kTileRowBytes * kMaxTileRows * kLanes, kTileRowBytes);
        tiles.Load<first_keys>(keys[g].first + offset, keys[g].stride);
        tiles.AddProducts<0, first_keys, query>();
        upcoming.Advance(step);
        tiles.Load<second_keys>(keys[g + 1].first + offset, keys[g + 1].stride);
        tiles.AddProducts<1, second_keys, query>();
        upcoming.Advance(step);
      };
      for (int64_t offset = 0; offset < row_bytes; offset += 2 * kTileRowBytes) {
        add(offset, TileNumber<2>(), TileNumber<4>(), TileNumber<5>());
        if (offset + kTileRowBytes == row_bytes) break;
        add(offset + kTileRowBytes, TileNumber<3>(), TileNumber<6>(), TileNumber<7>());
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
  // One of four tiles that are used together.
  const U32* Tile(int first_group, int tile) const {
    return rows[first_group] + tile * kMaxTileRows;
  }
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

// Sums the products of four tiles of weights, 0 to 3, with 32 elements of values, `offset` bytes
// on. Calls fetch() for each tile of values.
template <int kSlots, int kSum, typename Fetch>
inline void SumValues(Tiles& tiles, const TileRows* values, int64_t offset, float* sums,
                      const Fetch& fetch) {
  tiles.Clear<kSum>();
  tiles.Load<6>(values[0].first + offset, values[0].stride);
  tiles.AddProducts<kSum, 0, 6>();
  if constexpr (kSlots == 8) {
    tiles.Clear<5>();
    tiles.AddProducts<5, 1, 6>();
  }
  fetch();
  tiles.Load<7>(values[1].first + offset, values[1].stride);
  if constexpr (kSlots == 8) {
    tiles.AddProducts<kSum, 2, 7>();
    tiles.AddProducts<5, 3, 7>();
    fetch();
    tiles.Store<5>(sums + kMaxTileRows * kLanes, kTileRowBytes);
  } else {
    tiles.AddProducts<kSum, 1, 7>();
    fetch();
    tiles.Load<6>(values[2].first + offset, values[2].stride);
    tiles.AddProducts<kSum, 2, 6>();
    fetch();
    tiles.Load<7>(values[3].first + offset, values[3].stride);
    tiles.AddProducts<kSum, 3, 7>();
    fetch();
  }
  tiles.Store<kSum>(sums, kTileRowBytes);
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
  alignas(64) float sums[2][4 * kSlots * kLanes];
  constexpr int kGroups = kKeyGroups / PackedWeights<kSlots>::kTiles;
  const RowGroups groups = WeightGroups(num_rows);
  const int64_t row_bytes = v_head_dim * sizeof(uint16_t);
  const int64_t step =
      RowFetcher::Step(kBlockKeys, groups.count * kKeyGroups * row_bytes / kTileRowBytes);
  for (int64_t group = 0; group < groups.count; ++group) {
    weights.Pack(groups, group, s);
    for (int first = 0; first < kKeyGroups; first += kGroups) {
      tiles.Load<0>(weights.Tile(first, 0), kTileRowBytes);
      tiles.Load<1>(weights.Tile(first, 1), kTileRowBytes);
      tiles.Load<2>(weights.Tile(first, 2), kTileRowBytes);
      tiles.Load<3>(weights.Tile(first, 3), kTileRowBytes);
      const auto accumulate = [&](int64_t offset, auto sum, float* sums) {
        SumValues<kSlots, sum>(tiles, values + first, offset, sums,
                               [&] { upcoming.Advance(step); });
        // A row of bytes holds half as many elements of values as of outputs.
        float* to = o + groups.Begin(group) * o_stride + offset / sizeof(uint16_t);
        AddSums<kSlots>(sums, groups.size, to, o_stride);
      };
      for (int64_t offset = 0; offset < row_bytes; offset += 2 * kTileRowBytes) {
        accumulate(offset, TileNumber<4>(), sums[0]);
        if (offset + kTileRowBytes == row_bytes) break;
        accumulate(offset + kTileRowBytes, TileNumber<(kSlots == 4 ? 5 : 4)>(), sums[1]);
      }
    }
  }
}

}  // namespace jax_attn::cpu::JAX_ATTN_TARGET
#endif

#endif  // JAX_ATTN_CSRC_CPU_TILE_PRODUCTS_H_
