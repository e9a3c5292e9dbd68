// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "fused_qkv_rope_cache.h"

#include <string>

#include "../capability.h"
#include "buffer_reader.h"

namespace jax_attn {
namespace {

constexpr std::string_view kOp = "fused_qkv_rope_cache";

int64_t Last(Dimensions dims, int64_t i) { return dims[dims.size() - i]; }

// Reads buffers into params one by one; keeps the first disagreement that it finds.
class Reader : BufferReader {
 public:
  Reader(const FusedQkvRopeCacheAttrs& attrs, FusedQkvRopeCacheParams& params)
      : attrs_(attrs), p_(params) {}

  ffi::Error Read(std::string_view platform, const FusedQkvRopeCacheBuffers& buffers) {
    ReadOptions();
    if (failed()) return Status(kOp);
    ReadHeads(buffers);
    if (failed()) return Status(kOp);
    ReadPages("k_pages", buffers.k_pages, buffers.k_pages_out, p_.head_dim, p_.k_pages);
    ReadPages("v_pages", buffers.v_pages, buffers.v_pages_out, p_.v_head_dim, p_.v_pages);
    if (failed()) return Status(kOp);
    if (p_.k_pages.dtype != p_.v_pages.dtype) Fail("k_pages and v_pages differ in type");
    ReadQkv(buffers.qkv);
    ReadSlots(buffers.slot_mapping);
    if (failed()) return Status(kOp);
    // The batch dimension that other operations have is missing here.
    const std::string refusal = Refusal(kOp, platform, p_.dtype, p_.k_pages.dtype, p_.head_dim,
                                        p_.v_head_dim, p_.batch.num_dims + 1);
    if (!refusal.empty()) return InvalidArgument(kOp, refusal);
    ForEachOperand(
        attrs_.operands, buffers.rest,
        [&](std::string_view name, ffi::AnyBuffer buffer) { ReadOptional(name, buffer); });
    if (p_.rotary_dim != 0) {
      if (p_.cos.data == nullptr || p_.sin.data == nullptr) Fail("cos or sin is missing");
      if (p_.positions.data == nullptr) Fail("positions are missing");
    }
    if (p_.num_layers != 0 && p_.layer.data == nullptr) Fail("layer is missing");
    ReadMoreResults(buffers.more);
    return Status(kOp);
  }

 private:
  bool head_major() const { return attrs_.page_layout == 2; }

  void ReadOptions() {
    ExpectRange("gate", attrs_.gate, 0, 2);
    ExpectRange("page_layout", attrs_.page_layout, 1, 2);
    ExpectRange("rotary_dim", attrs_.rotary_dim, 0, 1 << 16);
    ExpectRange("rotary_dim modulo 2", attrs_.rotary_dim % 2, 0, 0);
    ExpectRange("norm_scope", attrs_.norm_scope, 0, 2);
    ExpectRange("k_scale_rank", attrs_.k_scale_rank, 0, 4);
    ExpectRange("v_scale_rank", attrs_.v_scale_rank, 0, 4);
    const int64_t sections[] = {attrs_.mrope_temporal, attrs_.mrope_height, attrs_.mrope_width};
    int64_t pairs = 0;
    for (int i = 0; i < 3; ++i) {
      ExpectRange("an M-RoPE section", sections[i], 0, attrs_.rotary_dim);
      p_.mrope_sections[i] = sections[i];
      pairs += sections[i];
    }
    p_.has_mrope = pairs != 0;
    if (p_.has_mrope) {
      ExpectRange("the sum of M-RoPE sections", pairs, attrs_.rotary_dim / 2,
                  attrs_.rotary_dim / 2);
    }
    p_.gate = static_cast<GateLayout>(attrs_.gate);
    p_.rotary_dim = attrs_.rotary_dim;
    p_.interleaved = attrs_.interleaved;
    p_.nope_first = attrs_.nope_first;
    p_.full_width_table = attrs_.full_width_table;
    p_.table_width = attrs_.full_width_table ? attrs_.rotary_dim : attrs_.rotary_dim / 2;
    p_.mrope_interleaved = attrs_.mrope_interleaved;
    p_.norm_scope = static_cast<NormScope>(attrs_.norm_scope);
    p_.normalize_v = attrs_.normalize_v;
    p_.epsilon = attrs_.epsilon;
    p_.weight_offset = attrs_.weight_offset;
  }

