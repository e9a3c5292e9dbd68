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

template <DType kStored>
const void* FindStreamKernel(const KernelShape& shape) {
  return shape.clusters ? ClusterKernelOf<kStored>(shape) : StreamKernelOf<kStored>(shape);
}

const void* FindStreamKernel(DType stored, const KernelShape& shape) {
  switch (stored) {
    case DType::kBFloat16:
      return FindStreamKernel<DType::kBFloat16>(shape);
    case DType::kFloat16:
      return FindStreamKernel<DType::kFloat16>(shape);
    case DType::kInt8:
      return FindStreamKernel<DType::kInt8>(shape);
    case DType::kFloat8E4M3FN:
      return FindStreamKernel<DType::kFloat8E4M3FN>(shape);
    case DType::kFloat8E5M2:
      return FindStreamKernel<DType::kFloat8E5M2>(shape);
    default:
      return nullptr;
  }
}

std::string Describe(Error error) {
  return std::string("a kernel could not be launched: ") + ErrorString(error);
}

// Kernels without scales take the first part of it.
ScaledStreamParams StreamParamsOf(const SplitKvAttentionParams& p) {
  ScaledStreamParams s = {};
  s.causal = p.causal;
  s.query_len = static_cast<int32_t>(p.query_len);
  s.num_q_heads = static_cast<int32_t>(p.num_q_heads);
  s.num_kv_heads = static_cast<int32_t>(p.num_kv_heads);
  s.kv_len = static_cast<int32_t>(p.kv_len);
  s.group = Divisor(p.group_size());
  s.page_size = static_cast<int32_t>(p.page_size);
  if (p.page_size != 0) s.pages = Divisor(p.page_size);
  s.sliding_window = static_cast<int32_t>(p.sliding_window);
  s.scale = p.scale;
  s.kv_lengths = {p.kv_lengths.data, p.kv_lengths.batch.strides[0]};
  s.query_offset = {p.query_offset.data, p.query_offset.batch.strides[0]};
  s.page_table = {p.page_table.data, p.page_table.batch.strides[0]};
  s.layer = p.layer.data;
  s.num_pages = static_cast<int32_t>(p.num_pages);
  s.num_layers = static_cast<int32_t>(p.num_layers);
  s.kv_batch = p.key.batch.strides[0] != 0;
  s.head_dim = static_cast<int32_t>(p.head_dim);
  s.v_head_dim = static_cast<int32_t>(p.v_head_dim);
  s.query = p.query;
  s.query_stride = p.query_batch.strides[0];
  s.query_dtype = p.query_dtype;
  s.sinks = {p.sinks.data};
  s.out = p.out;
  s.lse = p.lse;
  s.lse_includes_sinks = p.lse_includes_sinks;
  const auto scale = [](const ScaleOperand& x) -> ScaledStreamParams::Scale {
    return {x.data, x.batch.strides[0], x.layer_stride, x.head_stride};
  };
  s.k_scale = scale(p.k_scale);
  s.v_scale = scale(p.v_scale);
  return s;
}

struct TokenMaps {
  TensorMap key, value;
};

// Describes keys or values: a line of up to 128 bytes, tokens, the lines of a head, heads, and
// pages or sequences. A copy takes a tile of one head, or a part of it.
bool MapTokens(const SplitKvAttentionParams& p, const KvOperand& x, const KernelShape& shape,
               TensorMap& map) {
  const int64_t bytes = SizeOf(x.dtype), row_bytes = p.head_dim * bytes;
  const int64_t line_bytes = std::min<int64_t>(row_bytes, 128), pieces = row_bytes / line_bytes;
  const bool paged = p.page_size != 0;
  const int64_t outer = paged ? p.num_pages * std::max<int64_t>(1, p.num_layers) : p.batch.count;
  const int64_t outer_stride = paged ? x.page_stride : x.batch.strides[0];
  TensorShape tensor;
  tensor.data = x.data;
  tensor.line_bytes = static_cast<uint32_t>(line_bytes);
  const int64_t sizes[] = {paged ? p.page_size : p.kv_len, pieces, p.num_kv_heads,
                           outer_stride == 0 ? 1 : outer};
  const int64_t strides[] = {x.token_stride, line_bytes / bytes, x.head_stride,
                             outer_stride == 0 ? x.token_stride : outer_stride};
  const int64_t box[] = {StreamBoxKeys(shape.tile_keys, shape.max_dim, p.page_size), pieces, 1, 1};
  for (int i = 0; i < 4; ++i) {
    tensor.sizes[i] = static_cast<uint64_t>(sizes[i]);
    tensor.strides[i] = static_cast<uint64_t>(strides[i] * bytes);
    tensor.box[i] = static_cast<uint32_t>(box[i]);
  }
  return MakeTensorMap(tensor, map);
}

