// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The Python module of a GPU backend, `_cuda` or `_rocm`: handlers as capsules, the capability
// table, and the plan that sizes workspaces.

#include <exception>
#include <string>

#include "../bindings.h"
#include "../ffi/split_kv_attention.h"
#include "fused_qkv_handler.h"
#include "small_seq_attention.h"
#include "small_seq_handlers.h"
#include "split_kv_attention.h"
#include "split_plan.h"
#include "vendor.h"
#include "xla/ffi/api/ffi.h"

namespace jax_attn::gpu {
namespace {

ffi::Error SplitKvAttention(Stream stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                            ffi::AnyBuffer value, ffi::RemainingArgs rest,
                            ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse,
                            ffi::Result<ffi::BufferR1<ffi::F32>> workspace,
                            const SplitKvAttentionAttrs& attrs) try {
  SplitKvAttentionParams params;
  ffi::Error error = MakeSplitKvAttentionParams(attrs, kPlatform, query, key, value, rest, out, lse,
                                                workspace, params);
  if (error.failure()) return error;
  Device device;
  if (const gpu::Error failed = GetDevice(device); failed != kSuccess) {
    return ffi::Error(ffi::ErrorCode::kInternal,
                      std::string("split_kv_attention: ") + ErrorString(failed));
  }
  const std::string failure = LaunchSplitKvAttention(params, attrs.variant, device, stream);
  return failure.empty() ? ffi::Error::Success() : InvalidArgument("split_kv_attention", failure);
} catch (const std::exception& e) {
  return ffi::Error(ffi::ErrorCode::kInternal, std::string("split_kv_attention: ") + e.what());
}

}  // namespace

#if JAX_ATTN_NVIDIA
#define JAX_ATTN_SPLIT_KV_HANDLER JaxAttnSplitKvAttentionCuda
#else
#define JAX_ATTN_SPLIT_KV_HANDLER JaxAttnSplitKvAttentionRocm
#endif

// The handler only launches kernels, so XLA may capture it in a graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JAX_ATTN_SPLIT_KV_HANDLER, SplitKvAttention,
    SplitKvAttentionSchema(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<Stream>>()),
    {ffi::Traits::kCmdBufferCompatible});

