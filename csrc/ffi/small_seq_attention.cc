// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "small_seq_attention.h"

#include <string>

#include "../capability.h"
#include "operand_reader.h"

namespace jax_attn {
namespace {

constexpr std::string_view kOp = "small_seq_attention";
constexpr std::string_view kBackwardOp = "small_seq_attention_backward";

// Reads what forward and backward have in common. A result with all dimensions of vmap, `out` or
// `dquery`, says what the operands broadcast to.
class Reader : OperandReader {
 public:
  Reader(std::string_view op, const SmallSeqAttentionAttrs& attrs, SmallSeqProblem& problem)
      : OperandReader(op, problem.batch), attrs_(attrs), p_(problem) {
    std::string_view names = attrs.operands;
    while (!names.empty()) packed_ |= NextName(names) == "query_cu_seqlens";
  }

  ffi::Error ReadForward(std::string_view platform, ffi::AnyBuffer query, ffi::AnyBuffer key,
                         ffi::AnyBuffer value, ffi::RemainingArgs rest, ffi::AnyBuffer out,
                         ffi::AnyBuffer lse, SmallSeqAttentionParams& params) {
    ReadProblem(platform, "out", out, query, key, value, rest);
    if (!failed()) ExpectRows("out", out.dimensions(), true);
    if (!failed()) ExpectRows("lse", lse.dimensions(), false);
    ExpectType("lse", lse, ffi::DataType::F32);
    if (failed()) return ToError();
    ReadRest(rest, [&](std::string_view, ffi::AnyBuffer) { return false; });
    params.out = out.untyped_data();
    params.lse = static_cast<float*>(lse.untyped_data());
    return ToError();
  }

  ffi::Error ReadBackward(std::string_view platform, ffi::AnyBuffer query, ffi::AnyBuffer key,
                          ffi::AnyBuffer value, ffi::RemainingArgs rest, ffi::AnyBuffer dquery,
                          ffi::AnyBuffer dkey, ffi::AnyBuffer dvalue, ffi::RemainingRets more,
                          SmallSeqBackwardParams& params) {
    ReadProblem(platform, "dquery", dquery, query, key, value, rest);
    if (failed()) return ToError();
    ReadRest(rest, [&](std::string_view name, ffi::AnyBuffer buffer) {
      if (name == "lse") {
        params.lse = ReadRowValues(name, buffer);
      } else if (name == "dlse") {
        params.dlse = ReadRowValues(name, buffer);
      } else if (name == "dout") {
        params.dout = ReadTokens(name, buffer, p_.query_tokens, p_.num_q_heads, p_.v_head_dim);
      } else {
        return false;
      }
      return true;
    });
    if (params.lse.data == nullptr) Fail("lse is missing");
    if (params.dout.data == nullptr) Fail("dout is missing");
    ExpectResult("dquery", dquery, p_.query_tokens, p_.num_q_heads, p_.head_dim);
    ExpectResult("dkey", dkey, p_.kv_tokens, p_.num_kv_heads, p_.head_dim);
    ExpectResult("dvalue", dvalue, p_.kv_tokens, p_.num_kv_heads, p_.v_head_dim);
    const bool has_bias = p_.bias.data != nullptr;
    if (more.size() != (has_bias ? 1 : 0)) {
      Fail("there are " + std::to_string(3 + more.size()) + " results, expected " +
           (has_bias ? "4 with a bias" : "3 without a bias"));
    }
    if (!failed() && has_bias) {
      ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> found = more.get<ffi::AnyBuffer>(0);
      if (!found.has_value()) return found.error();
      ffi::AnyBuffer dbias = **found;
      const Dimensions dims = dbias.dimensions();
      const int64_t logits[] = {p_.num_q_heads, p_.max_q_len, p_.max_kv_len};
      Expect("dbias", dims, AreDims(dims, p_.batch.num_dims, logits),
             "[batch..., num_q_heads, query_len, kv_len]");
      ExpectType("dbias", dbias, ffi::DataType::F32);
      params.dbias = static_cast<float*>(dbias.untyped_data());
    }
    params.dquery = dquery.untyped_data();
    params.dkey = dkey.untyped_data();
    params.dvalue = dvalue.untyped_data();
    return ToError();
  }

 private:
  // Dimensions of tokens without heads and vmap: B and T, or just one.
  int64_t token_dims() const { return packed_ ? 1 : 2; }
  // Dimensions of vmap.
  int64_t outer_dims() const { return p_.batch.num_dims - 1; }

  // Whether `dims` are `num_batch` dimensions of the batch, and then `core`.
  template <int kCount>
  bool AreDims(Dimensions dims, int64_t num_batch, const int64_t (&core)[kCount]) const {
    if (static_cast<int64_t>(dims.size()) != num_batch + kCount) return false;
    for (int64_t d = 0; d < num_batch; ++d) {
      if (dims[d] != p_.batch.sizes[d]) return false;
    }
    for (int64_t d = 0; d < kCount; ++d) {
      if (dims[num_batch + d] != core[d]) return false;
    }
    return true;
  }

