// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The fused QKV pass on one CPU thread, compiled once per instruction set.

#ifndef JAX_ATTN_CSRC_CPU_FUSED_QKV_KERNEL_H_
#define JAX_ATTN_CSRC_CPU_FUSED_QKV_KERNEL_H_

#include <cstdint>

#include "../fused_qkv_rope_cache.h"

namespace jax_attn::cpu {

// The largest head_dim in the capability table.
inline constexpr int64_t kMaxFusedHeadDim = 512;

// A slot of a token that is not stored.
inline constexpr int64_t kNoSlot = -1;

// What one thread does at a time: consecutive units of one batch index. Unit u is unit
// u % num_units of token u / num_units.
struct QkvItem {
  int64_t batch_index = 0;
  int64_t unit_begin = 0;
  int64_t unit_end = 0;
  const int64_t* slots = nullptr;       // [tokens], kNoSlot where a token is not stored
  const uint8_t* mrope_axes = nullptr;  // [rotary_dim / 2], which position turns a pair
  bool stream = false;                  // outputs are too large to stay in a cache
};

struct FusedQkvKernels {
  const char* name;
  void (*run)(const FusedQkvRopeCacheParams&, const QkvItem&);
};

}  // namespace jax_attn::cpu

#endif  // JAX_ATTN_CSRC_CPU_FUSED_QKV_KERNEL_H_