  // The results have all dimensions of vmap, so they say what the operands broadcast to.
  void ReadHeads(const FusedQkvRopeCacheBuffers& buffers) {
    const Dimensions dims = buffers.query.dimensions();
    const int64_t rank = dims.size();
    if (rank < 3 || rank - 3 > kMaxBatchDims) {
      return Expect("query", dims, false, "[batch..., tokens, num_q_heads, head_dim]");
    }
    p_.batch.num_dims = static_cast<int>(rank - 3);
    for (int64_t d = 0; d < rank - 3; ++d) {
      p_.batch.sizes[d] = dims[d];
      p_.batch.count *= dims[d];
    }
    p_.num_tokens = Last(dims, 3);
    p_.num_q_heads = Last(dims, 2);
    p_.head_dim = Last(dims, 1);
    p_.dtype = FloatType("query", buffers.query);
    const Dimensions key = buffers.key.dimensions(), value = buffers.value.dimensions();
    ExpectLike("key", key, dims);
    if (failed()) return;
    p_.num_kv_heads = Last(key, 2);
    Expect("key", key, Last(key, 1) == p_.head_dim, "head_dim of query");
    ExpectLike("value", value, dims);
    if (failed()) return;
    p_.v_head_dim = Last(value, 1);
    Expect("value", value, Last(value, 2) == p_.num_kv_heads, "num_kv_heads of key");
    for (ffi::AnyBuffer buffer : {buffers.key, buffers.value}) {
      if (FloatType("a result", buffer) != p_.dtype) Fail("query, key and value differ in type");
    }
    ExpectRange("rotary_dim", p_.rotary_dim, 0, p_.head_dim);
    p_.query = buffers.query.untyped_data();
    p_.key = buffers.key.untyped_data();
    p_.value = buffers.value.untyped_data();
  }

  // As many dimensions as query, and the same but for the last two.
  void ExpectLike(std::string_view name, Dimensions dims, Dimensions query) {
    bool agrees = dims.size() == query.size();
    for (size_t d = 0; agrees && d + 2 < dims.size(); ++d) agrees = dims[d] == query[d];
    Expect(name, dims, agrees, "dimensions and tokens of query");
  }

  void ReadPages(const char* name, ffi::AnyBuffer in, ffi::AnyBuffer out, int64_t head_dim,
                 PagesOperand& pages) {
    const bool has_layers = HasName(attrs_.operands, "layer");
    const Dimensions dims = out.dimensions();
    const int64_t core_rank = has_layers ? 5 : 4;
    bool agrees = static_cast<int64_t>(dims.size()) == core_rank + p_.batch.num_dims;
    for (int d = 0; agrees && d < p_.batch.num_dims; ++d) agrees = dims[d] == p_.batch.sizes[d];
    Expect(name, dims, agrees, core_rank, " dimensions behind all dimensions of vmap");
    ExpectSame(name, in, out);
    if (failed()) return;
    const int64_t heads = Last(dims, head_major() ? 3 : 2);
    const int64_t page_size = Last(dims, head_major() ? 2 : 3);
    if (p_.page_size == 0) {
      p_.page_size = page_size;
      p_.num_pages = Last(dims, 4);
      p_.num_layers = has_layers ? Last(dims, 5) : 0;
    }
    Expect(name, dims, Last(dims, 1) == head_dim, "a last dimension of ", head_dim);
    Expect(name, dims, heads == p_.num_kv_heads, "num_kv_heads of key");
    Expect(name, dims, page_size > 0, "a page_size of at least 1");
    Expect(name, dims, !has_layers || Last(dims, 5) > 0, "at least one layer");
    Expect(name, dims,
           page_size == p_.page_size && Last(dims, 4) == p_.num_pages &&
               (!has_layers || Last(dims, 5) == p_.num_layers),
           "the pages of k_pages");
    pages.head_stride = head_major() ? page_size * head_dim : head_dim;
    pages.token_stride = head_major() ? head_dim : heads * head_dim;
    pages.page_stride = page_size * heads * head_dim;
    pages.layer_stride = has_layers ? Last(dims, 4) * pages.page_stride : 0;
    pages.batch_stride = Last(dims, 4) * pages.page_stride * (has_layers ? Last(dims, 5) : 1);
    pages.dtype = TypeOf(name, out);
    pages.source = in.untyped_data();
    pages.data = out.untyped_data();
  }

