// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Reads buffers into the operands of a problem, and keeps the first disagreement that it finds.

#ifndef JAX_ATTN_CSRC_FFI_OPERAND_READER_H_
#define JAX_ATTN_CSRC_FFI_OPERAND_READER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "../operands.h"
#include "check.h"

namespace jax_attn {

class OperandReader {
 public:
  OperandReader(std::string_view op, BatchShape& batch) : op_(op), batch_(batch) {}

  const std::string& error() const { return error_; }

  ffi::Error ToError() const {
    return error_.empty() ? ffi::Error::Success() : InvalidArgument(op_, error_);
  }

  void Fail(const std::string& what) {
    if (error_.empty()) error_ = what;
  }

  void Expect(std::string_view name, Dimensions dims, bool agrees, const std::string& expected) {
    if (!agrees) {
      Fail(std::string(name) + " has shape " + ToString(dims) + ", expected " + expected);
    }
  }

  void ExpectType(std::string_view name, ffi::AnyBuffer buffer, ffi::DataType expected) {
    if (buffer.element_type() != expected) {
      Fail(std::string(name) + " has an element type that is not expected");
    }
  }

  void ExpectInRange(const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) {
      Fail(std::string(name) + " is " + std::to_string(value) + ", expected " +
           std::to_string(low) + " to " + std::to_string(high));
    }
  }

  DType FloatingType(std::string_view name, ffi::AnyBuffer buffer) {
    const std::optional<DType> dtype = ToDType(buffer.element_type());
    if (!dtype) Fail(std::string(name) + " has an element type that is not supported");
    return dtype.value_or(DType::kFloat32);
  }

  // The first dimensions of a result, which has all of them, are those of the batch.
  void SetBatch(Dimensions dims, int64_t num_dims) {
    batch_.num_dims = static_cast<int>(num_dims);
    for (int64_t d = 0; d < num_dims; ++d) {
      batch_.sizes[d] = dims[d];
      batch_.count *= dims[d];
    }
  }

  // Strides of the batch dimensions of an operand whose last `core_rank` dimensions are its own.
  // `has_batch`: the op's batch dimension is among the others. They are aligned at the right;
  // vmap's may be 1 or absent, and so may the op's if `may_be_one`.
  BatchStrides ReadBatch(std::string_view name, Dimensions dims, int64_t core_rank, bool has_batch,
                         bool may_be_one = false) {
    BatchStrides batch;
    const int64_t rank = dims.size();
    int64_t stride = 1;
    for (int64_t d = rank - core_rank; d < rank; ++d) stride *= d < 0 ? 1 : dims[d];
    const int64_t last = batch_.num_dims - (has_batch ? 1 : 2);  // what the operand's last is
    const int64_t num_batch = rank - core_rank;
    if (num_batch < (has_batch ? 1 : 0) || num_batch > last + 1) {
      const int64_t least = core_rank + (has_batch ? 1 : 0), most = core_rank + last + 1;
      Expect(name, dims, false,
             std::to_string(least) + (least == most ? "" : " to " + std::to_string(most)) +
                 " dimensions");
      return batch;
    }
    for (int64_t i = 0; i < num_batch; ++i) {
      const int64_t size = dims[num_batch - 1 - i], target = last - i;
      const bool is_op_batch = has_batch && i == 0;
      const bool broadcasts = size == 1 && (!is_op_batch || may_be_one);
      if (size != batch_.sizes[target] && !broadcasts) {
        Expect(name, dims, false,
               "batch dimensions that agree with out: " + std::to_string(size) + " is not " +
                   std::to_string(batch_.sizes[target]));
      }
      batch.strides[target] = size == 1 ? 0 : stride;
      stride *= size;
    }
    return batch;
  }

  // A bias or a mask: [#B, #N, #T, S].
  void ReadRows(std::string_view name, ffi::AnyBuffer buffer, int64_t num_q_heads,
                int64_t query_len, int64_t kv_len, RowOperand& rows) {
    const Dimensions dims = buffer.dimensions();
    const int64_t rank = dims.size();
    const std::string expected = "[batch, " + std::to_string(num_q_heads) + ", " +
                                 std::to_string(query_len) + ", " + std::to_string(kv_len) +
                                 "], or 1 for the first three";
    if (rank < 4) return Expect(name, dims, false, expected);
    const int64_t heads = dims[rank - 3], queries = dims[rank - 2], keys = dims[rank - 1];
    Expect(name, dims,
           (heads == 1 || heads == num_q_heads) && (queries == 1 || queries == query_len) &&
               keys == kv_len,
           expected);
    rows.query_stride = queries == 1 ? 0 : keys;
    rows.head_stride = heads == 1 ? 0 : queries * keys;
    rows.batch = ReadBatch(name, dims, 3, true, /*may_be_one=*/true);
    rows.data = buffer.untyped_data();
  }

  void ReadBias(ffi::AnyBuffer buffer, int64_t num_q_heads, int64_t query_len, int64_t kv_len,
                RowOperand& rows) {
    rows.dtype = FloatingType("bias", buffer);
    if (SizeOf(rows.dtype) == 1) Fail("bias has an element type that is not supported");
    ReadRows("bias", buffer, num_q_heads, query_len, kv_len, rows);
  }

  // Calls visit(name, buffer) for the arguments that `names` lists, separated by commas.
  template <typename Visit>
  void ForEachOperand(std::string_view names, ffi::RemainingArgs rest, Visit visit) {
    size_t i = 0;
    for (; !names.empty(); ++i) {
      const std::string_view name = NextName(names);
      const ffi::ErrorOr<ffi::AnyBuffer> buffer =
          i < rest.size() ? rest.get<ffi::AnyBuffer>(i)
                          : ffi::Unexpected(InvalidArgument(op_, "missing"));
      if (!buffer.has_value()) return Fail(std::string(name) + " is missing");
      visit(name, buffer.value());
    }
    if (i != rest.size()) Fail("there are more arguments than names in `operands`");
  }

  // Whether a list of names separated by commas has one.
  static bool HasName(std::string_view names, std::string_view wanted) {
    while (!names.empty()) {
      if (NextName(names) == wanted) return true;
    }
    return false;
  }

  // Takes the first of a list of names separated by commas.
  static std::string_view NextName(std::string_view& names) {
    const size_t comma = names.find(',');
    const std::string_view name = names.substr(0, comma);
    names = comma == std::string_view::npos ? std::string_view() : names.substr(comma + 1);
    return name;
  }

 private:
  std::string_view op_;
  BatchShape& batch_;
  std::string error_;
};

}  // namespace jax_attn

#endif  // JAX_ATTN_CSRC_FFI_OPERAND_READER_H_
