// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// How a problem is cut, from shapes and the device alone: lengths stay on the device.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_PLAN_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_PLAN_H_

#include <cstdint>
#include <limits>
#include <string_view>

#include "../split_kv_attention.h"
#include "split_kv_kernel.h"
#include "vendor.h"

namespace jax_attn::gpu {

// Names of the variants, as in the attribute of the call.
inline constexpr std::string_view kVariants[] = {"stream", "matrix", "vector"};

struct SplitPlan {
  bool possible = false;  // the variant that was asked for can do it
  KernelShape shape;
  std::string_view variant() const {
    return shape.stream ? "stream" : shape.matrix ? "matrix" : "vector";
  }
  SplitWork work;
  bool merges = false;         // a merge kernel follows
  int64_t shared_bytes = 0;    // of a block
  int64_t num_splits = 1;      // of a context of full length
  int64_t workspace_size = 0;  // floats
};

// Plans `p`, of which data is not read; `variant` is one of kVariants or empty for the best. With
// less workspace there are fewer splits, as far as they are planned.
SplitPlan PlanSplits(const SplitKvAttentionParams& p, std::string_view variant,
                     const Device& device,
                     int64_t workspace_limit = std::numeric_limits<int64_t>::max());

// Cuts all keys into `num_groups` shares, or fewer if that is the same, and `num_late` late ones.
void CutIntoShares(const SplitKvAttentionParams& p, int64_t num_groups, int64_t num_late,
                   SplitPlan& plan);

// Nanoseconds that the cost model gives `num_groups` groups.
double EstimateTime(const SplitKvAttentionParams& p, const SplitPlan& plan, const Device& device,
                    int64_t num_groups);

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_PLAN_H_