  // A result that an argument is updated to.
  void ExpectSame(const char* name, ffi::AnyBuffer in, ffi::AnyBuffer out) {
    const Dimensions dims = in.dimensions(), expected = out.dimensions();
    bool agrees = dims.size() == expected.size();
    for (size_t d = 0; agrees && d < dims.size(); ++d) agrees = dims[d] == expected[d];
    Expect(name, dims, agrees, "that of the result, ", expected);
    if (in.element_type() != out.element_type()) {
      Fail(std::string(name) + " and its result differ in type");
    }
  }

  void ReadQkv(ffi::AnyBuffer qkv) {
    const Dimensions dims = qkv.dimensions();
    if (dims.size() < 2) return Expect("qkv", dims, false, "[tokens, columns]");
    Expect("qkv", dims, Last(dims, 2) == p_.num_tokens && Last(dims, 1) == p_.columns(), "[",
           p_.num_tokens, ", ", p_.columns(), "]");
    if (TypeOf("qkv", qkv) != p_.dtype) Fail("qkv and query differ in type");
    p_.qkv_batch = ReadBatch("qkv", dims, 2, p_.batch);
    p_.qkv = qkv.untyped_data();
  }

  void ReadSlots(ffi::AnyBuffer buffer) {
    if (buffer.element_type() == ffi::DataType::S64) {
      return ReadTokens("slot_mapping", buffer, ffi::DataType::S64, p_.slots_64);
    }
    ReadTokens("slot_mapping", buffer, ffi::DataType::S32, p_.slots_32);
  }

  // One number per token.
  template <typename T>
  void ReadTokens(std::string_view name, ffi::AnyBuffer buffer, ffi::DataType type,
                  Operand<T>& operand) {
    const Dimensions dims = buffer.dimensions();
    ExpectType(name, buffer, type);
    if (dims.size() < 1 || Last(dims, 1) != p_.num_tokens) {
      return Expect(name, dims, false, "tokens=", p_.num_tokens);
    }
    operand.batch = ReadBatch(name, dims, 1, p_.batch);
    operand.data = reinterpret_cast<const T*>(buffer.untyped_data());
  }

  void ReadOptional(std::string_view name, ffi::AnyBuffer buffer) {
    if (name == "layer") {
      ExpectType(name, buffer, ffi::DataType::S32);
      p_.layer.batch = ReadBatch(name, buffer.dimensions(), 0, p_.batch);
      p_.layer.data = reinterpret_cast<const int32_t*>(buffer.untyped_data());
      return;
    }
    if (name == "positions") return ReadPositions(buffer);
    if (name == "offsets") return ReadTokens(name, buffer, ffi::DataType::S32, p_.offsets);
    if (name == "cos") return ReadTable(name, buffer, p_.cos);
    if (name == "sin") return ReadTable(name, buffer, p_.sin);
    if (name == "q_weight") return ReadWeight(name, buffer, p_.num_q_heads, p_.q_weight);
    if (name == "k_weight") return ReadWeight(name, buffer, p_.num_kv_heads, p_.k_weight);
    if (name == "k_scale") {
      return ReadScale(name, buffer, attrs_.k_scale_rank, p_.k_pages, p_.head_dim, p_.k_scale);
    }
    if (name == "v_scale") {
      return ReadScale(name, buffer, attrs_.v_scale_rank, p_.v_pages, p_.v_head_dim, p_.v_scale);
    }
    Fail("there is no operand called " + std::string(name));
  }

