// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Reads buffers into the operands of an attention problem, whose batch is a dimension of its own.

#ifndef JAX_ATTN_CSRC_FFI_OPERAND_READER_H_
#define JAX_ATTN_CSRC_FFI_OPERAND_READER_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "../operands.h"
#include "buffer_reader.h"

namespace jax_attn {

class OperandReader : public BufferReader {
 public:
  OperandReader(std::string_view op, BatchShape& batch) : op_(op), batch_(batch) {}

  ffi::Error ToError() const { return Status(op_); }

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
    const auto expect = [&](bool agrees) {
      Expect(name, dims, agrees, "[batch, ", num_q_heads, ", ", query_len, ", ", kv_len,
             "], or 1 for the first three");
    };
    if (rank < 4) return expect(false);
    const int64_t heads = dims[rank - 3], queries = dims[rank - 2], keys = dims[rank - 1];
    expect((heads == 1 || heads == num_q_heads) && (queries == 1 || queries == query_len) &&
           keys == kv_len);
    rows.query_stride = queries == 1 ? 0 : keys;
    rows.head_stride = heads == 1 ? 0 : queries * keys;
    rows.batch = ReadBatch(name, dims, 3, true, /*may_be_one=*/true);
    rows.data = buffer.untyped_data();
  }

  void ReadBias(ffi::AnyBuffer buffer, int64_t num_q_heads, int64_t query_len, int64_t kv_len,
                RowOperand& rows) {
    rows.dtype = FloatType("bias", buffer);
    ReadRows("bias", buffer, num_q_heads, query_len, kv_len, rows);
  }

 private:
  std::string_view op_;
  BatchShape& batch_;
};

}  // namespace jax_attn

#endif  // JAX_ATTN_CSRC_FFI_OPERAND_READER_H_
