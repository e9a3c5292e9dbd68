// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The XLA call of the fused QKV pass, the same for every backend.
//
// Target "jax_attn_fused_qkv_rope_cache". Arguments: those of the arrays below that the call has,
// in this order; attribute `operands` names those after slot_mapping, separated by commas. In
// front of the dimensions given here each may have the dimensions of vmap, which broadcast as in
// NumPy; the pages (and scales that are written) have all of them.
//
//   qkv           [T, columns] f32, bf16, f16: queries (and gates), keys, values, head by head
//   k_pages       [(L,) P, page_size, K, H] or [(L,) P, K, page_size, H]
//   v_pages       like k_pages, with Hv
//   slot_mapping  [T] s32 or s64
//   layer         [] s32
//   positions     [T], or [3, T] with M-RoPE sections, s32
//   offsets       [T] s32
//   cos, sin      [max_positions, W] f32, bf16, f16
//   q_weight      [H], or [N * H] with norm_scope 2; f32, bf16, f16
//   k_weight      [H], or [K * H]
//   k_scale       [], [K], [L, K] or k_pages' dimensions less H, f32
//   v_scale       likewise
//
// Results: query [batch..., T, N, H], key [batch..., T, K, H] and value [batch..., T, K, Hv] of
// qkv's type; k_pages and v_pages like the arguments, which they should alias: what is not aliased
// is copied first. Then gate, like query, if there is one; and with dynamic_scales k_scale and
// v_scale, like the arguments, which they should alias too.

#ifndef JAX_ATTN_CSRC_FFI_FUSED_QKV_ROPE_CACHE_H_
#define JAX_ATTN_CSRC_FFI_FUSED_QKV_ROPE_CACHE_H_

#include <cstdint>
#include <string_view>
#include <utility>

#include "../fused_qkv_rope_cache.h"
#include "check.h"

namespace jax_attn {

struct FusedQkvRopeCacheAttrs {
  std::string_view operands;
  std::string_view variant;  // kernel variant of the backend, empty for the best
  int32_t gate;              // 0 none, 1 interleaved, 2 blocked
  int32_t page_layout;       // 1 NHD, 2 HND
  int64_t rotary_dim;        // 0: no rotation
  bool interleaved;
  bool nope_first;
  bool full_width_table;
  bool mrope_interleaved;
  int64_t mrope_temporal;  // pairs of each section; all 0: one position per token
  int64_t mrope_height;
  int64_t mrope_width;
  int32_t norm_scope;  // 0 no norm, 1 head, 2 all heads
  bool normalize_v;
  float epsilon;
  float weight_offset;
  bool dynamic_scales;
  int32_t k_scale_rank;  // dimensions of k_scale without those of vmap
  int32_t v_scale_rank;
};

// `bind` already names what the backend needs from its context.
template <typename Binding>
auto FusedQkvRopeCacheSchema(Binding bind) {
  return std::move(bind)
      .template Arg<ffi::AnyBuffer>()  // qkv
      .template Arg<ffi::AnyBuffer>()  // k_pages
      .template Arg<ffi::AnyBuffer>()  // v_pages
      .template Arg<ffi::AnyBuffer>()  // slot_mapping
      .RemainingArgs()
      .template Ret<ffi::AnyBuffer>()  // query
      .template Ret<ffi::AnyBuffer>()  // key
      .template Ret<ffi::AnyBuffer>()  // value
      .template Ret<ffi::AnyBuffer>()  // k_pages
      .template Ret<ffi::AnyBuffer>()  // v_pages
      .RemainingRets()
      .template Attrs<FusedQkvRopeCacheAttrs>();
}

// The buffers of a call as the schema delivers them.
struct FusedQkvRopeCacheBuffers {
  ffi::AnyBuffer qkv;
  ffi::AnyBuffer k_pages;
  ffi::AnyBuffer v_pages;
  ffi::AnyBuffer slot_mapping;
  ffi::RemainingArgs rest;
  ffi::AnyBuffer query;
  ffi::AnyBuffer key;
  ffi::AnyBuffer value;
  ffi::AnyBuffer k_pages_out;
  ffi::AnyBuffer v_pages_out;
  ffi::RemainingRets more;
};

// Fills `params`, or says which buffers disagree.
ffi::Error MakeFusedQkvRopeCacheParams(const FusedQkvRopeCacheAttrs& attrs,
                                       std::string_view platform,
                                       const FusedQkvRopeCacheBuffers& buffers,
                                       FusedQkvRopeCacheParams& params);

}  // namespace jax_attn

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_attn::FusedQkvRopeCacheAttrs, xla::ffi::StructMember<std::string_view>("operands"),
    xla::ffi::StructMember<std::string_view>("variant"), xla::ffi::StructMember<int32_t>("gate"),
    xla::ffi::StructMember<int32_t>("page_layout"), xla::ffi::StructMember<int64_t>("rotary_dim"),
    xla::ffi::StructMember<bool>("interleaved"), xla::ffi::StructMember<bool>("nope_first"),
    xla::ffi::StructMember<bool>("full_width_table"),
    xla::ffi::StructMember<bool>("mrope_interleaved"),
    xla::ffi::StructMember<int64_t>("mrope_temporal"),
    xla::ffi::StructMember<int64_t>("mrope_height"), xla::ffi::StructMember<int64_t>("mrope_width"),
    xla::ffi::StructMember<int32_t>("norm_scope"), xla::ffi::StructMember<bool>("normalize_v"),
    xla::ffi::StructMember<float>("epsilon"), xla::ffi::StructMember<float>("weight_offset"),
    xla::ffi::StructMember<bool>("dynamic_scales"), xla::ffi::StructMember<int32_t>("k_scale_rank"),
    xla::ffi::StructMember<int32_t>("v_scale_rank"));

#endif  // JAX_ATTN_CSRC_FFI_FUSED_QKV_ROPE_CACHE_H_
