// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "small_seq_attention.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <vector>

#include "instruction_sets.h"
#include "small_seq_kernel.h"

namespace jax_attn::cpu {

#define JAX_ATTN_DECLARE(set)                    \
  namespace set {                                \
  extern const SmallSeqKernels kSmallSeqKernels; \
  }
JAX_ATTN_FOR_EACH_SET(JAX_ATTN_DECLARE)
#undef JAX_ATTN_DECLARE

namespace {

// Multiply-adds below which handing work to another thread costs more than it saves (about 10 us).
constexpr int64_t kMinParallelWork = 256 * 1024;

// Items of work per thread: enough to even out threads that are slowed down by others.
constexpr int64_t kItemsPerThread = 16;

// Results of more bytes are written past the caches.
constexpr int64_t kCacheBytes = 8 << 20;

const SmallSeqKernels* KernelsOf(std::string_view variant) {
  if (variant == "amx" && !MayUseTiles()) return nullptr;
#define JAX_ATTN_TRY(set)                                        \
  if (variant.empty() ? CanRun(#set) : SetOf(variant) == #set) { \
    return CanRun(#set) ? &set::kSmallSeqKernels : nullptr;      \
  }
  JAX_ATTN_FOR_EACH_SET(JAX_ATTN_TRY)
#undef JAX_ATTN_TRY
  return nullptr;
}

// Tokens of a packed array that belong to sequences, or to holes between them.
struct Used {
  int64_t begin = 0;
  int64_t end = 0;
};

// Cuts the batch into items, and holds what all of them share.
class Plan {
 public:
  // `work`: multiply-adds of a query row with a key.
  Plan(const SmallSeqProblem& p, int64_t work, int64_t max_threads)
      : p_(p), scratch_size_(ScratchFloats(p)) {
    const int64_t num_logits = p.batch.count * p.max_q_len * p.num_q_heads * p.max_kv_len;
    num_threads_ = num_logits * work < kMinParallelWork ? 1 : max_threads;
    num_outer_ = 1;
    for (int d = 0; p.packed() && d < p.batch.num_dims - 1; ++d) num_outer_ *= p.batch.sizes[d];
    const int64_t inner = p.packed() ? p.num_sequences() : p.batch.count;
    const int64_t per_outer =
        std::max<int64_t>(1, num_threads_ * kItemsPerThread / std::max<int64_t>(1, num_outer_));
    const int64_t size = std::max<int64_t>(1, (inner + per_outer - 1) / per_outer);
    for (int64_t o = 0; o < num_outer_; ++o) AddItems(o * inner, (o + 1) * inner, size);

    for (const int64_t dim : {p.head_dim, p.v_head_dim}) {
      for (int64_t t = 0; t < p.max_q_len; ++t) {
        for (int64_t g = 0; g < p.group_size(); ++g) AddOffset((t * p.num_q_heads + g) * dim);
      }
      for (int64_t j = 0; j < p.max_kv_len; ++j) AddOffset(j * p.num_kv_heads * dim);
    }
    scratch_.reset(new float[num_threads_ * scratch_size_]);
  }

  template <typename Params>
  void Run(void (*kernel)(const Params&, const SmallSeqItem&), const Params& params,
           bool around_caches, Executor& executor) {
    ParallelFor(executor, num_threads_, items_.size(), [&](int64_t i, int64_t worker) {
      SmallSeqItem item = items_[i];
      item.around_caches = around_caches;
      item.scratch = scratch_.get() + worker * scratch_size_;
      item.row_offsets = offsets_.data();
      item.key_offsets = item.row_offsets + p_.max_q_len * p_.group_size();
      item.v_row_offsets = item.key_offsets + p_.max_kv_len;
      item.v_key_offsets = item.v_row_offsets + p_.max_q_len * p_.group_size();
      kernel(params, item);
    });
  }

  // Fills what no sequence has of a packed result with `value`; it has `size` elements a token.
  template <typename T>
  void FillUnused(bool of_queries, T* data, int64_t size, T value) const {
    const int64_t tokens = of_queries ? p_.query_tokens : p_.kv_tokens;
    for (const Used& used : of_queries ? used_queries_ : used_keys_) {
      std::fill(data, data + used.begin * size, value);
      std::fill(data + used.end * size, data + tokens * size, value);
      data += tokens * size;
    }
  }

 private:
  void AddOffset(int64_t elements) { offsets_.push_back(static_cast<int32_t>(elements)); }

  void AddItems(int64_t begin, int64_t end, int64_t size) {
    const auto bound = [&](const Operand<int32_t>& bounds, int64_t i) -> const int32_t* {
      return bounds.At(p_.batch, i);
    };
    SmallSeqItem item;
    if (p_.packed() && begin < end) {
      item.query_start = ClippedBound(0, *bound(p_.query_cu_seqlens, begin), p_.query_tokens);
      item.kv_start = ClippedBound(0, *bound(p_.kv_cu_seqlens, begin), p_.kv_tokens);
    }
    Used queries{item.query_start, item.query_start}, keys{item.kv_start, item.kv_start};
    for (item.begin = begin; item.begin < end; item.begin = item.end) {
      item.end = std::min(item.begin + size, end);
      item.query_start = queries.end;
      item.kv_start = keys.end;
      items_.push_back(item);
      if (!p_.packed()) continue;
      const int32_t* query_bounds = bound(p_.query_cu_seqlens, item.begin) + 1;
      const int32_t* kv_bounds = bound(p_.kv_cu_seqlens, item.begin) + 1;
      for (int64_t i = 0; i < item.end - item.begin; ++i) {
        queries.end = ClippedBound(queries.end, query_bounds[i], p_.query_tokens);
        keys.end = ClippedBound(keys.end, kv_bounds[i], p_.kv_tokens);
      }
    }
    if (!p_.packed()) return;
    used_queries_.push_back(queries);
    used_keys_.push_back(keys);
  }

  const SmallSeqProblem& p_;
  int64_t num_threads_ = 1;
  int64_t num_outer_ = 1;
  std::vector<SmallSeqItem> items_;
  std::vector<Used> used_queries_, used_keys_;  // for each index of vmap, if packed
  std::vector<int32_t> offsets_;
  int64_t scratch_size_;
  std::unique_ptr<float[]> scratch_;
};

// Whether results are large, and whole cache lines, so that they can be written past the caches.
bool GoAround(int64_t num_bytes, const SmallSeqProblem& p,
              std::initializer_list<const void*> data) {
  bool aligned = p.head_dim * SizeOf(p.dtype) % 64 == 0 && p.v_head_dim * SizeOf(p.dtype) % 64 == 0;
  for (const void* x : data) aligned = aligned && reinterpret_cast<uintptr_t>(x) % 64 == 0;
  return aligned && num_bytes > kCacheBytes;
}

std::string NoVariant(std::string_view variant) {
  return "variant '" + std::string(variant) + "' cannot run here";
}

int64_t NumTokens(const SmallSeqProblem& p, int64_t tokens) {
  int64_t count = tokens;
  for (int d = 0; d < p.batch.num_dims - (p.packed() ? 1 : 0); ++d) count *= p.batch.sizes[d];
  return count;
}

}  // namespace

std::string LaunchSmallSeqAttention(const SmallSeqAttentionParams& p, std::string_view variant,
                                    Executor& executor) {
  const SmallSeqKernels* kernels = KernelsOf(variant);
  if (kernels == nullptr) return NoVariant(variant);
  Plan plan(p, p.head_dim + p.v_head_dim, executor.num_threads());
  const int64_t row_size = p.num_q_heads * p.v_head_dim * SizeOf(p.dtype);
  const int64_t num_bytes = NumTokens(p, p.query_tokens) * row_size;
  plan.Run(kernels->forward, p, GoAround(num_bytes, p, {p.out}), executor);
  plan.FillUnused(true, static_cast<char*>(p.out), row_size, '\0');
  plan.FillUnused(true, p.lse, p.num_q_heads, -std::numeric_limits<float>::infinity());
  return "";
}

std::string LaunchSmallSeqBackward(const SmallSeqBackwardParams& p, std::string_view variant,
                                   Executor& executor) {
  const SmallSeqKernels* kernels = KernelsOf(variant);
  if (kernels == nullptr) return NoVariant(variant);
  Plan plan(p, 3 * p.head_dim + 2 * p.v_head_dim, executor.num_threads());
  const int64_t row_size = p.num_q_heads * p.head_dim * SizeOf(p.dtype);
  const int64_t key_size = p.num_kv_heads * p.head_dim * SizeOf(p.dtype);
  const int64_t value_size = p.num_kv_heads * p.v_head_dim * SizeOf(p.dtype);
  const int64_t num_bytes =
      NumTokens(p, p.query_tokens) * row_size + NumTokens(p, p.kv_tokens) * (key_size + value_size);
  plan.Run(kernels->backward, p, GoAround(num_bytes, p, {p.dquery, p.dkey, p.dvalue}), executor);
  plan.FillUnused(true, static_cast<char*>(p.dquery), row_size, '\0');
  plan.FillUnused(false, static_cast<char*>(p.dkey), key_size, '\0');
  plan.FillUnused(false, static_cast<char*>(p.dvalue), value_size, '\0');
  return "";
}

}  // namespace jax_attn::cpu