  void ReadPositions(ffi::AnyBuffer buffer) {
    if (!p_.has_mrope) return ReadTokens("positions", buffer, ffi::DataType::S32, p_.positions);
    const Dimensions dims = buffer.dimensions();
    ExpectType("positions", buffer, ffi::DataType::S32);
    if (dims.size() < 2 || Last(dims, 2) != 3 || Last(dims, 1) != p_.num_tokens) {
      return Expect("positions", dims, false, "[3, ", p_.num_tokens, "]");
    }
    p_.positions.batch = ReadBatch("positions", dims, 2, p_.batch);
    p_.positions.data = reinterpret_cast<const int32_t*>(buffer.untyped_data());
  }

  void ReadTable(std::string_view name, ffi::AnyBuffer buffer, FloatOperand& table) {
    const Dimensions dims = buffer.dimensions();
    const bool agrees = dims.size() >= 2 && Last(dims, 1) == p_.table_width && Last(dims, 2) > 0 &&
                        (p_.max_positions == 0 || Last(dims, 2) == p_.max_positions);
    Expect(name, dims, agrees, "the same for cos and sin: [max_positions, ", p_.table_width, "]");
    if (failed()) return;
    p_.max_positions = Last(dims, 2);
    ReadFloats(name, buffer, 2, table);
  }

  void ReadWeight(std::string_view name, ffi::AnyBuffer buffer, int64_t heads,
                  FloatOperand& weight) {
    if (p_.norm_scope == NormScope::kNone) Fail(std::string(name) + " is given without a norm");
    const Dimensions dims = buffer.dimensions();
    const int64_t size = p_.norm_scope == NormScope::kAllHeads ? heads * p_.head_dim : p_.head_dim;
    Expect(name, dims, dims.size() >= 1 && Last(dims, 1) == size, "[", size, "]");
    if (!failed()) ReadFloats(name, buffer, 1, weight);
  }

  void ReadFloats(std::string_view name, ffi::AnyBuffer buffer, int64_t core_rank,
                  FloatOperand& operand) {
    operand.dtype = FloatType(name, buffer);
    operand.batch = ReadBatch(name, buffer.dimensions(), core_rank, p_.batch);
    operand.data = buffer.untyped_data();
  }

  bool per_token(int64_t rank) const { return rank == (p_.num_layers != 0 ? 4 : 3); }

  void ReadScale(std::string_view name, ffi::AnyBuffer buffer, int64_t rank,
                 const PagesOperand& pages, int64_t head_dim, ScaleOperand& scale) {
    const Dimensions dims = buffer.dimensions();
    const int64_t all = dims.size();
    const bool has_layers = p_.num_layers != 0;
    ExpectType(name, buffer, ffi::DataType::F32);
    bool agrees = all >= rank;
    if (rank == 0) {
    } else if (rank <= (has_layers ? 2 : 1)) {
      agrees = agrees && Last(dims, 1) == p_.num_kv_heads &&
               (rank == 1 || Last(dims, 2) == p_.num_layers);
      scale.head_stride = 1;
      scale.layer_stride = rank == 2 ? p_.num_kv_heads : 0;
    } else if (per_token(rank)) {
      agrees = agrees && Last(dims, head_major() ? 2 : 1) == p_.num_kv_heads &&
               Last(dims, head_major() ? 1 : 2) == p_.page_size && Last(dims, 3) == p_.num_pages &&
               (!has_layers || Last(dims, 4) == p_.num_layers);
      scale.head_stride = pages.head_stride / head_dim;
      scale.token_stride = pages.token_stride / head_dim;
      scale.page_stride = pages.page_stride / head_dim;
      scale.layer_stride = pages.layer_stride / head_dim;
    } else {
      agrees = false;
    }
    Expect(name, dims, agrees, "a scalar, [num_kv_heads], or that of the pages without head_dim");
    if (failed()) return;
    scale.batch = ReadBatch(name, dims, rank, p_.batch);
    scale.data = reinterpret_cast<const float*>(buffer.untyped_data());
    if (attrs_.dynamic_scales) ReadDynamicScale(name, buffer, rank);
  }

