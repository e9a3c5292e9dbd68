// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The norm of the fused QKV pass: sums of squares, and the factors that follow from them.

#ifndef JAX_ATTN_CSRC_CPU_QKV_NORM_H_
#define JAX_ATTN_CSRC_CPU_QKV_NORM_H_

#include "simd.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {
namespace {

float SumSquaresOf(const float* x, int64_t n) {
  F32 sums[2] = {};
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    const F32 a = Load(x + i), b = Load(x + i + kLanes);
    sums[0] += a * a;
    sums[1] += b * b;
  }
  float sum = Sum(sums[0] + sums[1]);
  for (; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

void Normalize(float inverse, const float* weight, int64_t n, float* x) {
  if (weight == nullptr) {
    for (int64_t i = 0; i < n; i += kLanes) Store(x + i, Load(x + i) * inverse);
  } else {
    for (int64_t i = 0; i < n; i += kLanes) Store(x + i, Load(x + i) * inverse * Load(weight + i));
  }
}

// Heads whose mean squares are taken at once, so that their square roots do not wait for each
// other.
constexpr int64_t kHeadsAtOnce = kLanes < 8 ? kLanes : 8;

// Turns sums of `n` squares into factors.
void InverseRms(int64_t n, float epsilon, float* sums) {
  const float weight = 1.0f / static_cast<float>(n);
  for (int64_t i = 0; i < kHeadsAtOnce; ++i) {
    sums[i] = 1.0f / __builtin_sqrtf(sums[i] * weight + epsilon);
  }
}

}  // namespace
}  // namespace jax_attn::cpu::JAX_ATTN_TARGET

#endif  // JAX_ATTN_CSRC_CPU_QKV_NORM_H_
