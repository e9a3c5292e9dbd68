// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Elements as they are stored, and what they are worth. All stored formats are exact in float32,
// the 8-bit ones in 16 bits too.

#ifndef JAX_ATTN_CSRC_GPU_ELEMENTS_H_
#define JAX_ATTN_CSRC_GPU_ELEMENTS_H_

#include <cstdint>

#include "../dtype.h"
#include "wave.h"

namespace jax_attn::gpu {

JAX_ATTN_DEVICE float BitsFloat(uint32_t bits) { return __builtin_bit_cast(float, bits); }
JAX_ATTN_DEVICE uint32_t FloatBits(float x) { return __builtin_bit_cast(uint32_t, x); }

JAX_ATTN_DEVICE float FromBFloat16(uint32_t bits) { return BitsFloat(bits << 16); }

JAX_ATTN_DEVICE float FromFloat16(uint32_t bits) {
#if JAX_ATTN_NVIDIA
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
#else
  return static_cast<float>(__builtin_bit_cast(_Float16, static_cast<uint16_t>(bits)));
#endif
}

// Two floats rounded to nearest even in one word, `low` in the low half.
template <DType kDType>
JAX_ATTN_DEVICE uint32_t Pack(float low, float high) {
  static_assert(kDType == DType::kBFloat16 || kDType == DType::kFloat16);
#if JAX_ATTN_NVIDIA
  uint32_t packed;
  if constexpr (kDType == DType::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
#else
  using Element = std::conditional_t<kDType == DType::kBFloat16, __bf16, _Float16>;
  const uint16_t halves[2] = {__builtin_bit_cast(uint16_t, static_cast<Element>(low)),
                              __builtin_bit_cast(uint16_t, static_cast<Element>(high))};
  return halves[0] | static_cast<uint32_t>(halves[1]) << 16;
#endif
}

// The value of one stored byte, in the low bits of `code`.
template <DType kDType>
JAX_ATTN_DEVICE float FromByte(uint32_t code) {
  code &= 0xffu;
  if constexpr (kDType == DType::kInt8) {
    return static_cast<float>(static_cast<int8_t>(code));
  } else {
    const uint32_t sign = (code & 0x80u) << 24, magnitude = code & 0x7fu;
    if constexpr (kDType == DType::kFloat8E4M3FN || kDType == DType::kFloat8E4M3FNUZ) {
      constexpr bool kIsFn = kDType == DType::kFloat8E4M3FN;
      // The exponents of float16 have one bit more, and a bias larger by 15 - 7 or 15 - 8.
      const float x = FromFloat16(magnitude << 7) * (kIsFn ? 256.0f : 128.0f);
      const bool is_nan = kIsFn ? magnitude == 0x7fu : code == 0x80u;
      return is_nan ? BitsFloat(0x7fc00000u) : BitsFloat(FloatBits(x) | sign);
    } else {
      static_assert(kDType == DType::kFloat8E5M2);
      return FromFloat16(code << 8);
    }
  }
}

// Four stored bytes as two words of two 16-bit numbers each.
template <DType kFrom, DType kTo>
JAX_ATTN_DEVICE void Widen(uint32_t bytes, uint32_t& low, uint32_t& high) {
#if JAX_ATTN_NVIDIA
  if constexpr (kTo == DType::kFloat16 && kFrom == DType::kInt8) {
    // 0x6400 | n is 1024 + n; the codes are made unsigned by flipping their signs.
    const uint32_t codes = bytes ^ 0x80808080u;
    low = __byte_perm(codes, 0x64646464u, 0x4140);
    high = __byte_perm(codes, 0x64646464u, 0x4342);
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(low) : "r"(0x64806480u));  // 1024 + 128
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(high) : "r"(0x64806480u));
    return;
  } else if constexpr (kFrom == DType::kInt8) {
    // The same in float32, where 0x4b000000 | n is 2^23 + n.
    const uint32_t codes = bytes ^ 0x80808080u;
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = BitsFloat(__byte_perm(codes, 0x4b000000u, 0x7440 + i)) - 8388736.0f;
    }
    low = Pack<kTo>(x[0], x[1]);
    high = Pack<kTo>(x[2], x[3]);
    return;
  }