  // `out` or `lse`: all dimensions of the batch, then those of the queries.
  void ExpectRows(std::string_view name, Dimensions dims, bool has_head_dim) {
    const int64_t num_batch = outer_dims() + token_dims() - 1;
    const bool agrees =
        has_head_dim ? AreDims(dims, num_batch, {p_.query_tokens, p_.num_q_heads, p_.v_head_dim})
                     : AreDims(dims, num_batch, {p_.query_tokens, p_.num_q_heads});
    Expect(name, dims, agrees,
           has_head_dim ? "that of query, with v_head_dim of value"
                        : "that of out without v_head_dim");
  }

  void ExpectResult(std::string_view name, ffi::AnyBuffer buffer, int64_t tokens, int64_t heads,
                    int64_t dim) {
    const int64_t num_batch = outer_dims() + token_dims() - 1;
    Expect(name, buffer.dimensions(), AreDims(buffer.dimensions(), num_batch, {tokens, heads, dim}),
           "that of " + std::string(name.substr(1)) + " with all batch dimensions");
    if (TypeOf(name, buffer) != p_.dtype) Fail(std::string(name) + " and query differ in type");
  }

  void ReadProblem(std::string_view platform, std::string_view result_name, ffi::AnyBuffer result,
                   ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                   ffi::RemainingArgs rest) {
    ReadOptions();
    // The number of packed sequences follows from where they begin and end.
    int64_t num_sequences = 0;
    ForEachOperand(attrs_.operands, rest, [&](std::string_view name, ffi::AnyBuffer buffer) {
      if (name != "query_cu_seqlens") return;
      const Dimensions dims = buffer.dimensions();
      const bool agrees = dims.size() >= 1 && dims[dims.size() - 1] >= 1;
      Expect(name, dims, agrees, "[batch + 1]");
      if (agrees) num_sequences = dims[dims.size() - 1] - 1;
    });
    ReadShapes(result_name, result.dimensions(), query.dimensions(), key.dimensions(),
               value.dimensions(), num_sequences);
    if (failed()) return;
    p_.dtype = TypeOf("query", query);
    for (const auto& [name, buffer] : {std::pair{"key", key}, std::pair{"value", value},
                                       std::pair{result_name.data(), result}}) {
      if (buffer.element_type() != query.element_type()) {
        Fail(std::string(name) + " and query differ in type");
      }
    }
    if (failed()) return;
    const std::string refusal =
        Refusal(kOp, platform, p_.dtype, p_.dtype, p_.head_dim, p_.v_head_dim, p_.batch.num_dims,
                p_.max_q_len, p_.max_kv_len);
    if (!refusal.empty()) return Fail(refusal);
    p_.query = ReadTokens("query", query, p_.query_tokens, p_.num_q_heads, p_.head_dim);
    p_.key = ReadTokens("key", key, p_.kv_tokens, p_.num_kv_heads, p_.head_dim);
    p_.value = ReadTokens("value", value, p_.kv_tokens, p_.num_kv_heads, p_.v_head_dim);
  }

  void ReadOptions() {
    p_.scale = attrs_.scale;
    p_.causal = static_cast<Causal>(attrs_.causal);
    p_.logits_soft_cap = attrs_.logits_soft_cap;
    ExpectRange("causal", attrs_.causal, 0, 2);
    constexpr int64_t kMax = int64_t{1} << 30;
    ExpectRange("max_q_len", attrs_.max_q_len, packed_ ? 1 : 0, packed_ ? kMax : 0);
    ExpectRange("max_kv_len", attrs_.max_kv_len, packed_ ? 1 : 0, packed_ ? kMax : 0);
  }

  void ReadShapes(std::string_view result_name, Dimensions result, Dimensions query, Dimensions key,
                  Dimensions value, int64_t num_sequences) {
    const int64_t core = token_dims() + 2;  // tokens, heads, head_dim
    const std::string_view tokens = packed_ ? "[tokens, " : "[batch, length, ";
    for (const auto& [name, dims] :
         {std::pair{"query", query}, std::pair{"key", key}, std::pair{"value", value}}) {
      const int64_t rank = dims.size();
      Expect(name, dims, rank >= core, tokens, "heads, head_dim]");
    }
    const int64_t rank = result.size();
    Expect(result_name, result, rank >= core && rank - core + 1 <= kMaxBatchDims, tokens,
           "heads, head_dim] with all batch dimensions");
    if (failed()) return;
    SetBatch(result, rank - core + (packed_ ? 0 : 1));
    if (packed_) {
      p_.batch.sizes[p_.batch.num_dims++] = num_sequences;
      p_.batch.count *= num_sequences;
    }
    p_.query_tokens = query[query.size() - 3];
    p_.kv_tokens = key[key.size() - 3];
    p_.max_q_len = packed_ ? attrs_.max_q_len : p_.query_tokens;
    p_.max_kv_len = packed_ ? attrs_.max_kv_len : p_.kv_tokens;
    p_.num_q_heads = query[query.size() - 2];
    p_.num_kv_heads = key[key.size() - 2];
    p_.head_dim = query[query.size() - 1];
    p_.v_head_dim = value[value.size() - 1];
    Expect("key", key, p_.num_kv_heads > 0 && p_.num_q_heads % p_.num_kv_heads == 0,
           "num_kv_heads that divides num_q_heads=", p_.num_q_heads);
  }

