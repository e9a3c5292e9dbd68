// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Where the keys and values that matrix instructions work on are, in memory that tiles can be
// loaded from.

#ifndef JAX_ATTN_CSRC_CPU_TILE_ROWS_H_
#define JAX_ATTN_CSRC_CPU_TILE_ROWS_H_

#include <cstdint>
#include <cstring>

#include "kv_tile.h"
#include "matrix_tiles.h"
#include "split_kv_kernel.h"

#if defined(JAX_ATTN_HAS_TILES)
namespace jax_attn::cpu::JAX_ATTN_TARGET {

// Keys of a block come in groups, a tile each.
inline constexpr int kKeyGroups = kBlockKeys / kMaxTileRows;
static_assert(kBlockKeys == 4 * kMaxTileRows, "scores of a block have four tiles");

// The rows of one group, evenly apart.
struct TileRows {
  const char* first;
  int64_t stride;
};

// Room for copies of a block's rows that are not.
struct RowCopies {
  // Not a power of two: such rows would share few places in the cache.
  static constexpr int64_t kStride = kMaxHeadDim * sizeof(uint16_t) + kTileRowBytes;
  alignas(64) char data[kBlockKeys * kStride];
};

// Whether the rows of each group are evenly apart.
struct EvenGroups {
  bool even[kKeyGroups] = {};

  EvenGroups() = default;
  explicit EvenGroups(const char* const* rows) {
    for (int g = 0; g < kKeyGroups; ++g) {
      const char* const* row = rows + g * kMaxTileRows;
      const uintptr_t stride = Address(row[1]) - Address(row[0]);
      uintptr_t differences = 0;
      for (int i = 2; i < kMaxTileRows; ++i) {
        differences |= (Address(row[i]) - Address(row[i - 1])) ^ stride;
      }
      even[g] = differences == 0;
    }
  }
  static uintptr_t Address(const char* row) { return reinterpret_cast<uintptr_t>(row); }
};

// The rows of a block, `offset` bytes on, each of `row_bytes`: where they are, or in `copies`.
inline void FindTileRows(const char* const* rows, int64_t offset, int64_t row_bytes,
                         const EvenGroups& groups, RowCopies& copies, TileRows* out) {
  for (int g = 0; g < kKeyGroups; ++g) {
    const char* const* row = rows + g * kMaxTileRows;
    if (groups.even[g]) {
      out[g] = {row[0] + offset, row[1] - row[0]};
      continue;
    }
    char* copy = copies.data + g * kMaxTileRows * RowCopies::kStride;
    out[g] = {copy, RowCopies::kStride};
    for (int i = 0; i < kMaxTileRows; ++i) {
      memcpy(copy + i * RowCopies::kStride, row[i] + offset, row_bytes);
    }
  }
}

// Fetches the rows of a block that come next, `offset` bytes on, into the cache: some at a time,
// while others are computed with, so that memory is never idle. Whole rows, so that the machine
// sees a stream.
class RowFetcher {
 public:
  RowFetcher(const char* const* rows, int64_t offset, int64_t row_bytes)
      : row_(rows), begin_(rows), offset_(offset), row_bytes_(row_bytes) {}

  // How far each of `count` calls of Advance() goes for `rows` rows in all.
  static int64_t Step(int64_t rows, int64_t count) {
    return ((rows << kShift) + count - 1) / count;
  }
  // Inlined by force: GCC drops calls of a function that has no effect but a prefetch.
  __attribute__((always_inline)) inline void Advance(int64_t step) {
    position_ += step;
    int64_t rows = position_ >> kShift;
    if (rows > kBlockKeys) rows = kBlockKeys;
    for (const char* const* end = begin_ + rows; row_ < end; ++row_) {
      const char* line = *row_ + offset_;
      const char* const row_end = line + row_bytes_;
      // Four lines at a time: deciding about each would take as long as asking for it.
      for (; line + 4 * kTileRowBytes <= row_end; line += 4 * kTileRowBytes) {
        for (int i = 0; i < 4; ++i) __builtin_prefetch(line + i * kTileRowBytes, 0, kLevel);
      }
      for (; line < row_end; line += kTileRowBytes) __builtin_prefetch(line, 0, kLevel);
    }
  }

 private:
  static constexpr int kShift = 16;
  // The second-level cache: rows that are a power of two apart share few places of the first, and
  // would be gone before they are used.
  static constexpr int kLevel = 2;
  const char* const* row_;
  const char* const* begin_;
  int64_t offset_, row_bytes_;
  int64_t position_ = 0;
};

}  // namespace jax_attn::cpu::JAX_ATTN_TARGET
#endif

#endif  // JAX_ATTN_CSRC_CPU_TILE_ROWS_H_
