// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// What the kernels of the fused QKV pass are given, from the problem and its plan.

#ifndef JAX_ATTN_CSRC_GPU_FUSED_QKV_MAKE_WORK_H_
#define JAX_ATTN_CSRC_GPU_FUSED_QKV_MAKE_WORK_H_

#include <cstdint>

#include "../fused_qkv_rope_cache.h"
#include "fused_qkv_rope_cache.h"
#include "fused_qkv_work.h"

namespace jax_attn::gpu {

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where the rotary dims of a head begin.
inline int64_t RotaryBegin(const FusedQkvRopeCacheParams& p) {
  return p.nope_first ? p.head_dim - p.rotary_dim : 0;
}

// Whether the cache holds something else than what is returned.
inline bool Converts(const FusedQkvRopeCacheParams& p) {
  return p.k_pages.dtype != p.dtype || p.k_scale.data != nullptr || p.v_scale.data != nullptr;
}

inline bool HasSmallSlots(const FusedQkvRopeCacheParams& p) {
  return p.num_pages * p.page_size < int64_t{1} << 31;
}

FusedQkvWork MakeWork(const FusedQkvRopeCacheParams& p, QkvKernel kernel, const FusedQkvPlan& plan,
                      int wave_size);
FusedQkvPlainWork MakePlainWork(const FusedQkvRopeCacheParams& p, const FusedQkvPlan& plan,
                                int wave_size);
FusedQkvFewWork MakeFewWork(const FusedQkvRopeCacheParams& p, const FusedQkvPlan& plan);
QkvBatch MakeBatch(const FusedQkvRopeCacheParams& p);

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_FUSED_QKV_MAKE_WORK_H_
