// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "split_kv_attention.h"

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "split_kv_kernels.h"
#include "split_plan.h"

namespace jax_attn::gpu {
namespace {

// Positions of keys, and sums of a few of them, are 32-bit numbers in kernels.
constexpr int64_t kMaxKeys = int64_t{1} << 29;
constexpr int64_t kMaxCount = int64_t{1} << 31;

const void* FindSplitKernel(DType stored, const KernelShape& shape) {
  if (shape.matrix) {
    switch (stored) {
      case DType::kBFloat16:
        return MatrixKernelOf<DType::kBFloat16, DType::kBFloat16>(shape);
      case DType::kFloat16:
        return MatrixKernelOf<DType::kFloat16, DType::kFloat16>(shape);
      case DType::kInt8:
        return MatrixKernelOf<DType::kBFloat16, DType::kInt8>(shape);
      case DType::kFloat8E4M3FN:
        return MatrixKernelOf<DType::kBFloat16, DType::kFloat8E4M3FN>(shape);
      case DType::kFloat8E4M3FNUZ:
        return MatrixKernelOf<DType::kBFloat16, DType::kFloat8E4M3FNUZ>(shape);
      case DType::kFloat8E5M2:
        return MatrixKernelOf<DType::kBFloat16, DType::kFloat8E5M2>(shape);
      default:
        return nullptr;
    }
  }
  switch (stored) {
    case DType::kFloat32:
      return VectorKernelOf<DType::kFloat32>(shape);
    case DType::kBFloat16:
      return VectorKernelOf<DType::kBFloat16>(shape);
    case DType::kFloat16:
      return VectorKernelOf<DType::kFloat16>(shape);
    case DType::kInt8:
      return VectorKernelOf<DType::kInt8>(shape);
    case DType::kFloat8E4M3FN:
      return VectorKernelOf<DType::kFloat8E4M3FN>(shape);
    case DType::kFloat8E4M3FNUZ:
      return VectorKernelOf<DType::kFloat8E4M3FNUZ>(shape);
    case DType::kFloat8E5M2:
      return VectorKernelOf<DType::kFloat8E5M2>(shape);
  }
  return nullptr;
}

std::string Describe(Error error) {
  return std::string("a kernel could not be launched: ") + ErrorString(error);
}

}  // namespace

std::string LaunchSplitKvAttention(const SplitKvAttentionParams& params, std::string_view variant,
                                   const Device& device, Stream stream) {
  SplitKvAttentionParams p = params;
  p.sliding_window = std::min(p.sliding_window, kMaxKeys);
  if (p.kv_len >= kMaxKeys || p.query_len * p.num_q_heads >= kMaxKeys) {
    return "contexts have " + std::to_string(p.kv_len) + " keys, at most " +
           std::to_string(kMaxKeys - 1) + " are supported";
  }
  if (!variant.empty() &&
      std::find(std::begin(kVariants), std::end(kVariants), variant) == std::end(kVariants)) {
    return "variant '" + std::string(variant) + "' cannot run here";
  }
  const SplitPlan plan = PlanSplits(p, variant, device, p.workspace_size);
  if (!plan.possible) return "variant '" + std::string(variant) + "' cannot run here";
  return LaunchPlan(p, plan, device, stream);
}

std::string LaunchPlan(const SplitKvAttentionParams& params, SplitPlan plan, const Device& device,
                       Stream stream) {
  SplitKvAttentionParams p = params;
  if (plan.workspace_size > p.workspace_size) {
    return "workspace has " + std::to_string(p.workspace_size) + " floats, expected at least " +
           std::to_string(plan.workspace_size);
  }
  SplitWork& w = plan.work;
  const int64_t blocks = int64_t{w.num_groups} * p.num_kv_heads;
  const int64_t merge_blocks = int64_t{w.num_entries} * p.num_kv_heads * w.rows_per_block;
  if (blocks == 0) return "";
  const int64_t units = int64_t{w.num_entries} * (p.kv_len / w.unit_keys + 1);
  if (std::max({blocks, merge_blocks, units}) >= kMaxCount) {
    return "the problem has more than 2^31 blocks of keys or rows";
  }
  if (plan.shared_bytes > device.shared_per_block) {
    return "a block needs " + std::to_string(plan.shared_bytes) +
           " bytes of shared memory, this device has " + std::to_string(device.shared_per_block);
  }
  w.partials = p.workspace;
  if (plan.merges && w.cut == Cut::kShares) {
    w.starts = reinterpret_cast<int32_t*>(p.workspace);
    w.partials += (w.num_entries + 1 + 3) / 4 * 4;
  }
  const void* kernel = FindSplitKernel(p.key.dtype, plan.shape);
  if (kernel == nullptr) return "there is no kernel of this shape";

  void* args[] = {&p, &w};
  LaunchShape shape;
  shape.blocks = static_cast<unsigned>(blocks);
  shape.threads = static_cast<unsigned>(plan.shape.waves * device.wave_size);
  shape.shared_bytes = static_cast<size_t>(plan.shared_bytes);
  Error error = Launch(kernel, shape, stream, args);
  if (error != kSuccess) return Describe(error);
  if (!plan.merges) return "";
  shape.blocks = static_cast<unsigned>(merge_blocks);
  shape.threads = kMergeThreads;
  shape.shared_bytes = 0;
  shape.overlaps_previous = true;
  error = Launch(MergeKernelOf(), shape, stream, args);
  return error == kSuccess ? "" : Describe(error);
}

}  // namespace jax_attn::gpu
