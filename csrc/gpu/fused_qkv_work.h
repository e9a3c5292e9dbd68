// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The fused QKV pass as its kernels see it: what the host can know is computed there, once.

#ifndef JAX_ATTN_CSRC_GPU_FUSED_QKV_WORK_H_
#define JAX_ATTN_CSRC_GPU_FUSED_QKV_WORK_H_

#include <cstdint>

#include "../fused_qkv_rope_cache.h"

namespace jax_attn::gpu {

// Elements that a lane reads and writes at once. A lane has two such pieces of a head.
inline constexpr int kPieceSize = 8;

// The most tokens of a storing block, and the shared memory in which it looks for duplicates.
inline constexpr int kMaxBlockTokens = 512;
inline constexpr int kBlockSlotsBytes = 20 * kMaxBlockTokens + 2048;

// The kernels. What a plain one cannot do costs others registers, and instructions that a call with
// few tokens would wait for.
enum class QkvKernel : int32_t {
  // What most models have; FamilyOf in the host code says what.
  kFew,             // few tokens, no gates, and a cache that holds heads as they are
  kFewOtherwise,    // few tokens with gates, or a cache of another type, scales or unlike strides
  kMany,            // many tokens
  kManyConverting,  // the same for a cache of another type, or with scales
  // All others.
  kHalves,      // whole pieces of the first half of the rotary dims pair with the second half's
  kNeighbours,  // pairs are inside a piece
  kAnywhere,    // any others; also the kernel for dimensions of vmap
};

constexpr bool IsPlain(QkvKernel kernel) { return kernel < QkvKernel::kHalves; }

// Division of numbers below 2^31 by a number that the host knows.
struct Divider {
  uint32_t magic = 1;
  uint32_t shift = 0;

