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

// Query heads up to which SmallSeqWork::group_inverse divides rows exactly, and all of a sequence
// is less than 2^31 bytes.
constexpr int64_t kMaxTileHeads = 1 << 12;

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

template <DType kDType>
const void* FindMatrixKernel(const SmallSeqTiles& tiles, bool backward) {
  return backward ? SmallSeqMatrixBackwardOf<kDType>(tiles)
                  : SmallSeqMatrixForwardOf<kDType>(tiles);
}

struct Kernel {
  const void* address = nullptr;
  int lanes = 0;  // that do a head; or
  int waves = 0;
  int heads = 1;  // that a team has together
  int teams_per_head = 1;
  int blocks_per_core = 0;
  int shared_bytes = 0;
  bool is_vector = false;
  bool any_rows = false;  // of the vector kernels
};

// Null where there is none: one row needs no matrix, and more keys than a tile has need several.
Kernel MatrixKernel(const SmallSeqProblem& p, bool backward) {
  const int64_t rows = p.max_q_len * p.group_size(), dim = std::max(p.head_dim, p.v_head_dim);
  Kernel kernel;
  if (rows <= 1 || p.max_kv_len > 16 || p.num_q_heads > kMaxTileHeads) return kernel;
  SmallSeqTiles tiles;
  tiles.rows = 16;
  tiles.keys = p.max_kv_len <= 8 && rows <= 16 ? 8 : 16;
  if (rows <= 8 && tiles.keys == 8) tiles.rows = 8;
  tiles.dim = dim <= 64 ? 64 : 128;
  if (rows > 16 && !backward && !p.packed()) {
    kernel.teams_per_head = static_cast<int>(CeilDiv(rows, 16));
  }
  tiles.many_rows = rows > 16 && kernel.teams_per_head == 1;
  if (tiles.many_rows) tiles.dim = backward ? kManyRowsBackwardDim : kManyRowsForwardDim;
  tiles.parts = 1;
  while (tiles.parts * tiles.dim < dim) tiles.parts *= 2;
  tiles.packed = p.packed();
  if (tiles.parts == 1 && rows <= 4 && p.max_kv_len <= 4) {
    tiles.rows = tiles.keys = kSmallestTile;
    tiles.heads = kSmallestTile / (rows <= 2 && p.max_kv_len <= 2 ? 2 : 4);
  }
  if (p.dtype == DType::kBFloat16) {
    kernel.address = FindMatrixKernel<DType::kBFloat16>(tiles, backward);
  } else if (p.dtype == DType::kFloat16) {
    kernel.address = FindMatrixKernel<DType::kFloat16>(tiles, backward);
  }
  kernel.waves = tiles.parts;
  kernel.heads = tiles.heads;
  kernel.blocks_per_core = BlocksPerCore(tiles, backward);
  if (tiles.many_rows && backward && !kCopiesThroughRegisters) {
    kernel.shared_bytes = ManyRowsBytes(tiles);
  }
  return kernel;
}

Kernel VectorKernel(const SmallSeqProblem& p, bool backward) {
  SmallSeqShape shape = TeamFor(p);
  Kernel kernel;
  kernel.lanes = shape.lanes;
  kernel.is_vector = true;
  if (p.max_q_len * p.group_size() == 1) {
    for (const int keys : kOneRowKeys) {
      if (kernel.address != nullptr || p.max_kv_len > keys) continue;
      shape.keys = keys;
      kernel.address = FindKernel(p.dtype, shape, backward);
    }
  }
  if (kernel.address == nullptr) {
    shape.keys = 0;
    kernel.any_rows = true;
    kernel.address = FindKernel(p.dtype, shape, backward);
  }
  kernel.blocks_per_core = BlocksPerCore(shape, backward);
  return kernel;
}

Kernel KernelFor(const SmallSeqProblem& p, std::string_view variant, bool backward) {
  Kernel kernel;
  if (variant.empty() || variant == kSmallSeqMatrix) kernel = MatrixKernel(p, backward);
  if (kernel.address == nullptr && (variant.empty() || variant == kSmallSeqVector)) {
    kernel = VectorKernel(p, backward);
  }
  return kernel;
}

