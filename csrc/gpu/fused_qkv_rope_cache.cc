// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "fused_qkv_rope_cache.h"

#include <algorithm>
#include <cstdint>

#include "fused_qkv_kernels.h"
#include "fused_qkv_make_work.h"
#include "fused_qkv_work.h"

namespace jax_attn::gpu {
namespace {

constexpr int64_t kMaxCount = int64_t{1} << 31;

// Up to this many tokens each wave looks through the slots of later tokens by itself, which takes
// the square of them.
constexpr int64_t kMaxOwnSearch = 1024;

// Storing blocks that a core should have, and the least of their tokens.
constexpr int64_t kStoringBlocksPerCore = 2;
constexpr int64_t kMinBlockTokens = 8;

// Tokens of the other blocks, one for each wave. With more of them memory is walked less in order.
constexpr int kItemTokens = 4;

// Waves that a core has room for: so many may be given less to do each, the sooner to be done.
constexpr int64_t kWavesPerCore = 16;

// The kernel for many tokens.
QkvKernel FamilyOf(const FusedQkvRopeCacheParams& p) {
  if (p.batch.count != 1) return QkvKernel::kAnywhere;
  const bool rotates = p.rotary_dim != 0;
  if (rotates && p.interleaved) return QkvKernel::kNeighbours;
  if (p.rotary_dim % (2 * kPieceSize) != 0 || RotaryBegin(p) % kPieceSize != 0) {
    return QkvKernel::kAnywhere;
  }
  const bool plain_tables = p.cos.dtype == DType::kFloat32 && p.sin.dtype == DType::kFloat32 &&
                            !p.full_width_table && !p.has_mrope;
  bool plain_weights = p.norm_scope != NormScope::kAllHeads;
  for (const FloatOperand* weight : {&p.q_weight, &p.k_weight}) {
    plain_weights &= weight->data == nullptr || weight->dtype == p.dtype;
  }
  const bool plain_heads = p.head_dim == p.v_head_dim && RotaryBegin(p) == 0;
  const bool plain_slots = p.slots_32.data != nullptr && HasSmallSlots(p);
  if (!plain_weights || (rotates && !plain_tables) || !plain_heads || !plain_slots) {
    return QkvKernel::kHalves;
  }
  return Converts(p) ? QkvKernel::kManyConverting : QkvKernel::kMany;
}

bool SameStrides(const PagesOperand& a, const PagesOperand& b) {
  return a.layer_stride == b.layer_stride && a.page_stride == b.page_stride &&
         a.token_stride == b.token_stride && a.head_stride == b.head_stride;
}

QkvKernel KernelOf(const FusedQkvRopeCacheParams& p, const FusedQkvPlan& plan) {
  const QkvKernel family = FamilyOf(p);
  if (!IsPlain(family) || plan.block_tokens != 0) return family;
  const bool few = family == QkvKernel::kMany && p.gate == GateLayout::kNone &&
                   p.columns() * SizeOf(p.dtype) < kMaxCount && SameStrides(p.k_pages, p.v_pages);
  return few ? QkvKernel::kFew : QkvKernel::kFewOtherwise;
}

const void* FindKernel(DType dtype, QkvKernel kernel, int piece_size) {
  switch (dtype) {
    case DType::kFloat32:
      return FusedQkvKernelOf<DType::kFloat32>(kernel, piece_size);
    case DType::kBFloat16:
      return FusedQkvKernelOf<DType::kBFloat16>(kernel, piece_size);
    default:
      return FusedQkvKernelOf<DType::kFloat16>(kernel, piece_size);
  }
}

// A buffer that XLA did not alias must start as a copy.
Error CopyIfMoved(const void* from, void* to, int64_t bytes, Stream stream) {
  if (from == to || bytes == 0) return kSuccess;
  return CopyOnDevice(to, from, static_cast<size_t>(bytes), stream);
}

}  // namespace

FusedQkvPlan PlanFusedQkv(const FusedQkvRopeCacheParams& p, const Device& device) {
  FusedQkvPlan plan;
  const int64_t tokens = p.num_tokens, cores = device.num_cores;
  if (tokens > kMaxOwnSearch) {
    const int64_t share = CeilDiv(tokens, cores * kStoringBlocksPerCore);
    plan.block_tokens =
        static_cast<int>(std::clamp<int64_t>(share, kMinBlockTokens, kMaxBlockTokens));
    plan.item_tokens = kItemTokens;
  }
  const int64_t heads = p.columns() / p.head_dim;
  const auto waves = [&](int64_t piece_size, int64_t steps) {
    int64_t lanes = 1;
    while (lanes * 2 * piece_size < p.head_dim) lanes *= 2;
    return p.batch.count * tokens * CeilDiv(heads * lanes, device.wave_size * steps);
  };
  // Smaller pieces, while there are waves for them and a head has lanes. Heads that are no pairs of
  // pieces would be summed in another order.
  if (p.head_dim <= 32 * kPieceSize && p.head_dim % (2 * kPieceSize) == 0 &&
      waves(kPieceSize / 2, 1) <= cores * kWavesPerCore / 2) {
    plan.piece_size = kPieceSize / 2;
  }
  while (plan.steps < heads && waves(kPieceSize, plan.steps) > cores * kWavesPerCore) {
    plan.steps *= 2;
  }
  return plan;
}

std::string LaunchFusedQkvRopeCache(const FusedQkvRopeCacheParams& p, std::string_view variant,
                                    const Device& device, Stream stream) {
  if (!variant.empty() && variant != kFusedQkvVariant) {
    return "variant '" + std::string(variant) + "' cannot run here";
  }
  Error error = kSuccess;
  for (const PagesOperand* pages : {&p.k_pages, &p.v_pages}) {
    const int64_t bytes = p.batch.count * pages->batch_stride * SizeOf(pages->dtype);
    if (error == kSuccess) error = CopyIfMoved(pages->source, pages->data, bytes, stream);
  }
  for (const DynamicScales* scales : {&p.k_scales_out, &p.v_scales_out}) {
    const int64_t bytes = p.batch.count * scales->batch_stride * int64_t{sizeof(float)};
    if (error == kSuccess) error = CopyIfMoved(scales->source, scales->data, bytes, stream);
  }
  if (error != kSuccess) return std::string("pages cannot be copied: ") + ErrorString(error);
  if (p.batch.count * p.num_tokens * p.columns() == 0) return "";
  return LaunchFusedQkvPlan(p, PlanFusedQkv(p, device), device, stream);
}

std::string LaunchFusedQkvPlan(const FusedQkvRopeCacheParams& p, const FusedQkvPlan& plan,
                               const Device& device, Stream stream) {
  const int64_t heads = 2 * (p.num_q_heads + p.num_kv_heads);
  if (p.columns() >= kMaxCount || p.batch.count * p.num_tokens >= kMaxCount / heads) {
    return "the problem has more than 2^31 heads of tokens";
  }
  const QkvKernel kernel = KernelOf(p, plan);
  LaunchShape shape;
  shape.threads = static_cast<unsigned>(plan.threads);
  if (plan.block_tokens != 0) shape.shared_bytes = kBlockSlotsBytes;
  const void* const function = FindKernel(p.dtype, kernel, plan.piece_size);
  Error error = kSuccess;
  if (kernel == QkvKernel::kFew) {
    FusedQkvFewWork work = MakeFewWork(p, plan);
    shape.threads = kFusedQkvFewThreads;
    shape.blocks = static_cast<unsigned>(p.num_tokens * work.blocks_per_token);
    void* args[] = {&work};
    error = Launch(function, shape, stream, args);
  } else if (IsPlain(kernel)) {
    FusedQkvPlainWork work = MakePlainWork(p, plan, device.wave_size);
    int64_t blocks = CeilDiv(p.num_tokens * work.items_per_token, plan.threads / device.wave_size);
    if (plan.block_tokens != 0) {
      const int kinds = p.gate == GateLayout::kNone ? 1 : 2;
      blocks = work.storing_blocks + CeilDiv(p.num_tokens, plan.item_tokens) * kinds;
    }
    if (plan.block_tokens != 0) {
      // The factors of a wave: 4 floats for each element of two pieces.
      const int64_t floats = int64_t{4 * kPieceSize} << work.lane_bits;
      shape.shared_bytes += plan.threads / device.wave_size * floats * int64_t{sizeof(float)};
    }
    shape.blocks = static_cast<unsigned>(blocks);
    void* args[] = {&work};
    error = Launch(function, shape, stream, args);
  } else {
    FusedQkvWork work = MakeWork(p, kernel, plan, device.wave_size);
    QkvBatch batch = MakeBatch(p);
    shape.blocks = static_cast<unsigned>(p.batch.count * work.blocks);
    void* args[] = {&work, &batch};
    error = Launch(function, shape, stream, args);
  }
  return error == kSuccess ? ""
                           : std::string("a kernel could not be launched: ") + ErrorString(error);
}

}  // namespace jax_attn::gpu