namespace {

// The plan for a problem of these shapes on the current device, or on a usual one if there is none.
nb::dict Plan(int64_t batch, int64_t query_len, int64_t num_q_heads, int64_t num_kv_heads,
              int64_t head_dim, int64_t v_head_dim, int64_t kv_len, bool heads_first,
              int64_t num_splits, int64_t split_size, const std::string& query_dtype,
              const std::string& cache_dtype, const std::string& variant, int causal,
              int64_t sliding_window, int num_batch_dims, int64_t page_size, bool has_lengths,
              bool has_query_offset, bool has_extras, bool has_scales, bool has_v_token_scale) {
  SplitKvAttentionParams p;
  p.batch.num_dims = num_batch_dims;
  for (int i = 1; i < num_batch_dims; ++i) p.batch.sizes[i] = 1;
  p.batch.sizes[0] = p.batch.count = batch;
  p.query_len = query_len;
  p.num_q_heads = num_q_heads;
  p.num_kv_heads = num_kv_heads;
  p.head_dim = head_dim;
  p.v_head_dim = v_head_dim;
  p.kv_len = kv_len;
  p.key.head_stride = heads_first ? kv_len * head_dim : head_dim;
  p.key.token_stride = heads_first ? head_dim : num_kv_heads * head_dim;
  p.num_splits = num_splits;
  p.split_size = split_size;
  p.query_dtype = DTypeNamed(query_dtype);
  p.key.dtype = p.value.dtype = DTypeNamed(cache_dtype);
  p.causal = static_cast<Causal>(causal);
  p.sliding_window = sliding_window;
  p.page_size = page_size;
  // Only whether they are there is looked at.
  static const int32_t some = 0;
  static const float factor = 1;
  if (has_lengths) p.kv_lengths.data = &some;
  if (has_query_offset) p.query_offset.data = &some;
  if (has_scales) p.k_scale.data = &factor;
  if (has_extras) p.mask.data = &some;
  if (has_v_token_scale) p.v_scale.token_stride = 1;
  Device device;
  (void)GetDevice(device);
  const SplitPlan split = PlanSplits(p, variant, device);
  nb::dict plan;
  plan["workspace_size"] = split.workspace_size;
  plan["num_splits"] = split.num_splits;
  plan["variant"] = std::string(split.variant());
  plan["num_groups"] = split.work.num_groups;
  plan["num_cores"] = device.num_cores;
  return plan;
}

// The variant of the kernels for a problem of small sequences.
std::string SmallSeqVariantOf(int64_t max_q_len, int64_t max_kv_len, int64_t num_q_heads,
                              int64_t num_kv_heads, int64_t head_dim, int64_t v_head_dim,
                              const std::string& dtype, bool packed, const std::string& variant,
                              bool backward) {
  SmallSeqProblem p;
  p.max_q_len = max_q_len;
  p.max_kv_len = max_kv_len;
  p.num_q_heads = num_q_heads;
  p.num_kv_heads = num_kv_heads;
  p.head_dim = head_dim;
  p.v_head_dim = v_head_dim;
  p.dtype = DTypeNamed(dtype);
  static const int32_t some = 0;  // only whether it is there is looked at
  if (packed) p.query_cu_seqlens.data = &some;
  return std::string(SmallSeqVariant(p, variant, backward));
}

void Define(nb::module_& m) {
  DefineCommon(m, kPlatform);
  m.def("handlers", [] {
    nb::dict handlers;
    handlers["jax_attn_split_kv_attention"] =
        nb::capsule(reinterpret_cast<void*>(JAX_ATTN_SPLIT_KV_HANDLER));
    handlers["jax_attn_fused_qkv_rope_cache"] =
        nb::capsule(reinterpret_cast<void*>(JAX_ATTN_FUSED_QKV_HANDLER));
    handlers["jax_attn_small_seq_attention"] =
        nb::capsule(reinterpret_cast<void*>(JAX_ATTN_SMALL_SEQ_HANDLER));
    handlers["jax_attn_small_seq_attention_backward"] =
        nb::capsule(reinterpret_cast<void*>(JAX_ATTN_SMALL_SEQ_BACKWARD_HANDLER));
    return handlers;
  });
  m.def("variants", [] {
    Device device;
    (void)GetDevice(device);
    nb::list names;
    for (std::string_view name : kVariants) {
      if (name != "stream" || device.tensor_maps) names.append(std::string(name));
    }
    return names;
  });
  m.def("split_kv_plan", &Plan, nb::kw_only(), nb::arg("batch"), nb::arg("query_len"),
        nb::arg("num_q_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::arg("v_head_dim"),
        nb::arg("kv_len"), nb::arg("heads_first"), nb::arg("num_splits"), nb::arg("split_size"),
        nb::arg("query_dtype") = "float32", nb::arg("cache_dtype") = "float32",
        nb::arg("variant") = "", nb::arg("causal") = 0, nb::arg("sliding_window") = 0,
        nb::arg("num_batch_dims") = 1, nb::arg("page_size") = 0, nb::arg("has_lengths") = true,
        nb::arg("has_query_offset") = false, nb::arg("has_extras") = true,
        nb::arg("has_scales") = false, nb::arg("has_v_token_scale") = false);
  m.def("small_seq_variant", &SmallSeqVariantOf, nb::kw_only(), nb::arg("max_q_len"),
        nb::arg("max_kv_len"), nb::arg("num_q_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"),
        nb::arg("v_head_dim"), nb::arg("dtype"), nb::arg("packed") = false, nb::arg("variant") = "",
        nb::arg("backward") = false);
}

}  // namespace

#if JAX_ATTN_NVIDIA
NB_MODULE(_cuda, m) { Define(m); }
#else
NB_MODULE(_rocm, m) { Define(m); }
#endif

}  // namespace jax_attn::gpu
