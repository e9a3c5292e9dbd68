// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// How the operands of a problem are addressed, the same for every operation.

#ifndef JAX_ATTN_CSRC_OPERANDS_H_
#define JAX_ATTN_CSRC_OPERANDS_H_

#include <cstdint>

#include "dtype.h"

namespace jax_attn {

// The batch dimension of the op and the dimensions that vmap put in front of it.
inline constexpr int kMaxBatchDims = 8;

struct BatchShape {
  int num_dims = 0;
  int64_t sizes[kMaxBatchDims] = {};
  int64_t count = 1;  // product of sizes
};

// Strides in elements; 0 where an operand does not have the dimension and is shared.
struct BatchStrides {
  int64_t strides[kMaxBatchDims] = {};

  // `index` counts the batch; constexpr so that device code may call it.
  constexpr int64_t Offset(const BatchShape& shape, int64_t index) const {
    int64_t offset = 0;
    for (int d = shape.num_dims - 1; d > 0; --d) {
      offset += index % shape.sizes[d] * strides[d];
      index /= shape.sizes[d];
    }
    return offset + index * strides[0];
  }
};

template <typename T>
struct Operand {
  const T* data = nullptr;  // null: absent
  BatchStrides batch;

  constexpr const T* At(const BatchShape& shape, int64_t index) const {
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

// Bias or mask, [#B, #N, #T, S]; keys are contiguous.
struct RowOperand {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  BatchStrides batch;
  int64_t head_stride = 0;
  int64_t query_stride = 0;
};

// Where queries stand in their context: see `causal` in the public docstrings. A `query_offset` of
// split-KV attention says it instead where the keys are a part of the context.
enum class Causal : int32_t { kNone = 0, kBottomRight = 1, kTopLeft = 2 };

}  // namespace jax_attn

#endif  // JAX_ATTN_CSRC_OPERANDS_H_