template <typename Params>
std::string LaunchFor(const Params& p, bool backward, std::string_view variant,
                      const Device& device, Stream stream) {
  const Kernel kernel = KernelFor(p, variant, backward);
  if (kernel.address == nullptr) {
    return "variant '" + std::string(variant) + "' cannot run here";
  }
  const int64_t num_rows = p.max_q_len * p.group_size();

  LaunchShape launch;
  launch.threads = kMaxThreads;
  launch.shared_bytes = kernel.shared_bytes;
  const int64_t teams = launch.threads /
                        (kernel.waves > 0 ? kernel.waves * device.wave_size : kernel.lanes) *
                        kernel.heads;
  const int64_t heads = p.batch.count * p.num_kv_heads * kernel.teams_per_head;
  int64_t arrays = 1;  // packed ones
  for (int d = 0; d < p.batch.num_dims - 1; ++d) arrays *= p.batch.sizes[d];
  if (heads >= kMaxCount || arrays >= kMaxCount) {
    return "there are 2^30 heads of sequences, or packed arrays, or more";
  }
  SmallSeqWork w;
  int64_t blocks = CeilDiv(heads, teams);
  if (p.packed()) {
    if (arrays == 0) return "";
    const int64_t in_tile = teams * HeadsPerTeam(kernel.is_vector);
    const int64_t tiles = CeilDiv(p.num_sequences() * p.num_kv_heads, in_tile);
    // Blocks look at all bounds, so no more of them than run together, except where a tile is so
    // small a part of a sequence that this costs less than blocks that wait for each other.
    const int64_t rounds = backward && !kernel.is_vector && p.num_kv_heads >= 4 * teams ? 2 : 1;
    const int64_t most = CeilDiv(device.num_cores * kernel.blocks_per_core * rounds, arrays);
    w.heads_per_tile = static_cast<unsigned>(in_tile);
    w.blocks_per_array = static_cast<unsigned>(std::clamp<int64_t>(tiles, 1, most));
    blocks = w.blocks_per_array * arrays;
  }
  if (blocks == 0) return "";
  w.num_heads = static_cast<int>(heads);
  w.teams_per_head = kernel.teams_per_head;
  w.group_size = static_cast<int>(p.group_size());
  w.num_rows = static_cast<int>(num_rows);
  w.num_q_heads = static_cast<unsigned>(p.num_q_heads);
  w.group_inverse =
      static_cast<unsigned>(CeilDiv(int64_t{1} << 31, std::max<int64_t>(p.group_size(), 1)));
  if (backward && kernel.any_rows) {
    w.padded_keys = static_cast<int>(CeilDiv(p.max_kv_len, 4) * 4);
    const int64_t all = w.padded_keys * (1 + 2 * num_rows);
    w.keeps_weights = teams * all * int64_t{sizeof(float)} <= kMaxWeightBytes;
    w.floats_per_team = w.keeps_weights ? static_cast<int>(all) : 3 * w.padded_keys;
    launch.shared_bytes = teams * w.floats_per_team * sizeof(float);
  }
  launch.blocks = static_cast<unsigned>(blocks);
  void* args[] = {const_cast<Params*>(&p), &w};
  const Error error = Launch(kernel.address, launch, stream, args);
  if (error == kSuccess) return "";
  return std::string("a kernel could not be launched: ") + ErrorString(error);
}

}  // namespace

std::string_view SmallSeqVariant(const SmallSeqProblem& p, std::string_view variant,
                                 bool backward) {
  if (!variant.empty()) return variant;
  return KernelFor(p, variant, backward).is_vector ? kSmallSeqVector : kSmallSeqMatrix;
}

std::string LaunchSmallSeqAttention(const SmallSeqAttentionParams& p, std::string_view variant,
                                    const Device& device, Stream stream) {
  return LaunchFor(p, false, variant, device, stream);
}

std::string LaunchSmallSeqBackward(const SmallSeqBackwardParams& p, std::string_view variant,
                                   const Device& device, Stream stream) {
  return LaunchFor(p, true, variant, device, stream);
}

}  // namespace jax_attn::gpu
