// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Products by matrix instructions against the same in double precision: with tiles emulated, on any
// machine. The kernel's own results are rounded to bfloat16, and would hide a lost half of a
// weight.

#include "../../csrc/cpu/tile_products.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/math/convert.h"

namespace {

using namespace jax_attn;                        // NOLINT
using namespace jax_attn::cpu::JAX_ATTN_TARGET;  // NOLINT
using jax_attn::cpu::kBlockKeys;

std::mt19937 bits{0};

float Uniform(float low, float high) {
  return std::uniform_real_distribution<float>(low, high)(bits);
}

// Rows of bfloat16, evenly apart or not.
struct Rows {
  std::vector<uint16_t> elements;
  std::vector<const char*> rows;
  int64_t dim;

  Rows(int64_t count, int64_t dim, bool even) : elements(2 * count * dim), dim(dim) {
    for (uint16_t& x : elements) x = ToBFloat16(Uniform(-1, 1));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = even ? 2 * i : 2 * i + static_cast<int64_t>(bits() % 2);
      rows.push_back(reinterpret_cast<const char*>(elements.data() + at * dim));
    }
  }
  double At(int64_t row, int64_t i) const {
    return FromBFloat16(reinterpret_cast<const uint16_t*>(rows[row])[i]);
  }
};

// The rows of a block as the products take them.
struct Block {
  RowCopies copies;
  TileRows rows[kKeyGroups];

  explicit Block(const Rows& from) {
    FindTileRows(from.rows.data(), 0, from.dim * sizeof(uint16_t), EvenGroups(from.rows.data()),
                 copies, rows);
  }
};

double ScoreError(int64_t num_rows, int64_t dim, bool even) {
  const Rows queries(num_rows, dim, true), keys(kBlockKeys, dim, even);
  const RowGroups groups = QueryGroups(num_rows);
  std::vector<uint32_t> packed(groups.count * PackedQueries(dim));
  for (int64_t r = 0; r < num_rows; ++r) {
    PackQuery(groups, r, reinterpret_cast<const uint16_t*>(queries.rows[r]), dim, packed.data());
  }
  std::vector<float> s(num_rows * kBlockKeys);
  Tiles tiles(WholeTiles());
  const Block block(keys);
  RowFetcher fetcher(keys.rows.data(), 0, dim * sizeof(uint16_t));
  ScoreRowsWithTiles(tiles, num_rows, packed.data(), block.rows, dim, s.data(), fetcher,
                     kBlockKeys);
  double worst = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t j = 0; j < kBlockKeys; ++j) {
      double expected = 0;
      for (int64_t i = 0; i < dim; ++i) expected += queries.At(r, i) * keys.At(j, i);
      worst = std::fmax(worst, std::fabs(s[r * kBlockKeys + j] - expected));
    }
  }
  return worst;
}

template <int kSlots>
double SumError(int64_t num_rows, int64_t dim, bool even) {
  const Rows values(kBlockKeys, dim, even);
  const int64_t stride = dim + 32;
  std::vector<float> weights(num_rows * kBlockKeys), sums(num_rows * stride, 0.25f);
  for (float& weight : weights) weight = Uniform(0, 1.0f / kBlockKeys);
  Tiles tiles(WholeTiles());
  const Block block(values);
  RowFetcher fetcher(values.rows.data(), 0, dim * sizeof(uint16_t));
  PackedWeights<kSlots> packed;
  AccumulateRowsWithTiles(tiles, num_rows, weights.data(), block.rows, dim, sums.data(), stride,
                          fetcher, packed);
  double worst = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t i = 0; i < stride; ++i) {
      double expected = 0.25;
      // Of 32 elements the even ones come first, then the odd ones.
      const int64_t element = i / 32 * 32 + i % 16 * 2 + i / 16 % 2;
      for (int64_t j = 0; j < kBlockKeys && i < dim; ++j) {
        expected += static_cast<double>(weights[r * kBlockKeys + j]) * values.At(j, element);
      }
      worst = std::fmax(worst, std::fabs(sums[r * stride + i] - expected));
    }
  }
  return worst;
}

}  // namespace

int main() {
  double score_error = 0, sum_error = 0;
  for (int64_t rows = 1; rows <= 32; ++rows) {
    for (const int64_t dim : {32, 64, 160}) {
      for (const bool even : {true, false}) {
        score_error = std::fmax(score_error, ScoreError(rows, dim, even));
        sum_error = std::fmax(sum_error, SumError<8>(rows, dim, even));
        if (rows <= 4) sum_error = std::fmax(sum_error, SumError<4>(rows, dim, even));
      }
    }
  }
  std::printf("products: %.1e, sums: %.1e\n", score_error, sum_error);
  // Sums of up to 160 products, in float32; and weights of 16 bits, the sum of which is at most 1.
  return !(score_error < 1e-5 && sum_error < std::ldexp(1.0, -16));
}
