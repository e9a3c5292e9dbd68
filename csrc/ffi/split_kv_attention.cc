// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "split_kv_attention.h"

#include <string>

#include "../capability.h"
#include "operand_reader.h"

namespace jax_attn {
namespace {

constexpr std::string_view kOp = "split_kv_attention";

// Reads buffers into params one by one; keeps the first disagreement that it finds.
class Reader : OperandReader {
 public:
  Reader(const SplitKvAttentionAttrs& attrs, SplitKvAttentionParams& params)
      : OperandReader(kOp, params.batch), attrs_(attrs), p_(params) {}

  ffi::Error Read(std::string_view platform, ffi::AnyBuffer query, ffi::AnyBuffer key,
                  ffi::AnyBuffer value, ffi::RemainingArgs rest, ffi::AnyBuffer out,
                  ffi::AnyBuffer lse) {
    ReadOptions();
    ReadResults(out, lse);
    if (failed()) return ToError();
    ReadQuery(query);
    ReadContext(key, value);
    if (failed()) return ToError();
    const std::string refusal = Refusal(kOp, platform, p_.query_dtype, p_.key.dtype, p_.head_dim,
                                        p_.v_head_dim, p_.batch.num_dims);
    if (!refusal.empty()) return InvalidArgument(kOp, refusal);
    // kv_len of a paged context comes from the page table, so that one is read first.
    ForEachOperand(attrs_.operands, rest, [&](std::string_view name, ffi::AnyBuffer buffer) {
      if (name == "page_table") ReadPageTable(buffer);
    });
    if (paged() && p_.page_table.data == nullptr) Fail("page_table is missing");
    if (failed()) return ToError();
    ForEachOperand(attrs_.operands, rest, [&](std::string_view name, ffi::AnyBuffer buffer) {
      ReadOptional(name, buffer);
    });
    if (has_layers_ && p_.layer.data == nullptr) Fail("layer is missing");
    if (failed()) return ToError();
    return ffi::Error::Success();
  }

 private:
  bool paged() const { return attrs_.page_layout != 0; }

  void ReadOptions() {
    p_.scale = attrs_.scale;
    p_.sliding_window = attrs_.sliding_window;
    p_.logits_soft_cap = attrs_.logits_soft_cap;
    p_.num_splits = attrs_.num_splits;
    p_.split_size = attrs_.split_size;
    p_.lse_includes_sinks = attrs_.lse_includes_sinks;
    p_.causal = static_cast<Causal>(attrs_.causal);
    constexpr int64_t kMax = int64_t{1} << 40;  // leaves room for sums of such numbers
    ExpectRange("causal", attrs_.causal, 0, 2);
    ExpectRange("sliding_window", attrs_.sliding_window, 0, kMax);
    ExpectRange("num_splits", attrs_.num_splits, 0, kMax);
    ExpectRange("split_size", attrs_.split_size, 0, kMax);
    ExpectRange("page_layout", attrs_.page_layout, 0, 2);
    ExpectRange("k_scale_rank", attrs_.k_scale_rank, 0, 4);
    ExpectRange("v_scale_rank", attrs_.v_scale_rank, 0, 4);
  }

  // The results have all batch dimensions, so they say what the operands broadcast to.
  void ReadResults(ffi::AnyBuffer out, ffi::AnyBuffer lse) {
    const Dimensions dims = out.dimensions();
    const int64_t rank = dims.size();
    if (rank < 4 || rank - 3 > kMaxBatchDims) {
      return Expect("out", dims, false, "[batch..., query_len, num_q_heads, v_head_dim]");
    }
    SetBatch(dims, rank - 3);
    p_.query_len = dims[rank - 3];
    p_.num_q_heads = dims[rank - 2];
    p_.v_head_dim = dims[rank - 1];
    bool agrees = static_cast<int64_t>(lse.dimensions().size()) == rank - 1;
    for (int64_t d = 0; agrees && d < rank - 1; ++d) agrees = lse.dimensions()[d] == dims[d];
    Expect("lse", lse.dimensions(), agrees, "that of out without v_head_dim");
    ExpectType("lse", lse, ffi::DataType::F32);
    p_.query_dtype = TypeOf("out", out);
    p_.out = out.untyped_data();
    p_.lse = reinterpret_cast<float*>(lse.untyped_data());
  }

