// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Element types of operands, independent of XLA and of the vendors.

#ifndef JAX_ATTN_CSRC_DTYPE_H_
#define JAX_ATTN_CSRC_DTYPE_H_

#include <cstdint>

namespace jax_attn {

enum class DType : uint8_t {
  kFloat32,
  kBFloat16,
  kFloat16,
  kInt8,
  kFloat8E4M3FN,
  kFloat8E4M3FNUZ,
  kFloat8E5M2,
};

inline constexpr DType kDTypes[] = {
    DType::kFloat32,      DType::kBFloat16,       DType::kFloat16,    DType::kInt8,
    DType::kFloat8E4M3FN, DType::kFloat8E4M3FNUZ, DType::kFloat8E5M2,
};

// Names as NumPy and JAX spell them.
constexpr const char* Name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kInt8:
      return "int8";
    case DType::kFloat8E4M3FN:
      return "float8_e4m3fn";
    case DType::kFloat8E4M3FNUZ:
      return "float8_e4m3fnuz";
    case DType::kFloat8E5M2:
      return "float8_e5m2";
  }
  return "unknown";
}

constexpr int64_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    default:
      return 1;
  }
}

}  // namespace jax_attn

#endif  // JAX_ATTN_CSRC_DTYPE_H_