  // An array of queries or keys; heads and head_dim are its last dimensions.
  TokenOperand ReadTokens(std::string_view name, ffi::AnyBuffer buffer, int64_t tokens,
                          int64_t heads, int64_t dim) {
    const Dimensions dims = buffer.dimensions();
    const int64_t rank = dims.size();
    const bool agrees =
        rank >= 3 && dims[rank - 3] == tokens && dims[rank - 2] == heads && dims[rank - 1] == dim;
    Expect(name, dims, agrees, "[..., ", tokens, ", ", heads, ", ", dim, "]");
    if (TypeOf(name, buffer) != p_.dtype) Fail(std::string(name) + " and query differ in type");
    return {buffer.untyped_data(), ReadBatch(name, dims, 3, !packed_)};
  }

  // A float32 for each query and head.
  Operand<float> ReadRowValues(std::string_view name, ffi::AnyBuffer buffer) {
    const Dimensions dims = buffer.dimensions();
    const int64_t rank = dims.size();
    const bool agrees =
        rank >= 2 && dims[rank - 2] == p_.query_tokens && dims[rank - 1] == p_.num_q_heads;
    Expect(name, dims, agrees, "[..., ", p_.query_tokens, ", ", p_.num_q_heads, "]");
    ExpectType(name, buffer, ffi::DataType::F32);
    return {static_cast<const float*>(buffer.untyped_data()), ReadBatch(name, dims, 2, !packed_)};
  }

  // An int32 for each sequence, or one more.
  Operand<int32_t> ReadInts(std::string_view name, ffi::AnyBuffer buffer, int64_t more) {
    const Dimensions dims = buffer.dimensions();
    const int64_t rank = dims.size(), expected = p_.num_sequences() + more;
    Expect(name, dims, rank >= 1 && dims[rank - 1] == expected, "[..., ", expected, "]");
    ExpectType(name, buffer, ffi::DataType::S32);
    Operand<int32_t> ints{static_cast<const int32_t*>(buffer.untyped_data()),
                          ReadBatch(name, dims, 1, false)};
    ints.batch.strides[p_.batch.num_dims - 1] = 1;
    return ints;
  }

  // Calls visit(name, buffer) for operands that only one of the directions has.
  template <typename Visit>
  void ReadRest(ffi::RemainingArgs rest, Visit visit) {
    ForEachOperand(attrs_.operands, rest, [&](std::string_view name, ffi::AnyBuffer buffer) {
      if (name == "bias") {
        return ReadBias(buffer, p_.num_q_heads, p_.max_q_len, p_.max_kv_len, p_.bias);
      }
      if (name == "query_lengths") return void(p_.query_lengths = ReadInts(name, buffer, 0));
      if (name == "kv_lengths") return void(p_.kv_lengths = ReadInts(name, buffer, 0));
      if (name == "query_cu_seqlens") return void(p_.query_cu_seqlens = ReadInts(name, buffer, 1));
      if (name == "kv_cu_seqlens") {
        if (!packed_) Fail("kv_cu_seqlens is given without query_cu_seqlens");
        return void(p_.kv_cu_seqlens = ReadInts(name, buffer, 1));
      }
      if (!visit(name, buffer)) Fail("there is no operand called " + std::string(name));
    });
    if (packed_ && p_.kv_cu_seqlens.data == nullptr) Fail("kv_cu_seqlens is missing");
  }

  const SmallSeqAttentionAttrs& attrs_;
  SmallSeqProblem& p_;
  bool packed_ = false;
};

}  // namespace

ffi::Error MakeSmallSeqAttentionParams(const SmallSeqAttentionAttrs& attrs,
                                       std::string_view platform, ffi::AnyBuffer query,
                                       ffi::AnyBuffer key, ffi::AnyBuffer value,
                                       ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out,
                                       ffi::Result<ffi::AnyBuffer> lse,
                                       SmallSeqAttentionParams& params) {
  return Reader(kOp, attrs, params)
      .ReadForward(platform, query, key, value, rest, *out, *lse, params);
}

ffi::Error MakeSmallSeqBackwardParams(const SmallSeqAttentionAttrs& attrs,
                                      std::string_view platform, ffi::AnyBuffer query,
                                      ffi::AnyBuffer key, ffi::AnyBuffer value,
                                      ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> dquery,
                                      ffi::Result<ffi::AnyBuffer> dkey,
                                      ffi::Result<ffi::AnyBuffer> dvalue, ffi::RemainingRets more,
                                      SmallSeqBackwardParams& params) {
  return Reader(kBackwardOp, attrs, params)
      .ReadBackward(platform, query, key, value, rest, *dquery, *dkey, *dvalue, more, params);
}

}  // namespace jax_attn
