// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// From floats to 8-bit formats: rounding to nearest even, saturating. NaN stays NaN, or is 0 in
// int8.

#ifndef JAX_ATTN_CSRC_GPU_ENCODE_H_
#define JAX_ATTN_CSRC_GPU_ENCODE_H_

#include <cstdint>

#include "elements.h"

namespace jax_attn::gpu {

// The largest finite number of a quantised format.
constexpr float LargestOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat8E4M3FN:
      return 448.0f;
    case DType::kFloat8E4M3FNUZ:
      return 240.0f;
    case DType::kFloat8E5M2:
      return 57344.0f;
    default:
      return 127.0f;
  }
}

template <int kExponentBits, int kMantissaBits, int kBias, uint32_t kNan, bool kNegativeZero>
JAX_ATTN_DEVICE uint32_t ToFloat8(float x, float largest) {
  const uint32_t sign = FloatBits(x) >> 31 << 7;
  const float magnitude = BitsFloat(FloatBits(x) & 0x7fffffffu);
  const float clipped = magnitude > largest ? largest : magnitude;
  const uint32_t bits = FloatBits(clipped);
  // Rounded in place, a carry goes on into the exponent, whose bias is changed after.
  constexpr int kDropped = 23 - kMantissaBits;
  const uint32_t odd = (bits >> kDropped) & 1u;
  const uint32_t rounded = (bits + (1u << (kDropped - 1)) - 1u + odd) >> kDropped;
  const uint32_t normal = rounded - (static_cast<uint32_t>(127 - kBias) << kMantissaBits);
  // Below the normal numbers the format counts in steps: adding a power of two whose last bit is
  // worth a step leaves the count in the low bits.
  constexpr uint32_t kStep = static_cast<uint32_t>(127 + 24 - kBias - kMantissaBits) << 23;
  const uint32_t subnormal = FloatBits(clipped + BitsFloat(kStep)) - kStep;
  constexpr uint32_t kLeastNormal = static_cast<uint32_t>(127 + 1 - kBias) << 23;
  const uint32_t code = bits < kLeastNormal ? subnormal : normal;
  if (x != x) return kNan;
  return kNegativeZero || code != 0 ? code | sign : 0;
}

// The code of a float, in the low byte.
template <DType kDType>
JAX_ATTN_DEVICE uint32_t ToByte(float x) {
  constexpr float kLargest = LargestOf(kDType);
  if constexpr (kDType == DType::kInt8) {
    const float number = x == x ? x : 0.0f;
    const float above = number < -128.0f ? -128.0f : number;
    const float clipped = above > kLargest ? kLargest : above;
    return FloatBits(clipped + 12582912.0f) & 0xffu;  // 1.5 * 2^23 leaves the integer in low bits
  } else if constexpr (kDType == DType::kFloat8E4M3FN) {
    return ToFloat8<4, 3, 7, 0x7f, true>(x, kLargest);
  } else if constexpr (kDType == DType::kFloat8E4M3FNUZ) {
    return ToFloat8<4, 3, 8, 0x80, false>(x, kLargest);
  } else {
    static_assert(kDType == DType::kFloat8E5M2);
    return ToFloat8<5, 2, 15, 0x7e, true>(x, kLargest);
  }
}

// The codes of four floats, the first in the low byte.
template <DType kDType>
JAX_ATTN_DEVICE uint32_t ToBytes(const float* x) {
#if JAX_ATTN_NVIDIA && __CUDA_ARCH__ >= 890
  if constexpr (kDType == DType::kFloat8E4M3FN || kDType == DType::kFloat8E5M2) {
    uint16_t pairs[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kDType == DType::kFloat8E4M3FN) {
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
            : "=h"(pairs[i])
            : "f"(x[2 * i + 1]), "f"(x[2 * i]));
      } else {
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;"
            : "=h"(pairs[i])
            : "f"(x[2 * i + 1]), "f"(x[2 * i]));
      }
    }
    return pairs[0] | static_cast<uint32_t>(pairs[1]) << 16;
  }
#endif
  return ToByte<kDType>(x[0]) | ToByte<kDType>(x[1]) << 8 | ToByte<kDType>(x[2]) << 16 |
         ToByte<kDType>(x[3]) << 24;
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_ENCODE_H_
