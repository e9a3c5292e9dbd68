// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Conversions between float and 16-bit formats, rounding to nearest even.

#ifndef JAX_ATTN_CSRC_MATH_CONVERT_H_
#define JAX_ATTN_CSRC_MATH_CONVERT_H_

#include <cstdint>
#include <cstring>

namespace jax_attn {

inline uint32_t FloatBits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float BitsFloat(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float FromBFloat16(uint16_t x) { return BitsFloat(static_cast<uint32_t>(x) << 16); }

inline uint16_t ToBFloat16(float x) {
  const uint32_t bits = FloatBits(x);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float FromFloat16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t magnitude = x & 0x7fffu;
  if (magnitude >= 0x7c00u) return BitsFloat(sign | 0x7f800000u | (magnitude << 13));
  if (magnitude >= 0x0400u) return BitsFloat(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  return BitsFloat(sign | FloatBits(subnormal));
}

inline uint16_t ToFloat16(float x) {
  const uint32_t bits = FloatBits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Below 2^-14 a float16 counts in steps of 2^-24: adding 0.5 puts that step in the last bit.
    return sign | static_cast<uint16_t>(FloatBits(BitsFloat(magnitude) + 0.5f) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
}

}  // namespace jax_attn

#endif  // JAX_ATTN_CSRC_MATH_CONVERT_H_
