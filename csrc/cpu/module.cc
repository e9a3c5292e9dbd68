// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The Python module of the CPU backend: handlers as capsules, the capability table, and the plan
// that sizes workspaces.

#include <algorithm>
#include <exception>
#include <functional>
#include <string>
#include <thread>
#include <utility>

#include "../bindings.h"
#include "../ffi/fused_qkv_rope_cache.h"
#include "../ffi/small_seq_attention.h"
#include "../ffi/split_kv_attention.h"
#include "fused_qkv_rope_cache.h"
#include "instruction_sets.h"
#include "small_seq_attention.h"
#include "split_kv_attention.h"
#include "split_plan.h"
#include "xla/ffi/api/ffi.h"

namespace jax_attn::cpu {
namespace {

// XLA counts one thread per device where there are more devices than cores; more threads than
// cores only wait for each other.
int64_t NumCores() {
  static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  return cores;
}

class XlaExecutor final : public Executor {
 public:
  explicit XlaExecutor(ffi::ThreadPool& pool)
      : pool_(pool), num_threads_(std::clamp<int64_t>(pool.num_threads(), 1, NumCores())) {}
  int64_t num_threads() const override { return num_threads_; }
  void Schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool& pool_;
  int64_t num_threads_;
};

ffi::Error SplitKvAttention(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key,
                            ffi::AnyBuffer value, ffi::RemainingArgs rest,
                            ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse,
                            ffi::Result<ffi::BufferR1<ffi::F32>> workspace,
                            const SplitKvAttentionAttrs& attrs) try {
  SplitKvAttentionParams params;
  ffi::Error error = MakeSplitKvAttentionParams(attrs, "cpu", query, key, value, rest, out, lse,
                                                workspace, params);
  if (error.failure()) return error;
  XlaExecutor executor(pool);
  const std::string failure = LaunchSplitKvAttention(params, attrs.variant, executor);
  return failure.empty() ? ffi::Error::Success() : InvalidArgument("split_kv_attention", failure);
} catch (const std::exception& e) {
  return ffi::Error(ffi::ErrorCode::kInternal, std::string("split_kv_attention: ") + e.what());
}

ffi::Error FusedQkvRopeCache(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::AnyBuffer k_pages,
                             ffi::AnyBuffer v_pages, ffi::AnyBuffer slot_mapping,
                             ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> query,
                             ffi::Result<ffi::AnyBuffer> key, ffi::Result<ffi::AnyBuffer> value,
                             ffi::Result<ffi::AnyBuffer> k_pages_out,
                             ffi::Result<ffi::AnyBuffer> v_pages_out, ffi::RemainingRets more,
                             const FusedQkvRopeCacheAttrs& attrs) try {
  FusedQkvRopeCacheParams params;
  ffi::Error error = MakeFusedQkvRopeCacheParams(attrs, "cpu",
                                                 {qkv, k_pages, v_pages, slot_mapping, rest, *query,
                                                  *key, *value, *k_pages_out, *v_pages_out, more},
                                                 params);
  if (error.failure()) return error;
  XlaExecutor executor(pool);
  const std::string failure = LaunchFusedQkvRopeCache(params, attrs.variant, executor);
  return failure.empty() ? ffi::Error::Success() : InvalidArgument("fused_qkv_rope_cache", failure);
} catch (const std::exception& e) {
  return ffi::Error(ffi::ErrorCode::kInternal, std::string("fused_qkv_rope_cache: ") + e.what());
}

ffi::Error SmallSeqAttention(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key,
                             ffi::AnyBuffer value, ffi::RemainingArgs rest,
                             ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse,
                             const SmallSeqAttentionAttrs& attrs) try {
  SmallSeqAttentionParams params;
  ffi::Error error =
      MakeSmallSeqAttentionParams(attrs, "cpu", query, key, value, rest, out, lse, params);
  if (error.failure()) return error;
  XlaExecutor executor(pool);
  const std::string failure = LaunchSmallSeqAttention(params, attrs.variant, executor);
  return failure.empty() ? ffi::Error::Success() : InvalidArgument("small_seq_attention", failure);
} catch (const std::exception& e) {
  return ffi::Error(ffi::ErrorCode::kInternal, std::string("small_seq_attention: ") + e.what());
}

ffi::Error SmallSeqAttentionBackward(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key,
                                     ffi::AnyBuffer value, ffi::RemainingArgs rest,
                                     ffi::Result<ffi::AnyBuffer> dquery,
                                     ffi::Result<ffi::AnyBuffer> dkey,
                                     ffi::Result<ffi::AnyBuffer> dvalue, ffi::RemainingRets more,
                                     const SmallSeqAttentionAttrs& attrs) try {
  constexpr std::string_view kOp = "small_seq_attention_backward";
  SmallSeqBackwardParams params;
  ffi::Error error = MakeSmallSeqBackwardParams(attrs, "cpu", query, key, value, rest, dquery, dkey,
                                                dvalue, more, params);
  if (error.failure()) return error;
  XlaExecutor executor(pool);
  const std::string failure = LaunchSmallSeqBackward(params, attrs.variant, executor);
  return failure.empty() ? ffi::Error::Success() : InvalidArgument(kOp, failure);
} catch (const std::exception& e) {
  return ffi::Error(ffi::ErrorCode::kInternal,
                    std::string("small_seq_attention_backward: ") + e.what());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxAttnSplitKvAttentionCpu, SplitKvAttention,
                              SplitKvAttentionSchema(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxAttnFusedQkvRopeCacheCpu, FusedQkvRopeCache,
                              FusedQkvRopeCacheSchema(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxAttnSmallSeqAttentionCpu, SmallSeqAttention,
                              SmallSeqAttentionSchema(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxAttnSmallSeqAttentionBackwardCpu, SmallSeqAttentionBackward,
                              SmallSeqBackwardSchema(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

namespace {

nb::list Variants() {
  nb::list names;
  for (const SplitKvKernels* kernels : AvailableSplitKvKernels()) names.append(kernels->name);
  return names;
}

// The part of a plan that follows from shapes; `heads_first`: tokens of a head are adjacent.
nb::dict Plan(int64_t batch, int64_t query_len, int64_t num_q_heads, int64_t num_kv_heads,
              int64_t head_dim, int64_t v_head_dim, int64_t kv_len, bool heads_first,
              int64_t num_splits, int64_t split_size) {
  SplitKvAttentionParams p;
  p.batch.num_dims = 1;
  p.batch.sizes[0] = p.batch.count = batch;
  p.query_len = query_len;
  p.num_q_heads = num_q_heads;
  p.num_kv_heads = num_kv_heads;
  p.head_dim = head_dim;
  p.v_head_dim = v_head_dim;
  p.kv_len = kv_len;
  p.key.head_stride = heads_first ? 2 : 1;
  p.key.token_stride = heads_first ? 1 : 2;
  p.num_splits = num_splits;
  p.split_size = split_size;
  const SplitLayout layout = MakeSplitLayout(p, NumCores());
  nb::dict plan;
  plan["workspace_size"] = layout.workspace_size();
  plan["num_threads"] = layout.num_threads;
  if (layout.num_row_blocks != 0) {
    // At full length; shorter contexts are cut into fewer splits.
    plan["num_splits"] = PlanSplits(p, layout).entries.front().num_splits;
  }
  return plan;
}

}  // namespace

NB_MODULE(_cpu, m) {
  DefineCommon(m, "cpu");
  m.def("handlers", [] {
    nb::dict handlers;
    handlers["jax_attn_split_kv_attention"] =
        nb::capsule(reinterpret_cast<void*>(JaxAttnSplitKvAttentionCpu));
    handlers["jax_attn_fused_qkv_rope_cache"] =
        nb::capsule(reinterpret_cast<void*>(JaxAttnFusedQkvRopeCacheCpu));
    handlers["jax_attn_small_seq_attention"] =
        nb::capsule(reinterpret_cast<void*>(JaxAttnSmallSeqAttentionCpu));
    handlers["jax_attn_small_seq_attention_backward"] =
        nb::capsule(reinterpret_cast<void*>(JaxAttnSmallSeqAttentionBackwardCpu));
    return handlers;
  });
  m.def("variants", &Variants);
  // What an operation without kernels of a variant runs instead.
  m.def("instruction_set", [](const std::string& variant) { return std::string(SetOf(variant)); });
  m.def("split_kv_plan", &Plan, nb::kw_only(), nb::arg("batch"), nb::arg("query_len"),
        nb::arg("num_q_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::arg("v_head_dim"),
        nb::arg("kv_len"), nb::arg("heads_first"), nb::arg("num_splits"), nb::arg("split_size"));
}

}  // namespace jax_attn::cpu