// Maps of the keys and values of a problem, for the tiles of a stream kernel. Whether there are.
bool MapTokens(const SplitKvAttentionParams& p, const KernelShape& shape, TokenMaps& maps) {
  return MapTokens(p, p.key, shape, maps.key) && MapTokens(p, p.value, shape, maps.value);
}

// Shared memory that merge blocks ask for only so that they do not all come to the few cores that
// the stream kernel leaves idle: some of its blocks end early.
size_t SpreadingBytes(int64_t merge_blocks, const Device& device) {
  constexpr int64_t kCores = 32, kMaxPerCore = 16, kOwn = 4 * 1024;
  const int64_t per_core = std::clamp<int64_t>(CeilDiv(merge_blocks, kCores), 1, kMaxPerCore);
  return static_cast<size_t>(std::min(device.shared_per_core / per_core, device.shared_per_block) -
                             kOwn);
}

std::string LaunchKernels(const SplitKvAttentionParams& params, SplitPlan plan, TokenMaps& maps,
                          const Device& device, Stream stream) {
  SplitKvAttentionParams p = params;
  if (plan.workspace_size > p.workspace_size) {
    return "workspace has " + std::to_string(p.workspace_size) + " floats, expected at least " +
           std::to_string(plan.workspace_size);
  }
  SplitWork& w = plan.work;
  const int64_t blocks = int64_t{w.num_groups} * p.num_kv_heads;
  // Threads of a merge block share rows, or the parts of one row if there are many.
  const int64_t columns = std::max<int64_t>(1, p.v_head_dim / 4);
  constexpr int kManyParts = 4;
  w.merge_rows = plan.num_splits > kManyParts
                     ? 1
                     : static_cast<int32_t>(std::clamp<int64_t>(kMergeThreads / columns, 1,
                                                                std::max(1, w.rows_per_block)));
  w.merge_chunks = Divisor(CeilDiv(w.rows_per_block, w.merge_rows));
  const int64_t merge_blocks = int64_t{w.num_merges()} * p.num_kv_heads * w.merge_chunks.divisor();
  if (blocks == 0) return "";
  const int64_t units = int64_t{w.num_entries} * (p.kv_len / w.unit_keys + 1);
  if (std::max({blocks, merge_blocks, units}) >= kMaxCount) {
    return "the problem has more than 2^31 blocks of keys or rows";
  }
  if (plan.shared_bytes > device.shared_per_block) {
    return "a block needs " + std::to_string(plan.shared_bytes) +
           " bytes of shared memory, this device has " + std::to_string(device.shared_per_block);
  }
  w.merged = plan.merges;
  // There is not room for clusters of more than two everywhere.
  const int room = w.cluster > 2 ? device.num_cores * 3 / 4 : device.num_cores;
  w.allows_next = 2 * blocks <= room || (plan.merges && 4 * merge_blocks <= device.num_cores);
  w.partials = p.workspace;
  const bool streams = plan.shape.stream;
  const void* kernel = streams ? FindStreamKernel(p.key.dtype, plan.shape)
                               : FindSplitKernel(p.key.dtype, plan.shape);
  if (kernel == nullptr) return "there is no kernel of this shape";

  ScaledStreamParams stream_params = {};
  if (streams) stream_params = StreamParamsOf(p);
  void* args[] = {&p, &w};
  void* stream_args[] = {&maps.key, &maps.value, &stream_params, &w};
  LaunchShape shape;
  shape.blocks = static_cast<unsigned>(blocks);
  // Stream kernels have a spare wave.
  shape.threads = static_cast<unsigned>((plan.shape.waves + streams) * device.wave_size);
  shape.shared_bytes = static_cast<size_t>(plan.shared_bytes);
  shape.cluster = static_cast<unsigned>(w.cluster);
  shape.overlaps_previous = streams;
  Error error = Launch(kernel, shape, stream, streams ? stream_args : args);
  if (error != kSuccess) return Describe(error);
  if (!plan.merges) return "";
  shape.blocks = static_cast<unsigned>(merge_blocks);
  shape.threads = kMergeThreads;
  shape.shared_bytes = streams ? SpreadingBytes(merge_blocks, device) : 0;
  shape.cluster = 1;
  shape.overlaps_previous = true;
  error = streams ? Launch(StreamMergeKernelOf(), shape, stream, stream_args + 2)
                  : Launch(MergeKernelOf(), shape, stream, args);
  return error == kSuccess ? "" : Describe(error);
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
  SplitPlan plan = PlanSplits(p, variant, device, p.workspace_size);
  TokenMaps maps;
  if (plan.shape.stream && !MapTokens(p, plan.shape, maps)) {
    Device plain = device;
    plain.tensor_maps = false;
    plan = PlanSplits(p, variant, plain, p.workspace_size);
  }
  if (!plan.possible) return "variant '" + std::string(variant) + "' cannot run here";
  return LaunchKernels(p, plan, maps, device, stream);
}

}  // namespace jax_attn::gpu
