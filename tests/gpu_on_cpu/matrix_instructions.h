// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The matrix instructions of AMD GPUs: D = A B + C of 16x16 numbers, with the places of the numbers
// in lanes that AMD's manuals of the instruction sets give. Sums are in float32, in order.

#ifndef JAX_ATTN_TESTS_GPU_ON_CPU_MATRIX_INSTRUCTIONS_H_
#define JAX_ATTN_TESTS_GPU_ON_CPU_MATRIX_INSTRUCTIONS_H_

#include <cstdint>

#include "emulator.h"

namespace gpu_on_cpu {

#if defined(__GFX11__)
inline constexpr int kDepth = 16;  // both halves of the wave have all of A and B
inline int FirstDepth(int) { return 0; }
inline int ResultRow(int lane, int i) { return 2 * i + lane / 16; }
#else
inline constexpr int kDepth = 256 / kWave;
inline int FirstDepth(int lane) { return lane / 16 * kDepth; }
inline int ResultRow(int lane, int i) { return lane / 16 * kDepth + i; }
#endif
inline constexpr int kResults = 256 / kWave;

struct MatrixOperands {
  uint16_t a[kDepth];  // A[lane % 16][FirstDepth(lane) + i]
  uint16_t b[kDepth];  // B[FirstDepth(lane) + i][lane % 16]
  float c[kResults];   // C[ResultRow(lane, i)][lane % 16]
};

// Computes what the lanes of a wave brought, MatrixOperands, into their slots: float[kResults].
void MultiplyBFloat16(Slot* slots);
void MultiplyFloat16(Slot* slots);

template <bool kIsBFloat16, typename Factor, typename Sum>
Sum MatrixMultiplyAdd(const Factor& a, const Factor& b, const Sum& c) {
  MatrixOperands x;
  static_assert(sizeof(a) == sizeof(x.a) && sizeof(c) == sizeof(x.c));
  std::memcpy(x.a, &a, sizeof(a));
  std::memcpy(x.b, &b, sizeof(b));
  std::memcpy(x.c, &c, sizeof(c));
  const Slot* const all =
      Exchange(Operation::kMatrix, x, kIsBFloat16 ? MultiplyBFloat16 : MultiplyFloat16);
  return all[LaneIndex()].As<Sum>();
}

}  // namespace gpu_on_cpu

#if defined(__GFX9__)
#define __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(a, b, c, cbsz, abid, blgp) \
  gpu_on_cpu::MatrixMultiplyAdd<true>(a, b, c)
#define __builtin_amdgcn_mfma_f32_16x16x16f16(a, b, c, cbsz, abid, blgp) \
  gpu_on_cpu::MatrixMultiplyAdd<false>(a, b, c)
#elif defined(__GFX11__)
#define __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32 gpu_on_cpu::MatrixMultiplyAdd<true>
#define __builtin_amdgcn_wmma_f32_16x16x16_f16_w32 gpu_on_cpu::MatrixMultiplyAdd<false>
#else
#define __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12 gpu_on_cpu::MatrixMultiplyAdd<true>
#define __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12 gpu_on_cpu::MatrixMultiplyAdd<false>
#endif

#endif  // JAX_ATTN_TESTS_GPU_ON_CPU_MATRIX_INSTRUCTIONS_H_
