// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// What readers of a call's buffers have in common: they keep the first disagreement they find.

#ifndef JAX_ATTN_CSRC_FFI_BUFFER_READER_H_
#define JAX_ATTN_CSRC_FFI_BUFFER_READER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "../operands.h"
#include "check.h"

namespace jax_attn {

class BufferReader {
 protected:
  bool failed() const { return !error_.empty(); }

  ffi::Error Status(std::string_view op) const {
    return failed() ? InvalidArgument(op, error_) : ffi::Error::Success();
  }

  void Fail(const std::string& what) {
    if (error_.empty()) error_ = what;
  }

  // What is expected is said in parts, which are joined only if needed: a call may take less time
  // than making texts.
  template <typename... Parts>
  void Expect(std::string_view name, Dimensions dims, bool agrees, const Parts&... expected) {
    if (agrees || failed()) return;
    std::string what = std::string(name) + " has shape " + ToString(dims) + ", expected ";
    ((what += ToString(expected)), ...);
    Fail(what);
  }

  void ExpectType(std::string_view name, ffi::AnyBuffer buffer, ffi::DataType expected) {
    if (buffer.element_type() != expected) {
      Fail(std::string(name) + " has an element type that is not expected");
    }
  }

  void ExpectRange(const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) {
      Fail(std::string(name) + " is " + std::to_string(value) + ", expected " +
           std::to_string(low) + " to " + std::to_string(high));
    }
  }

  DType TypeOf(std::string_view name, ffi::AnyBuffer buffer) {
    const std::optional<DType> dtype = ToDType(buffer.element_type());
    if (!dtype) Fail(std::string(name) + " has an element type that is not supported");
    return dtype.value_or(DType::kFloat32);
  }

  // float32, bfloat16 or float16.
  DType FloatType(std::string_view name, ffi::AnyBuffer buffer) {
    const DType dtype = TypeOf(name, buffer);
    if (SizeOf(dtype) == 1) Fail(std::string(name) + " has an element type that is not supported");
    return dtype;
  }

  // Strides of the dimensions of vmap in front of the last `core_rank` ones, aligned at the right
  // with those of the call; they may be 1 or absent.
  BatchStrides ReadBatch(std::string_view name, Dimensions dims, int64_t core_rank,
                         const BatchShape& shape) {
    BatchStrides batch;
    const int64_t num_batch = static_cast<int64_t>(dims.size()) - core_rank;
    if (num_batch < 0 || num_batch > shape.num_dims) {
      Expect(name, dims, false, core_rank, " to ", core_rank + shape.num_dims, " dimensions");
      return batch;
    }
    int64_t stride = 1;
    for (int64_t d = num_batch; d < num_batch + core_rank; ++d) stride *= dims[d];
    for (int64_t i = 1; i <= num_batch; ++i) {
      const int64_t size = dims[num_batch - i], target = shape.num_dims - i;
      Expect(name, dims, size == 1 || size == shape.sizes[target],
             "dimensions of vmap that agree with the results: ", size, " is not ",
             shape.sizes[target]);
      batch.strides[target] = size == 1 ? 0 : stride;
      stride *= size;
    }
    return batch;
  }

  // Takes the first of a list of names separated by commas.
  static std::string_view NextName(std::string_view& names) {
    const size_t comma = names.find(',');
    const std::string_view name = names.substr(0, comma);
    names = comma == std::string_view::npos ? std::string_view() : names.substr(comma + 1);
    return name;
  }

  // Whether a list of names separated by commas has one.
  static bool HasName(std::string_view names, std::string_view wanted) {
    while (!names.empty()) {
      if (NextName(names) == wanted) return true;
    }
    return false;
  }

  // Calls visit(name, buffer) for the arguments that `names` names.
  template <typename Visit>
  void ForEachOperand(std::string_view names, ffi::RemainingArgs rest, Visit visit) {
    size_t i = 0;
    for (; !names.empty(); ++i) {
      const std::string_view name = NextName(names);
      if (i >= rest.size()) return Fail(std::string(name) + " is missing");
      const ffi::ErrorOr<ffi::AnyBuffer> buffer = rest.get<ffi::AnyBuffer>(i);
      if (!buffer.has_value()) return Fail(std::string(name) + " is missing");
      visit(name, buffer.value());
    }
    if (i != rest.size()) Fail("there are more arguments than names in `operands`");
  }

 private:
  std::string error_;
};

}  // namespace jax_attn

#endif  // JAX_ATTN_CSRC_FFI_BUFFER_READER_H_
