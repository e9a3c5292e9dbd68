// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "fused_qkv_rope_cache.h"

#include <algorithm>
#include <cstdint>

#include "fused_qkv_kernels.h"
#include "fused_qkv_work.h"

namespace jax_attn::gpu {
namespace {

constexpr int64_t kMaxCount = int64_t{1} << 31;

// Up to this many tokens each wave looks through the slots of later tokens by itself, which takes
// the square of them.
constexpr int64_t kMaxOwnSearch = 1024;

// Storing blocks that a core should have, and the least of their tokens.
constexpr int64_t kStoringBlocksPerCore = 4;
constexpr int64_t kMinBlockTokens = 8;

// Tokens of the other blocks, one for each wave. With more of them memory is walked less in order.
constexpr int kItemTokens = 4;

// Waves that a core has room for: so many may be given less to do each, the sooner to be done.
constexpr int64_t kWavesPerCore = 16;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

QkvPart MakePart(const FusedQkvRopeCacheParams& p, QkvKind kind) {
  QkvPart part;
  const bool is_query = kind == kQueries || kind == kGates;
  const int64_t h = kind == kValues ? p.v_head_dim : p.head_dim;
  part.num_heads = static_cast<int32_t>(is_query ? p.num_q_heads : p.num_kv_heads);
  part.head_dim = static_cast<int32_t>(h);
  part.column_stride = static_cast<int32_t>(h);
  if (is_query && p.gate == GateLayout::kInterleaved) part.column_stride *= 2;
  const FloatOperand* weight = nullptr;
  switch (kind) {
    case kQueries:
      part.out = p.query;
      weight = &p.q_weight;
      break;
    case kGates:
      part.out = p.gate_out;
      part.first_column =
          static_cast<int32_t>(p.gate == GateLayout::kInterleaved ? h : p.num_q_heads * h);
      if (p.gate == GateLayout::kNone) part.num_heads = 0;
      break;
    case kKeys:
      part.out = p.key;
      weight = &p.k_weight;
      part.first_column = static_cast<int32_t>(p.query_columns());
      break;
    default:
      part.out = p.value;
      part.first_column = static_cast<int32_t>(p.query_columns() + p.num_kv_heads * p.head_dim);
      break;
  }
  const bool norm = p.norm_scope != NormScope::kNone;
  part.normalized = norm && (weight != nullptr || (kind == kValues && p.normalize_v));
  part.over_all_heads = part.normalized && p.norm_scope == NormScope::kAllHeads;
  if (part.normalized && weight != nullptr) {
    part.weight = weight->data;
    part.weight_dtype = weight->dtype;
  }
  if (part.normalized) {
    part.inverse_size = 1.0f / static_cast<float>(h * (part.over_all_heads ? part.num_heads : 1));
  }
  part.rotated = weight != nullptr && p.rotary_dim != 0;
  part.num_pieces = static_cast<int32_t>(h / kPieceSize);
  while (1 << part.lane_bits < CeilDiv(part.num_pieces, 2)) ++part.lane_bits;
  return part;
}

QkvPages MakePages(const PagesOperand& pages, const ScaleOperand& scale,
                   const DynamicScales& dynamic) {
  QkvPages made;
  made.data = static_cast<char*>(pages.data);
  made.layer_stride = pages.layer_stride;
  made.page_stride = pages.page_stride;
  made.token_stride = pages.token_stride;
  made.head_stride = pages.head_stride;
  made.dynamic_scale = dynamic.data;
  if (dynamic.data == nullptr) made.scale = scale.data;
  made.scale_layer_stride = scale.layer_stride;
  made.scale_page_stride = scale.page_stride;
  made.scale_token_stride = scale.token_stride;
  made.scale_head_stride = scale.head_stride;
  return made;
}

int64_t RotaryBegin(const FusedQkvRopeCacheParams& p) {
  return p.nope_first ? p.head_dim - p.rotary_dim : 0;
}

bool Converts(const FusedQkvRopeCacheParams& p) {
  return p.k_pages.dtype != p.dtype || p.k_scale.data != nullptr || p.v_scale.data != nullptr;
}

bool HasSmallSlots(const FusedQkvRopeCacheParams& p) {
  return p.num_pages * p.page_size < kMaxCount;
}

QkvKernel KernelOf(const FusedQkvRopeCacheParams& p) {
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
  return Converts(p) ? QkvKernel::kPlainConverting : QkvKernel::kPlain;
}

FusedQkvWork MakeWork(const FusedQkvRopeCacheParams& p, QkvKernel kernel, const FusedQkvPlan& plan,
                      int wave_size) {
  FusedQkvWork w;
  for (int kind = 0; kind < kNumQkvKinds; ++kind) {
    QkvPart& part = w.parts[kind] = MakePart(p, static_cast<QkvKind>(kind));
    if (part.rotated && (IsPlain(kernel) || kernel == QkvKernel::kHalves)) {
      part.rotated_slots = static_cast<int32_t>(p.rotary_dim / (2 * kPieceSize));
    }
    const bool stored = plan.block_tokens != 0 && kind >= kKeys;
    part.item_heads = stored ? part.num_heads : (wave_size >> part.lane_bits) * plan.steps;
    const int64_t items = stored ? 0 : CeilDiv(part.num_heads, part.item_heads);
    w.first_items[kind + 1] = w.first_items[kind] + static_cast<int32_t>(items);
  }
  w.pages[0] = MakePages(p.k_pages, p.k_scale, p.k_scales_out);
  w.pages[1] = MakePages(p.v_pages, p.v_scale, p.v_scales_out);
  w.qkv = p.qkv;
  w.slots_32 = p.slots_32.data;
  w.slots_64 = p.slots_64.data;
  w.layer = p.layer.data;
  w.positions = p.positions.data;
  w.offsets = p.offsets.data;
  w.cos = p.cos.data;
  w.sin = p.sin.data;
  w.capacity = p.num_pages * p.page_size;
  w.num_layers = std::max<int64_t>(p.num_layers, 1);
  w.page_size = p.page_size;
  w.has_small_slots = HasSmallSlots(p);
  if (w.has_small_slots) w.pages_of_slots = Divider::Of(static_cast<uint32_t>(p.page_size));
  w.columns = p.columns();
  w.num_tokens = static_cast<int32_t>(p.num_tokens);
  w.stored_dtype = p.k_pages.dtype;
  w.converts = Converts(p);
  w.cos_dtype = p.cos.dtype;
  w.sin_dtype = p.sin.dtype;
  w.interleaved = p.interleaved;
  w.full_width_table = p.full_width_table;
  w.has_mrope = p.has_mrope;
  w.mrope_interleaved = p.mrope_interleaved;
  for (int i = 0; i < 3; ++i) w.mrope_sections[i] = static_cast<int32_t>(p.mrope_sections[i]);
  w.rotary_begin = static_cast<int32_t>(RotaryBegin(p));
  w.rotary_piece = w.rotary_begin / kPieceSize;
  w.rotary_dim = static_cast<int32_t>(p.rotary_dim);
  w.max_positions = static_cast<int32_t>(std::min<int64_t>(p.max_positions, INT32_MAX));
  w.table_width = static_cast<int32_t>(p.table_width);
  w.epsilon = p.epsilon;
  w.weight_offset = p.weight_offset;

  const int32_t items_per_token = w.first_items[kNumQkvKinds];
  w.tokens_of_items = Divider::Of(static_cast<uint32_t>(std::max(items_per_token, 1)));
  w.block_tokens = plan.block_tokens;
  if (plan.block_tokens != 0) {
    w.storing_blocks = static_cast<int32_t>(CeilDiv(p.num_tokens, plan.block_tokens));
  }
  const int64_t items = p.num_tokens * items_per_token;
  w.blocks = w.storing_blocks + static_cast<int32_t>(CeilDiv(items, plan.threads / wave_size));
  return w;
}

FusedQkvPlainWork MakePlainWork(const FusedQkvRopeCacheParams& p, const FusedQkvPlan& plan,
                                int wave_size) {
  FusedQkvPlainWork w;
  const int32_t size = static_cast<int32_t>(SizeOf(p.dtype));
  const int32_t piece_size = plan.block_tokens != 0 ? kPieceSize : plan.piece_size;
  w.num_tokens = static_cast<int32_t>(p.num_tokens);
  w.head_bytes = static_cast<int32_t>(p.head_dim) * size;
  w.num_pieces = static_cast<int32_t>(p.head_dim / piece_size);
  while (1 << w.lane_bits < CeilDiv(w.num_pieces, 2)) ++w.lane_bits;
  w.rotated_slots = static_cast<int32_t>(p.rotary_dim / (2 * piece_size));
  w.other_slots = static_cast<int32_t>(CeilDiv(w.num_pieces - 2 * w.rotated_slots, 2));
  w.qkv = p.qkv;
  w.token_bytes = p.columns() * size;
  for (int kind = 0; kind < kNumQkvKinds; ++kind) {
    const QkvPart part = MakePart(p, static_cast<QkvKind>(kind));
    QkvPlainPart& made = w.parts[kind];
    made.out = part.out;
    made.weight = part.weight;
    made.num_heads = part.num_heads;
    made.first_item = w.items_per_token;
    made.first_column = part.first_column * size;
    made.column_stride = part.column_stride * size;
    made.computed = part.normalized || part.rotated;
    made.rotated = part.rotated;
    w.normalizes |= part.normalized;
    w.items_per_token +=
        static_cast<int32_t>(CeilDiv(int64_t{part.num_heads} << w.lane_bits, wave_size));
  }
  w.tokens_of_items = Divider::Of(static_cast<uint32_t>(std::max(w.items_per_token, 1)));
  w.block_tokens = plan.block_tokens;
  if (plan.block_tokens != 0) {
    w.storing_blocks = static_cast<int32_t>(CeilDiv(p.num_tokens, plan.block_tokens));
    w.item_tokens = plan.item_tokens;
  }
  w.positions = p.positions.data;
  w.offsets = p.offsets.data;
  w.cos = static_cast<const float*>(p.cos.data);
  w.sin = static_cast<const float*>(p.sin.data);
  w.max_positions = static_cast<int32_t>(std::min<int64_t>(p.max_positions, INT32_MAX));
  w.table_width = static_cast<int32_t>(p.table_width);
  w.epsilon = p.epsilon;
  w.weight_offset = p.weight_offset;
  w.inverse_size = 1.0f / static_cast<float>(p.head_dim);
  w.stored_dtype = p.k_pages.dtype;
  w.slots = p.slots_32.data;
  w.layer = p.layer.data;
  w.capacity = p.num_pages * p.page_size;
  w.num_layers = std::max<int64_t>(p.num_layers, 1);
  w.page_size = p.page_size;
  w.pages_of_slots = Divider::Of(static_cast<uint32_t>(p.page_size));
  w.pages[0] = MakePages(p.k_pages, p.k_scale, p.k_scales_out);
  w.pages[1] = MakePages(p.v_pages, p.v_scale, p.v_scales_out);
  return w;
}

QkvBatch MakeBatch(const FusedQkvRopeCacheParams& p) {
  QkvBatch batch;
  batch.shape = p.batch;
  batch.qkv = p.qkv_batch;
  batch.slots = p.slots_64.data != nullptr ? p.slots_64.batch : p.slots_32.batch;
  batch.layer = p.layer.batch;
  batch.positions = p.positions.batch;
  batch.offsets = p.offsets.batch;
  batch.cos = p.cos.batch;
  batch.sin = p.sin.batch;
  batch.weights[0] = p.q_weight.batch;
  batch.weights[1] = p.k_weight.batch;
  batch.scales[0] = p.k_scale.batch;
  batch.scales[1] = p.v_scale.batch;
  batch.pages[0] = p.k_pages.batch_stride;
  batch.pages[1] = p.v_pages.batch_stride;
  batch.dynamic_scales[0] = p.k_scales_out.batch_stride;
  batch.dynamic_scales[1] = p.v_scales_out.batch_stride;
  return batch;
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
  const QkvKernel kernel = KernelOf(p);
  LaunchShape shape;
  shape.threads = static_cast<unsigned>(plan.threads);
  if (plan.block_tokens != 0) shape.shared_bytes = kBlockSlotsBytes;
  Error error = kSuccess;
  if (IsPlain(kernel)) {
    FusedQkvPlainWork work = MakePlainWork(p, plan, device.wave_size);
    int64_t blocks = CeilDiv(p.num_tokens * work.items_per_token, plan.threads / device.wave_size);
    if (plan.block_tokens != 0) {
      const int kinds = p.gate == GateLayout::kNone ? 1 : 2;
      blocks = work.storing_blocks + CeilDiv(p.num_tokens, plan.item_tokens) * kinds;
    }
    shape.blocks = static_cast<unsigned>(blocks);
    void* args[] = {&work};
    const int piece_size = plan.block_tokens != 0 ? 0 : plan.piece_size;
    error = Launch(FindKernel(p.dtype, kernel, piece_size), shape, stream, args);
  } else {
    FusedQkvWork work = MakeWork(p, kernel, plan, device.wave_size);
    QkvBatch batch = MakeBatch(p);
    shape.blocks = static_cast<unsigned>(p.batch.count * work.blocks);
    void* args[] = {&work, &batch};
    error = Launch(FindKernel(p.dtype, kernel, 0), shape, stream, args);
  }
  return error == kSuccess ? ""
                           : std::string("a kernel could not be launched: ") + ErrorString(error);
}

}  // namespace jax_attn::gpu
