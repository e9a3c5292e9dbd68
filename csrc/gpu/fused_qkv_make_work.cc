// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "fused_qkv_make_work.h"

#include <algorithm>
#include <cstdint>

#include "fused_qkv_kernels.h"

namespace jax_attn::gpu {
namespace {

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

}  // namespace

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

FusedQkvFewWork MakeFewWork(const FusedQkvRopeCacheParams& p, const FusedQkvPlan& plan) {
  const FusedQkvPlainWork plain = MakePlainWork(p, plan, kFusedQkvFewThreads);
  const QkvPlainPart &queries = plain.parts[kQueries], &keys = plain.parts[kKeys],
                     &values = plain.parts[kValues];
  FusedQkvFewWork w;
  w.qkv = p.qkv;
  w.slots = p.slots_32.data;
  w.positions = queries.rotated ? plain.positions : w.slots;
  w.num_tokens = plain.num_tokens;
  w.num_q_heads = queries.num_heads;
  w.num_qk_heads = queries.num_heads + keys.num_heads;
  w.num_heads = w.num_qk_heads + values.num_heads;
  w.token_bytes = static_cast<int32_t>(plain.token_bytes);
  w.head_bytes = plain.head_bytes;
  w.lane_bits = plain.lane_bits;
  w.blocks_per_token =
      static_cast<int32_t>(CeilDiv(int64_t{w.num_heads} << w.lane_bits, kFusedQkvFewThreads));
  w.tokens_of_blocks = Divider::Of(static_cast<uint32_t>(w.blocks_per_token));
  w.rotated_slots = plain.rotated_slots;
  w.other_slots = plain.other_slots;
  w.num_pieces = plain.num_pieces;
  w.normalizes = p.norm_scope != NormScope::kNone;
  w.normalizes_values = values.computed;
  w.weighs_queries = queries.weight != nullptr;
  w.weighs_keys = keys.weight != nullptr;
  w.q_weight = w.weighs_queries ? queries.weight : p.qkv;
  w.k_weight = w.weighs_keys ? keys.weight : p.qkv;
  // Without a table, the first head of the first token.
  w.cos = queries.rotated ? plain.cos : static_cast<const float*>(p.qkv);
  w.sin = queries.rotated ? plain.sin : static_cast<const float*>(p.qkv);
  w.last_position = queries.rotated ? plain.max_positions - 1 : 0;
  w.table_width = plain.table_width;
  w.offsets = plain.offsets != nullptr ? plain.offsets : w.slots;
  w.offset_mask = plain.offsets != nullptr ? ~0 : 0;
  w.layer = plain.layer != nullptr ? plain.layer : w.slots;
  w.layer_mask = plain.layer != nullptr ? ~0 : 0;
  w.epsilon = plain.epsilon;
  w.weight_offset = plain.weight_offset;
  w.inverse_size = plain.inverse_size;
  w.q_token_bytes = queries.num_heads * w.head_bytes;
  w.kv_token_bytes = keys.num_heads * w.head_bytes;
  w.num_layers = static_cast<int32_t>(std::min<int64_t>(plain.num_layers, INT32_MAX));
  const int64_t size = SizeOf(p.dtype), head_stride = p.k_pages.head_stride * size;
  const int64_t q_heads = w.num_q_heads, qk_heads = w.num_qk_heads;
  w.query = static_cast<char*>(p.query);
  w.key = static_cast<char*>(p.key) - q_heads * w.head_bytes;
  w.value = static_cast<char*>(p.value) - qk_heads * w.head_bytes;
  w.k_pages = static_cast<char*>(p.k_pages.data) - q_heads * head_stride;
  w.v_pages = static_cast<char*>(p.v_pages.data) - qk_heads * head_stride;
  w.layer_stride = p.k_pages.layer_stride * size;
  w.page_stride = p.k_pages.page_stride * size;
  w.token_stride = p.k_pages.token_stride * size;
  w.head_stride = head_stride;
  w.pages_of_slots = plain.pages_of_slots;
  w.page_size = static_cast<int32_t>(p.page_size);
  w.capacity = static_cast<int32_t>(plain.capacity);
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

}  // namespace jax_attn::gpu