#if __CUDA_ARCH__ >= 890
  if constexpr (kFrom == DType::kFloat8E4M3FN || kFrom == DType::kFloat8E5M2) {
    // The instruction takes either half of a register, which a shift in C++ does not become.
    if constexpr (kFrom == DType::kFloat8E4M3FN) {
      asm("{\n"
          ".reg .b16 first, second;\n"
          "mov.b32 {first, second}, %2;\n"
          "cvt.rn.f16x2.e4m3x2 %0, first;\n"
          "cvt.rn.f16x2.e4m3x2 %1, second;\n"
          "}"
          : "=&r"(low), "=r"(high)
          : "r"(bytes));
    } else {
      asm("{\n"
          ".reg .b16 first, second;\n"
          "mov.b32 {first, second}, %2;\n"
          "cvt.rn.f16x2.e5m2x2 %0, first;\n"
          "cvt.rn.f16x2.e5m2x2 %1, second;\n"
          "}"
          : "=&r"(low), "=r"(high)
          : "r"(bytes));
    }
    if constexpr (kTo == DType::kBFloat16) {
      low = Pack<kTo>(FromFloat16(low & 0xffffu), FromFloat16(low >> 16));
      high = Pack<kTo>(FromFloat16(high & 0xffffu), FromFloat16(high >> 16));
    }
    return;
  }
#endif
#endif
  low = Pack<kTo>(FromByte<kFrom>(bytes), FromByte<kFrom>(bytes >> 8));
  high = Pack<kTo>(FromByte<kFrom>(bytes >> 16), FromByte<kFrom>(bytes >> 24));
}

#if JAX_ATTN_NVIDIA
// The same, but of bytes 0 and 2, and of bytes 1 and 3.
template <DType kFrom, DType kTo>
JAX_ATTN_DEVICE void WidenAcross(uint32_t bytes, uint32_t& low, uint32_t& high) {
  if constexpr (kTo == DType::kFloat16 && kFrom == DType::kInt8) {
    const uint32_t codes = bytes ^ 0x80808080u;
    low = __byte_perm(codes, 0x64646464u, 0x4240);
    high = __byte_perm(codes, 0x64646464u, 0x4341);
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(low) : "r"(0x64806480u));
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(high) : "r"(0x64806480u));
  } else {
    Widen<kFrom, kTo>(__byte_perm(bytes, 0, 0x3120), low, high);
  }
}
#endif

// What one stored word holds: 1 to 4 elements, as floats.
template <DType kDType>
JAX_ATTN_DEVICE void ToFloats(uint32_t word, float* x) {
  if constexpr (kDType == DType::kFloat32) {
    x[0] = BitsFloat(word);
  } else if constexpr (kDType == DType::kBFloat16) {
    x[0] = BitsFloat(word << 16);
    x[1] = BitsFloat(word & 0xffff0000u);
  } else if constexpr (kDType == DType::kFloat16) {
    x[0] = FromFloat16(word & 0xffffu);
    x[1] = FromFloat16(word >> 16);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = FromByte<kDType>(word >> (8 * i));
  }
}

// Floating-point arrays whose type is known at run time.
JAX_ATTN_DEVICE float LoadElement(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint32_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == DType::kBFloat16 ? FromBFloat16(bits) : FromFloat16(bits);
}

JAX_ATTN_DEVICE void StoreElement(void* data, DType dtype, int64_t i, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[i] = x;
  } else {
    const uint32_t packed =
        dtype == DType::kBFloat16 ? Pack<DType::kBFloat16>(x, 0) : Pack<DType::kFloat16>(x, 0);
    static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(packed);
  }
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_ELEMENTS_H_