  static constexpr Divider Of(uint32_t divisor) {
    Divider divider;
    while ((uint64_t{1} << divider.shift) < divisor) ++divider.shift;
    const uint64_t excess = (uint64_t{1} << divider.shift) - divisor;
    divider.magic = static_cast<uint32_t>((excess << 32) / divisor + 1);
    return divider;
  }
  constexpr uint32_t Divide(uint32_t n) const {
    return (static_cast<uint32_t>((uint64_t{magic} * n) >> 32) + n) >> shift;
  }
};

enum QkvKind : int { kQueries, kGates, kKeys, kValues, kNumQkvKinds };

// What the heads of a kind have in common.
struct QkvPart {
  void* out = nullptr;           // [batch, tokens, heads, head_dim]
  const void* weight = nullptr;  // null: none
  int32_t num_heads = 0;
  int32_t head_dim = 0;
  int32_t first_column = 0;
  int32_t column_stride = 0;  // between heads
  int32_t num_pieces = 0;     // of a head
  int32_t lane_bits = 0;      // 2^lane_bits lanes have a head
  int32_t rotated_slots = 0;  // of its lanes, those whose two pieces are the pairs of a rotation
  int32_t item_heads = 0;     // heads of an item
  float inverse_size = 0;     // 1 over the elements of a mean square
  DType weight_dtype = DType::kFloat32;
  bool normalized = false;
  bool over_all_heads = false;
  bool rotated = false;
};

// Pages of keys or values.
struct QkvPages {
  char* data = nullptr;
  int64_t layer_stride = 0;  // in elements, as the others
  int64_t page_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
  const float* scale = nullptr;  // null: none is given
  int64_t scale_layer_stride = 0;
  int64_t scale_page_stride = 0;
  int64_t scale_token_stride = 0;
  int64_t scale_head_stride = 0;
  float* dynamic_scale = nullptr;  // null: scales are given, or there are none
};

struct FusedQkvWork {
  // The first `storing_blocks` blocks compute keys and values of `block_tokens` tokens each, and
  // look for duplicates of their slots together. The others compute items: a wave each, of all
  // kinds if there are no storing blocks, and of queries and gates otherwise.
  int32_t num_tokens = 0;
  int32_t storing_blocks = 0;
  int32_t block_tokens = 0;
  int32_t blocks = 0;  // of a batch index
  Divider tokens_of_items;
  int32_t first_items[kNumQkvKinds + 1] = {};  // of a token, by kind; the last: all
  QkvPart parts[kNumQkvKinds];
  const void* qkv = nullptr;
  QkvPages pages[2];                  // of keys, of values
  const int32_t* slots_32 = nullptr;  // one of the two
  const int64_t* slots_64 = nullptr;
  const int32_t* layer = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* offsets = nullptr;
  const void* cos = nullptr;
  const void* sin = nullptr;
  int64_t capacity = 0;  // slots of a layer
  int64_t num_layers = 0;
  int64_t page_size = 0;
  Divider pages_of_slots;       // where slots are below 2^31, as they are in plain kernels
  bool has_small_slots = true;  // whether they are
  int64_t columns = 0;
  DType stored_dtype = DType::kFloat32;
  bool converts = false;  // what is stored has another type than qkv, or scales
  DType cos_dtype = DType::kFloat32;
  DType sin_dtype = DType::kFloat32;
  bool interleaved = false;
  bool full_width_table = false;
  bool has_mrope = false;
  bool mrope_interleaved = false;
  int32_t mrope_sections[3] = {};
  int32_t rotary_begin = 0;  // in the head
  int32_t rotary_piece = 0;  // the piece it is in
  int32_t rotary_dim = 0;
  int32_t max_positions = 0;
  int32_t table_width = 0;
  float epsilon = 0;
  float weight_offset = 0;
};

// What the heads of a kind have in common in plain kernels; offsets and strides in bytes.
struct QkvPlainPart {
  void* out = nullptr;
  const void* weight = nullptr;  // null: none
  int32_t num_heads = 0;
  int32_t first_item = 0;  // of a token
  int32_t first_column = 0;
  int32_t column_stride = 0;
  bool computed = false;
  bool rotated = false;
};

// The same as FusedQkvWork for the plain kernels.
struct FusedQkvPlainWork {
  int32_t num_tokens = 0;
  int32_t storing_blocks = 0;
  int32_t block_tokens = 0;
  int32_t items_per_token = 0;
  Divider tokens_of_items;
  int32_t item_tokens = 0;  // of other blocks if there are storing blocks
  int32_t lane_bits = 0;
  int32_t rotated_slots = 0;
  int32_t other_slots = 0;  // lanes whose pieces are not rotated
  int32_t num_pieces = 0;
  int32_t head_bytes = 0;
  const void* qkv = nullptr;
  int64_t token_bytes = 0;
  QkvPlainPart parts[kNumQkvKinds];
  const int32_t* positions = nullptr;
  const int32_t* offsets = nullptr;
  const float* cos = nullptr;
  const float* sin = nullptr;
  int32_t max_positions = 0;
  int32_t table_width = 0;
  float epsilon = 0;
  float weight_offset = 0;
  float inverse_size = 0;
  bool normalizes = false;
  DType stored_dtype = DType::kFloat32;
  const int32_t* slots = nullptr;
  const int32_t* layer = nullptr;
  int64_t capacity = 0;
  int64_t num_layers = 0;  // 1 without a layer axis
  int64_t page_size = 0;
  Divider pages_of_slots;
  QkvPages pages[2];
};

// The same for few tokens of a model without gates, whose heads follow each other and whose cache
// holds them as they are. Each line of parameters that a wave touches costs it some 40 ns, so these
// are few, in the order in which they are needed. Offsets and strides in bytes.
struct FusedQkvFewWork {
  const void* qkv = nullptr;
  // Where there is nothing to read: anything that can be read, and a mask that makes it 0.
  const int32_t* positions = nullptr;
  const int32_t* slots = nullptr;
  Divider tokens_of_blocks;
  int32_t blocks_per_token = 0;
  int32_t num_tokens = 0;
  int32_t num_heads = 0;  // of all kinds
  int32_t num_q_heads = 0;
  int32_t num_qk_heads = 0;
  int32_t token_bytes = 0;
  int32_t head_bytes = 0;
  int32_t lane_bits = 0;
  int32_t rotated_slots = 0;
  int32_t other_slots = 0;
  int32_t num_pieces = 0;
  bool normalizes = false;  // queries and keys
  bool normalizes_values = false;
  bool weighs_queries = false;
  bool weighs_keys = false;
  const void* q_weight = nullptr;
  const void* k_weight = nullptr;
  const float* cos = nullptr;
  const float* sin = nullptr;
  int32_t last_position = 0;
  int32_t table_width = 0;
  const int32_t* offsets = nullptr;
  const int32_t* layer = nullptr;
  int32_t offset_mask = 0;
  int32_t layer_mask = 0;
  float epsilon = 0;
  float weight_offset = 0;
  float inverse_size = 0;
  // Less what the heads before those of their kind would take.
  int32_t q_token_bytes = 0;
  int32_t kv_token_bytes = 0;
  int32_t num_layers = 0;  // 1 without a layer axis
  char* query = nullptr;
  char* key = nullptr;
  char* value = nullptr;
  char* k_pages = nullptr;
  char* v_pages = nullptr;
  int64_t page_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
  Divider pages_of_slots;
  int32_t page_size = 0;
  int32_t capacity = 0;
  int64_t layer_stride = 0;
};

// Dimensions of vmap, for the kernel that takes them.
struct QkvBatch {
  BatchShape shape;
  BatchStrides qkv;
  BatchStrides slots;
  BatchStrides layer;
  BatchStrides positions;
  BatchStrides offsets;
  BatchStrides cos;
  BatchStrides sin;
  BatchStrides weights[2];  // of queries, of keys
  BatchStrides scales[2];   // of keys, of values
  int64_t pages[2] = {};
  int64_t dynamic_scales[2] = {};
};

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_FUSED_QKV_WORK_H_
