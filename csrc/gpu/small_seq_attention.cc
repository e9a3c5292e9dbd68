// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "small_seq_attention.h"

#include <algorithm>
#include <cstdint>

#include "small_seq_kernels.h"

namespace jax_attn::gpu {
namespace {

constexpr int64_t kMaxCount = int64_t{1} << 30;

// Shared memory of a block up to which weights of all rows are kept: four blocks fit on a core.
constexpr int64_t kMaxWeightBytes = 40 * 1024;

// Blocks for each core that packed sequences are dealt to. Each looks at all bounds once.
constexpr int64_t kPackedBlocksPerCore = 4;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest team that holds a head, 16 bytes a lane at a time.
SmallSeqShape TeamFor(const SmallSeqProblem& p) {
  const int64_t bytes = std::max(p.head_dim, p.v_head_dim) * SizeOf(p.dtype);
  SmallSeqShape shape{8, 1, 0};
  while (shape.lanes < 32 && shape.lanes * 16 < bytes) shape.lanes *= 2;
  while (shape.lanes * shape.pieces * 16 < bytes) shape.pieces *= 2;
  return shape;
}

const void* FindKernel(DType dtype, const SmallSeqShape& shape, bool backward) {
  switch (dtype) {
    case DType::kFloat32:
      return backward ? SmallSeqBackwardOf<DType::kFloat32>(shape)
                      : SmallSeqForwardOf<DType::kFloat32>(shape);
    case DType::kBFloat16:
      return backward ? SmallSeqBackwardOf<DType::kBFloat16>(shape)
                      : SmallSeqForwardOf<DType::kBFloat16>(shape);
    case DType::kFloat16:
      return backward ? SmallSeqBackwardOf<DType::kFloat16>(shape)
                      : SmallSeqForwardOf<DType::kFloat16>(shape);
    default:
      return nullptr;
  }
}

template <typename Params>
std::string LaunchFor(const Params& p, bool backward, std::string_view variant,
                      const Device& device, Stream stream) {
  if (!variant.empty() && variant != kSmallSeqVariant) {
    return "variant '" + std::string(variant) + "' cannot run here";
  }
  SmallSeqShape shape = TeamFor(p);
  const int64_t num_rows = p.max_q_len * p.group_size();
  const void* kernel = nullptr;
  if (num_rows == 1) {
    for (const int keys : kOneRowKeys) {
      if (kernel != nullptr || p.max_kv_len > keys) continue;
      shape.keys = keys;
      kernel = FindKernel(p.dtype, shape, backward);
    }
  }
  if (kernel == nullptr) {
    shape.keys = 0;
    kernel = FindKernel(p.dtype, shape, backward);
  }

  LaunchShape launch;
  launch.threads = kMaxThreads;
  const int64_t teams = launch.threads / shape.lanes;
  const int64_t heads = p.batch.count * p.num_kv_heads;
  int64_t arrays = 1;  // packed ones
  for (int d = 0; d < p.batch.num_dims - 1; ++d) arrays *= p.batch.sizes[d];
  if (heads >= kMaxCount || arrays >= kMaxCount) {
    return "there are 2^30 heads of sequences, or packed arrays, or more";
  }
  SmallSeqWork w;
  int64_t blocks = CeilDiv(heads, teams);
  if (p.packed()) {
    if (arrays == 0) return "";
    const int64_t useful = CeilDiv(p.num_sequences() * p.num_kv_heads, teams);
    const int64_t most = CeilDiv(device.num_cores * kPackedBlocksPerCore, arrays);
    const int64_t count = std::clamp<int64_t>(useful, 1, most);
    const int64_t size = std::max<int64_t>(1, CeilDiv(p.num_sequences(), count));
    w.sequences_per_block = static_cast<int>(size);
    w.blocks_per_array = static_cast<int>(std::max<int64_t>(1, CeilDiv(p.num_sequences(), size)));
    blocks = w.blocks_per_array * arrays;
  }
  if (blocks == 0) return "";
  w.num_heads = static_cast<int>(heads);
  w.group_size = static_cast<int>(p.group_size());
  if (backward && shape.keys == 0) {
    w.padded_keys = static_cast<int>(CeilDiv(p.max_kv_len, 4) * 4);
    const int64_t all = w.padded_keys * (1 + 2 * num_rows);
    w.keeps_weights = teams * all * int64_t{sizeof(float)} <= kMaxWeightBytes;
    w.floats_per_team = w.keeps_weights ? static_cast<int>(all) : 3 * w.padded_keys;
    launch.shared_bytes = teams * w.floats_per_team * sizeof(float);
  }
  launch.blocks = static_cast<unsigned>(blocks);
  void* args[] = {const_cast<Params*>(&p), &w};
  const Error error = Launch(kernel, launch, stream, args);
  if (error == kSuccess) return "";
  return std::string("a kernel could not be launched: ") + ErrorString(error);
}

}  // namespace

std::string LaunchSmallSeqAttention(const SmallSeqAttentionParams& p, std::string_view variant,
                                    const Device& device, Stream stream) {
  return LaunchFor(p, false, variant, device, stream);
}

std::string LaunchSmallSeqBackward(const SmallSeqBackwardParams& p, std::string_view variant,
                                   const Device& device, Stream stream) {
  return LaunchFor(p, true, variant, device, stream);
}

}  // namespace jax_attn::gpu
