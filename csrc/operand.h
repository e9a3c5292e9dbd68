// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Operands that may carry the dimensions of vmap, as every operation sees them.

#ifndef JAX_ATTN_CSRC_OPERAND_H_
#define JAX_ATTN_CSRC_OPERAND_H_

#include <cstdint>

namespace jax_attn {

// Dimensions that vmap put in front of an operand, and the batch dimension of ops that have one.
inline constexpr int kMaxBatchDims = 8;

struct BatchShape {
  int num_dims = 0;
  int64_t sizes[kMaxBatchDims] = {};
  int64_t count = 1;  // product of sizes
};

// Strides in elements; 0 where an operand does not have the dimension and is shared.
struct BatchStrides {
  int64_t strides[kMaxBatchDims] = {};

  int64_t Offset(const BatchShape& shape, int64_t index) const {
    int64_t offset = 0;
    for (int d = shape.num_dims - 1; d >= 0; --d) {
      offset += index % shape.sizes[d] * strides[d];
      index /= shape.sizes[d];
    }
    return offset;
  }
};

template <typename T>
struct Operand {
  const T* data = nullptr;  // null: absent
  BatchStrides batch;

  const T* At(const BatchShape& shape, int64_t index) const {
    return data + batch.Offset(shape, index);
  }
};

// Dequantisation factors, addressed like what they scale, less the head_dim.
struct ScaleOperand {
  const float* data = nullptr;
  BatchStrides batch;
  int64_t layer_stride = 0;
  int64_t page_stride = 0;
  int64_t token_stride = 0;  // 0: the same for all tokens
  int64_t head_stride = 0;
};

}  // namespace jax_attn

#endif  // JAX_ATTN_CSRC_OPERAND_H_