  void ReadQuery(ffi::AnyBuffer query) {
    const Dimensions dims = query.dimensions();
    const int64_t rank = dims.size();
    if (rank < 4) return Expect("query", dims, false, "[batch, query_len, num_q_heads, head_dim]");
    p_.head_dim = dims[rank - 1];
    Expect("query", dims, dims[rank - 3] == p_.query_len && dims[rank - 2] == p_.num_q_heads,
           "query_len and num_q_heads of out");
    p_.query_batch = ReadBatch("query", dims, 3, true);
    if (TypeOf("query", query) != p_.query_dtype) Fail("query and out differ in type");
    p_.query = query.untyped_data();
  }

  // Sets the strides inside a sequence, or a pool of pages, of an array whose last dimension is
  // `elements` long: head_dim, or 1 for a scale.
  template <typename Kv>
  void SetStrides(Kv& kv, int64_t elements) {
    if (attrs_.page_layout == 2) {
      kv.token_stride = elements;
      kv.head_stride = p_.page_size * elements;
    } else {
      kv.head_stride = elements;
      kv.token_stride = p_.num_kv_heads * elements;
    }
    if (paged()) {
      kv.page_stride = p_.page_size * p_.num_kv_heads * elements;
      kv.layer_stride = has_layers_ ? p_.num_pages * kv.page_stride : 0;
    }
  }

  void ReadContext(ffi::AnyBuffer key, ffi::AnyBuffer value) {
    const Dimensions dims = key.dimensions();
    const int64_t rank = dims.size();
    if (rank < 4) return Expect("key", dims, false, "at least 4 dimensions");
    has_layers_ = HasName(attrs_.operands, "layer");
    const int64_t core_rank = paged() ? (has_layers_ ? 5 : 4) : 3;
    if (rank < core_rank) return Expect("key", dims, false, "a layer axis");
    const bool head_major = attrs_.page_layout == 2;
    p_.num_kv_heads = dims[head_major ? rank - 3 : rank - 2];
    const int64_t tokens = dims[head_major ? rank - 2 : rank - 3];
    if (paged()) {
      p_.page_size = tokens;
      p_.num_pages = dims[rank - 4];
      p_.num_layers = has_layers_ ? dims[rank - 5] : 0;
      Expect("key", dims, p_.page_size > 0, "a page_size of at least 1");
      Expect("key", dims, !has_layers_ || p_.num_layers > 0, "at least one layer");
    } else {
      p_.kv_len = tokens;
    }
    if (p_.num_kv_heads == 0 || p_.num_q_heads % p_.num_kv_heads != 0) {
      return Expect("key", dims, false,
                    "num_kv_heads that divides num_q_heads=" + std::to_string(p_.num_q_heads));
    }
    const Dimensions v_dims = value.dimensions();
    const int64_t v_rank = v_dims.size();
    bool agrees = v_rank >= core_rank && v_dims[v_rank - 1] == p_.v_head_dim;
    for (int64_t d = 2; agrees && d <= core_rank; ++d)
      agrees = v_dims[v_rank - d] == dims[rank - d];
    Expect("value", v_dims, agrees, "that of key, with v_head_dim of out");
    Expect("key", dims, dims[rank - 1] == p_.head_dim, "head_dim of query");
    if (failed()) return;
    p_.key.batch = ReadBatch("key", dims, core_rank, !paged());
    p_.value.batch = ReadBatch("value", v_dims, core_rank, !paged());
    SetStrides(p_.key, p_.head_dim);
    SetStrides(p_.value, p_.v_head_dim);
    p_.key.dtype = TypeOf("key", key);
    p_.value.dtype = TypeOf("value", value);
    if (p_.key.dtype != p_.value.dtype) Fail("key and value differ in type");
    p_.key.data = key.untyped_data();
    p_.value.data = value.untyped_data();
  }

  void ReadPageTable(ffi::AnyBuffer buffer) {
    const Dimensions dims = buffer.dimensions();
    if (!paged()) return Fail("page_table is given, but page_layout is 0");
    if (dims.size() < 2) return Expect("page_table", dims, false, "[batch, max_pages]");
    ExpectType("page_table", buffer, ffi::DataType::S32);
    p_.page_table.batch = ReadBatch("page_table", dims, 1, true);
    p_.page_table.data = reinterpret_cast<const int32_t*>(buffer.untyped_data());
    p_.kv_len = dims[dims.size() - 1] * p_.page_size;
    if (p_.num_pages == 0 && p_.kv_len > 0) Fail("there are no pages, but page_table lists some");
  }

