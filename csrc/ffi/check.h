// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Agreement checks of the buffers that a handler is given, and the wording of their errors.

#ifndef JAX_ATTN_CSRC_FFI_CHECK_H_
#define JAX_ATTN_CSRC_FFI_CHECK_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "../dtype.h"
#include "xla/ffi/api/ffi.h"

namespace jax_attn {

namespace ffi = ::xla::ffi;

using Dimensions = ffi::AnyBuffer::Dimensions;

inline std::string ToString(Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(dims[i]);
  }
  return text + "]";
}

inline std::string ToString(std::string_view text) { return std::string(text); }
inline std::string ToString(int64_t number) { return std::to_string(number); }

inline ffi::Error InvalidArgument(std::string_view op, const std::string& what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string(op) + ": " + what);
}

inline std::optional<DType> ToDType(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32:
      return DType::kFloat32;
    case ffi::DataType::BF16:
      return DType::kBFloat16;
    case ffi::DataType::F16:
      return DType::kFloat16;
    case ffi::DataType::S8:
      return DType::kInt8;
    case ffi::DataType::F8E4M3FN:
      return DType::kFloat8E4M3FN;
    case ffi::DataType::F8E4M3FNUZ:
      return DType::kFloat8E4M3FNUZ;
    case ffi::DataType::F8E5M2:
      return DType::kFloat8E5M2;
    default:
      return std::nullopt;
  }
}

}  // namespace jax_attn

#endif  // JAX_ATTN_CSRC_FFI_CHECK_H_
