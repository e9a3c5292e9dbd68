// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The XLA calls of small-sequence attention, the same for every backend.
//
// Target "jax_attn_small_seq_attention". Arguments: those of the arrays below that the call has, in
// this order; attribute `operands` names those after value, separated by commas. In front of the
// dimensions given here each may have the dimensions of vmap, which broadcast as in NumPy. Arrays
// are packed if there are cu_seqlens, and have one dimension of tokens instead of B and T, or S.
//
//   query             [B, T, N, H] or [tokens, N, H] f32, bf16, f16
//   key               [B, S, K, H] or [tokens, K, H], of query's type
//   value             like key, with Hv
//   bias              [#B, #N, #T, S] f32, bf16, f16       (#: that size or 1)
//   query_lengths     [B] s32
//   kv_lengths        [B] s32
//   query_cu_seqlens  [B + 1] s32; packed: T is max_q_len, and S is max_kv_len
//   kv_cu_seqlens     [B + 1] s32
//
// Results: out, query with Hv and all dimensions of vmap; lse f32, the same without Hv.
//
// Target "jax_attn_small_seq_attention_backward". Arguments: the same, and
//
//   lse               f32, as in the forward call
//   dout              like out
//   dlse              f32, like lse; absent if it is 0
//
// Results: dquery, dkey, dvalue, like the arguments, with all dimensions of vmap; and if there is a
// bias, dbias [..., B, N, T, S] f32, not summed over what the bias is broadcast to.

#ifndef JAX_ATTN_CSRC_FFI_SMALL_SEQ_ATTENTION_H_
#define JAX_ATTN_CSRC_FFI_SMALL_SEQ_ATTENTION_H_

#include <cstdint>
#include <string_view>
#include <utility>

#include "../small_seq_attention.h"
#include "check.h"

namespace jax_attn {

struct SmallSeqAttentionAttrs {
  std::string_view operands;
  std::string_view variant;  // kernel variant of the backend, empty for the best
  float scale;
  int32_t causal;         // 0 none, 1 bottom_right, 2 top_left
  float logits_soft_cap;  // 0: none
  int64_t max_q_len;      // 0 if and only if dense
  int64_t max_kv_len;
};

// `bind` already names what the backend needs from its context.
template <typename Binding>
auto SmallSeqAttentionSchema(Binding bind) {
  return std::move(bind)
      .template Arg<ffi::AnyBuffer>()  // query
      .template Arg<ffi::AnyBuffer>()  // key
      .template Arg<ffi::AnyBuffer>()  // value
      .RemainingArgs()
      .template Ret<ffi::AnyBuffer>()  // out
      .template Ret<ffi::AnyBuffer>()  // lse
      .template Attrs<SmallSeqAttentionAttrs>();
}

template <typename Binding>
auto SmallSeqBackwardSchema(Binding bind) {
  return std::move(bind)
      .template Arg<ffi::AnyBuffer>()  // query
      .template Arg<ffi::AnyBuffer>()  // key
      .template Arg<ffi::AnyBuffer>()  // value
      .RemainingArgs()
      .template Ret<ffi::AnyBuffer>()  // dquery
      .template Ret<ffi::AnyBuffer>()  // dkey
      .template Ret<ffi::AnyBuffer>()  // dvalue
      .RemainingRets()                 // dbias
      .template Attrs<SmallSeqAttentionAttrs>();
}

// Fill `params`, or say which buffers disagree.
ffi::Error MakeSmallSeqAttentionParams(const SmallSeqAttentionAttrs& attrs,
                                       std::string_view platform, ffi::AnyBuffer query,
                                       ffi::AnyBuffer key, ffi::AnyBuffer value,
                                       ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out,
                                       ffi::Result<ffi::AnyBuffer> lse,
                                       SmallSeqAttentionParams& params);
ffi::Error MakeSmallSeqBackwardParams(const SmallSeqAttentionAttrs& attrs,
                                      std::string_view platform, ffi::AnyBuffer query,
                                      ffi::AnyBuffer key, ffi::AnyBuffer value,
                                      ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> dquery,
                                      ffi::Result<ffi::AnyBuffer> dkey,
                                      ffi::Result<ffi::AnyBuffer> dvalue, ffi::RemainingRets more,
                                      SmallSeqBackwardParams& params);

}  // namespace jax_attn

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_attn::SmallSeqAttentionAttrs, xla::ffi::StructMember<std::string_view>("operands"),
    xla::ffi::StructMember<std::string_view>("variant"), xla::ffi::StructMember<float>("scale"),
    xla::ffi::StructMember<int32_t>("causal"), xla::ffi::StructMember<float>("logits_soft_cap"),
    xla::ffi::StructMember<int64_t>("max_q_len"), xla::ffi::StructMember<int64_t>("max_kv_len"));

#endif  // JAX_ATTN_CSRC_FFI_SMALL_SEQ_ATTENTION_H_
