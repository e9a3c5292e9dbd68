// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Tiles: the registers of AMX that hold matrices of up to 16 rows of 64 bytes, and what is done
// with them. Defines JAX_ATTN_HAS_TILES where there are any.

#ifndef JAX_ATTN_CSRC_CPU_MATRIX_TILES_H_
#define JAX_ATTN_CSRC_CPU_MATRIX_TILES_H_

#include <cstdint>
#include <cstring>

#include "../math/convert.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {

inline constexpr int kNumTiles = 8;
inline constexpr int kMaxTileRows = 16;
inline constexpr int kTileRowBytes = 64;

// The shape of each tile, as the instruction reads it.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void Set(int tile, int64_t num_rows, int64_t num_row_bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = static_cast<uint16_t>(num_row_bytes);
  }
};
static_assert(sizeof(TileShapes) == 64);

#if defined(JAX_ATTN_EMULATE_TILES)
#define JAX_ATTN_HAS_TILES

// The same in memory, for tests on machines without tiles.
class Tiles {
 public:
  explicit Tiles(const TileShapes& shapes) : shapes_(shapes) {}

  template <int kTile>
  void Clear() {
    memset(rows_[kTile], 0, sizeof(rows_[kTile]));
  }
  template <int kTile>
  void Load(const void* from, int64_t stride) {
    for (int r = 0; r < shapes_.rows[kTile]; ++r) {
      memcpy(rows_[kTile][r], static_cast<const char*>(from) + r * stride,
             shapes_.row_bytes[kTile]);
    }
  }
  template <int kTile>
  void Store(void* to, int64_t stride) const {
    for (int r = 0; r < shapes_.rows[kTile]; ++r) {
      memcpy(static_cast<char*>(to) + r * stride, rows_[kTile][r], shapes_.row_bytes[kTile]);
    }
  }
  template <int kSum, int kLeft, int kRight>
  void AddProducts() {
    for (int r = 0; r < shapes_.rows[kSum]; ++r) {
      for (int c = 0; c < shapes_.row_bytes[kSum] / 4; ++c) {
        float sum = BitsFloat(rows_[kSum][r][c]);
        for (int i = 0; i < shapes_.row_bytes[kLeft] / 4; ++i) {
          const uint32_t left = rows_[kLeft][r][i], right = rows_[kRight][i][c];
          sum += BitsFloat(left << 16) * BitsFloat(right << 16);
          sum += BitsFloat(left & 0xffff0000u) * BitsFloat(right & 0xffff0000u);
        }
        rows_[kSum][r][c] = FloatBits(sum);
      }
    }
  }

 private:
  TileShapes shapes_;
  uint32_t rows_[kNumTiles][kMaxTileRows][kTileRowBytes / 4] = {};
};

#elif defined(__AVX512F__)
#define JAX_ATTN_HAS_TILES

// The tiles of this thread. Nothing else may use them meanwhile; afterwards they are empty, so that
// switching threads does not save them.
//
// The instructions are written out: the compilers' names for them want literal tile numbers.
class Tiles {
 public:
  explicit Tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile>
  void Clear() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  // Loads rows that are `stride` bytes apart.
  template <int kTile>
  void Load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  void Store(void* to, int64_t stride) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  // Adds left[r][2i] * right[i][2c] + left[r][2i + 1] * right[i][2c + 1], of bfloat16 elements,
  // over all i to the float sum[r][c].
  template <int kSum, int kLeft, int kRight>
  void AddProducts() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
  }
};
#endif

}  // namespace jax_attn::cpu::JAX_ATTN_TARGET

#endif  // JAX_ATTN_CSRC_CPU_MATRIX_TILES_H_
