// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "matrix_instructions.h"

#include <cstring>

namespace gpu_on_cpu {
namespace {

float FromBFloat16(uint16_t bits) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}
float FromFloat16(uint16_t bits) { return static_cast<float>(__builtin_bit_cast(_Float16, bits)); }

template <float (*kWiden)(uint16_t)>
void Multiply(Slot* slots) {
  float a[16][16], b[16][16], sums[16][16];
  for (int lane = 0; lane < static_cast<int>(kWave); ++lane) {
    const MatrixOperands x = slots[lane].As<MatrixOperands>();
    for (int i = 0; i < kDepth; ++i) {
      const int k = FirstDepth(lane) + i;
      const float from_a = kWiden(x.a[i]), from_b = kWiden(x.b[i]);
      if (kDepth == 16 && lane >= 16) {
        const MatrixOperands first = slots[lane - 16].As<MatrixOperands>();
        if (first.a[i] != x.a[i] || first.b[i] != x.b[i]) {
          Fail("the halves of a wave have different factors");
        }
      }
      a[lane % 16][k] = from_a;
      b[k][lane % 16] = from_b;
    }
    for (int i = 0; i < kResults; ++i) sums[ResultRow(lane, i)][lane % 16] = x.c[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 16; ++column) sums[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < static_cast<int>(kWave); ++lane) {
    float results[kResults];
    for (int i = 0; i < kResults; ++i) results[i] = sums[ResultRow(lane, i)][lane % 16];
    std::memcpy(slots[lane].bytes, results, sizeof(results));
  }
}

}  // namespace

void MultiplyBFloat16(Slot* slots) { Multiply<FromBFloat16>(slots); }
void MultiplyFloat16(Slot* slots) { Multiply<FromFloat16>(slots); }

}  // namespace gpu_on_cpu