  void ReadDynamicScale(std::string_view name, ffi::AnyBuffer buffer, int64_t rank) {
    (name == "k_scale" ? k_scale_ : v_scale_) = buffer;
    if (!per_token(rank)) Fail(std::string(name) + " must have an entry per token to be written");
    if (SizeOf(p_.k_pages.dtype) != 1) Fail("dynamic_scales need quantised pages");
  }

  void ReadMoreResults(ffi::RemainingRets more) {
    const bool has_gate = p_.gate != GateLayout::kNone;
    const size_t expected = (has_gate ? 1 : 0) + (attrs_.dynamic_scales ? 2 : 0);
    if (more.size() != expected) {
      return Fail("there are " + std::to_string(more.size()) + " results after v_pages, expected " +
                  std::to_string(expected));
    }
    if (has_gate) {
      const ffi::AnyBuffer gate = *more.get<ffi::AnyBuffer>(0).value();
      bool agrees = static_cast<int>(gate.dimensions().size()) == p_.batch.num_dims + 3;
      agrees = agrees && static_cast<int64_t>(gate.element_count()) ==
                             p_.batch.count * p_.num_tokens * p_.num_q_heads * p_.head_dim;
      Expect("gate", gate.dimensions(), agrees, "that of query");
      if (TypeOf("gate", gate) != p_.dtype) Fail("gate and query differ in type");
      p_.gate_out = gate.untyped_data();
    }
    if (!attrs_.dynamic_scales || failed()) return;
    if (!k_scale_ || !v_scale_) return Fail("dynamic_scales need k_scale and v_scale");
    const auto read = [&](const char* name, ffi::AnyBuffer in, ffi::AnyBuffer out,
                          const PagesOperand& pages, int64_t head_dim, DynamicScales& scales) {
      ExpectSame(name, in, out);
      scales.source = reinterpret_cast<const float*>(in.untyped_data());
      scales.data = reinterpret_cast<float*>(out.untyped_data());
      scales.batch_stride = pages.batch_stride / head_dim;
      Expect(name, in.dimensions(),
             static_cast<int64_t>(in.element_count()) == p_.batch.count * scales.batch_stride,
             "all dimensions of vmap");
    };
    const size_t first = has_gate ? 1 : 0;
    read("k_scale", *k_scale_, *more.get<ffi::AnyBuffer>(first).value(), p_.k_pages, p_.head_dim,
         p_.k_scales_out);
    read("v_scale", *v_scale_, *more.get<ffi::AnyBuffer>(first + 1).value(), p_.v_pages,
         p_.v_head_dim, p_.v_scales_out);
  }

  const FusedQkvRopeCacheAttrs& attrs_;
  FusedQkvRopeCacheParams& p_;
  std::optional<ffi::AnyBuffer> k_scale_;
  std::optional<ffi::AnyBuffer> v_scale_;
};

}  // namespace

ffi::Error MakeFusedQkvRopeCacheParams(const FusedQkvRopeCacheAttrs& attrs,
                                       std::string_view platform,
                                       const FusedQkvRopeCacheBuffers& buffers,
                                       FusedQkvRopeCacheParams& params) {
  return Reader(attrs, params).Read(platform, buffers);
}

}  // namespace jax_attn