  void ReadOptional(std::string_view name, ffi::AnyBuffer buffer) {
    if (name == "page_table") return;
    if (name == "bias") {
      return ReadBias(buffer, p_.num_q_heads, p_.query_len, p_.kv_len, p_.bias);
    }
    if (name == "mask") {
      ExpectType(name, buffer, ffi::DataType::PRED);
      return ReadRows(name, buffer, p_.num_q_heads, p_.query_len, p_.kv_len, p_.mask);
    }
    if (name == "k_scale") return ReadScale(name, buffer, attrs_.k_scale_rank, p_.k_scale);
    if (name == "v_scale") return ReadScale(name, buffer, attrs_.v_scale_rank, p_.v_scale);
    if (name == "kv_lengths") {
      return ReadVector(name, buffer, ffi::DataType::S32, 0, true, p_.kv_lengths);
    }
    if (name == "query_offset") {
      return ReadVector(name, buffer, ffi::DataType::S32, 0, true, p_.query_offset);
    }
    if (name == "layer") return ReadVector(name, buffer, ffi::DataType::S32, 0, false, p_.layer);
    if (name == "alibi_slopes") {
      return ReadVector(name, buffer, ffi::DataType::F32, 1, false, p_.alibi_slopes);
    }
    if (name == "sinks") return ReadVector(name, buffer, ffi::DataType::F32, 1, false, p_.sinks);
    Fail("there is no operand called " + std::string(name));
  }

  // Operands of one number, or one per query head, in each batch index.
  template <typename T>
  void ReadVector(std::string_view name, ffi::AnyBuffer buffer, ffi::DataType type,
                  int64_t core_rank, bool has_batch, Operand<T>& operand) {
    const Dimensions dims = buffer.dimensions();
    ExpectType(name, buffer, type);
    if (core_rank == 1) {
      Expect(name, dims, dims.size() >= 1 && dims[dims.size() - 1] == p_.num_q_heads,
             "num_q_heads=" + std::to_string(p_.num_q_heads));
    }
    operand.batch = ReadBatch(name, dims, core_rank, has_batch);
    operand.data = reinterpret_cast<const T*>(buffer.untyped_data());
  }

  void ReadScale(std::string_view name, ffi::AnyBuffer buffer, int64_t rank, ScaleOperand& scale) {
    const Dimensions dims = buffer.dimensions();
    const int64_t all = dims.size();
    ExpectType(name, buffer, ffi::DataType::F32);
    const int64_t per_token_rank = paged() ? (has_layers_ ? 4 : 3) : 3;
    bool agrees = all >= rank;
    bool has_batch = false;
    if (rank == 0) {
    } else if (rank <= (has_layers_ ? 2 : 1)) {
      agrees = agrees && dims[all - 1] == p_.num_kv_heads &&
               (rank == 1 || dims[all - 2] == p_.num_layers);
      scale.head_stride = 1;
      scale.layer_stride = rank == 2 ? p_.num_kv_heads : 0;
    } else if (rank == per_token_rank) {
      const bool head_major = attrs_.page_layout == 2;
      agrees = agrees && dims[all - (head_major ? 2 : 1)] == p_.num_kv_heads &&
               dims[all - (head_major ? 1 : 2)] == (paged() ? p_.page_size : p_.kv_len) &&
               (!paged() || dims[all - 3] == p_.num_pages) &&
               (!has_layers_ || dims[all - 4] == p_.num_layers);
      has_batch = !paged();
      SetStrides(scale, 1);
    } else {
      agrees = false;
    }
    Expect(name, dims, agrees, "a scalar, [num_kv_heads], or that of key without head_dim");
    if (failed()) return;
    scale.batch = ReadBatch(name, dims, has_batch ? rank - 1 : rank, has_batch);
    scale.data = reinterpret_cast<const float*>(buffer.untyped_data());
  }

  const SplitKvAttentionAttrs& attrs_;
  SplitKvAttentionParams& p_;
  bool has_layers_ = false;
};

}  // namespace

ffi::Error MakeSplitKvAttentionParams(const SplitKvAttentionAttrs& attrs, std::string_view platform,
                                      ffi::AnyBuffer query, ffi::AnyBuffer key,
                                      ffi::AnyBuffer value, ffi::RemainingArgs rest,
                                      ffi::Result<ffi::AnyBuffer> out,
                                      ffi::Result<ffi::AnyBuffer> lse,
                                      ffi::Result<ffi::BufferR1<ffi::F32>> workspace,
                                      SplitKvAttentionParams& params) {
  params.workspace = workspace->typed_data();
  params.workspace_size = workspace->element_count();
  return Reader(attrs, params).Read(platform, query, key, value, rest, *out, *lse);
}

}  // namespace jax_attn
