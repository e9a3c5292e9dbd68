// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The XLA call of split-KV attention, the same for every backend.
//
// Target "jax_attn_split_kv_attention". Arguments: those of the arrays below that the call has, in
// this order; attribute `operands` names those after value, separated by commas. In front of the
// dimensions given here each may have the dimensions of vmap, which broadcast as in NumPy.
//
//   query         [B, T, N, H] f32, bf16, f16
//   key           [B, S, K, H], or pages [(L,) P, page_size, K, H] / [(L,) P, K, page_size, H]
//   value         like key, with Hv
//   bias          [#B, #N, #T, S] f32, bf16, f16       (#: that size or 1)
//   mask          [#B, #N, #T, S] pred
//   kv_lengths    [B] s32
//   query_offset  [B] s32                               position of the first query
//   page_table    [B, M] s32                            S = M * page_size
//   layer         [] s32
//   alibi_slopes  [N] f32
//   sinks         [N] f32
//   k_scale       [], [K], [L, K] or key's dimensions less H, f32
//   v_scale       likewise
//
// Results: out [batch..., T, N, Hv] of query's type, lse [batch..., T, N] f32, workspace [n] f32.

#ifndef JAX_ATTN_CSRC_FFI_SPLIT_KV_ATTENTION_H_
#define JAX_ATTN_CSRC_FFI_SPLIT_KV_ATTENTION_H_

#include <cstdint>
#include <string_view>
#include <utility>

#include "../split_kv_attention.h"
#include "check.h"

namespace jax_attn {

struct SplitKvAttentionAttrs {
  std::string_view operands;
  std::string_view variant;  // kernel variant of the backend, empty for the best
  float scale;
  int32_t causal;          // 0 none, 1 bottom_right, 2 top_left
  int64_t sliding_window;  // 0: none
  float logits_soft_cap;   // 0: none
  int64_t num_splits;      // 0: planned
  int64_t split_size;      // 0: planned
  bool lse_includes_sinks;
  int32_t page_layout;   // 0 dense, 1 NHD, 2 HND
  int32_t k_scale_rank;  // dimensions of k_scale without those of vmap
  int32_t v_scale_rank;
};

// `bind` already names what the backend needs from its context.
template <typename Binding>
auto SplitKvAttentionSchema(Binding bind) {
  return std::move(bind)
      .template Arg<ffi::AnyBuffer>()  // query
      .template Arg<ffi::AnyBuffer>()  // key
      .template Arg<ffi::AnyBuffer>()  // value
      .RemainingArgs()
      .template Ret<ffi::AnyBuffer>()           // out
      .template Ret<ffi::AnyBuffer>()           // lse
      .template Ret<ffi::BufferR1<ffi::F32>>()  // workspace
      .template Attrs<SplitKvAttentionAttrs>();
}

// Fills `params`, or says which buffers disagree.
ffi::Error MakeSplitKvAttentionParams(const SplitKvAttentionAttrs& attrs, std::string_view platform,
                                      ffi::AnyBuffer query, ffi::AnyBuffer key,
                                      ffi::AnyBuffer value, ffi::RemainingArgs rest,
                                      ffi::Result<ffi::AnyBuffer> out,
                                      ffi::Result<ffi::AnyBuffer> lse,
                                      ffi::Result<ffi::BufferR1<ffi::F32>> workspace,
                                      SplitKvAttentionParams& params);

}  // namespace jax_attn

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_attn::SplitKvAttentionAttrs, xla::ffi::StructMember<std::string_view>("operands"),
    xla::ffi::StructMember<std::string_view>("variant"), xla::ffi::StructMember<float>("scale"),
    xla::ffi::StructMember<int32_t>("causal"), xla::ffi::StructMember<int64_t>("sliding_window"),
    xla::ffi::StructMember<float>("logits_soft_cap"), xla::ffi::StructMember<int64_t>("num_splits"),
    xla::ffi::StructMember<int64_t>("split_size"),
    xla::ffi::StructMember<bool>("lse_includes_sinks"),
    xla::ffi::StructMember<int32_t>("page_layout"), xla::ffi::StructMember<int32_t>("k_scale_rank"),
    xla::ffi::StructMember<int32_t>("v_scale_rank"));

#endif  // JAX_ATTN_CSRC_FFI_SPLIT_KV_ATTENTION_H_
