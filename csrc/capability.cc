// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "capability.h"

#include "operands.h"

namespace jax_attn {
namespace {

std::string Names(DTypeSet set) {
  std::string names;
  for (DType dtype : kDTypes) {
    if (Contains(set, dtype)) names += (names.empty() ? "" : ", ") + std::string(Name(dtype));
  }
  return names;
}

}  // namespace

std::string Refusal(std::string_view op, std::string_view platform, DType query_dtype,
                    DType cache_dtype, int64_t head_dim, int64_t v_head_dim, int64_t num_batch_dims,
                    int64_t query_len, int64_t kv_len) {
  const Capability* row = nullptr;
  for (const Capability& candidate : kCapabilities) {
    if (candidate.op == op && candidate.platform == platform) row = &candidate;
  }
  if (row == nullptr) {
    return "there is no kernel for " + std::string(op) + " on " + std::string(platform);
  }
  if (!Contains(row->query_dtypes, query_dtype)) {
    return "query dtype " + std::string(Name(query_dtype)) + " is not one of " +
           Names(row->query_dtypes);
  }
  if (!Contains(row->cache_dtypes, cache_dtype)) {
    return "key dtype " + std::string(Name(cache_dtype)) + " is not one of " +
           Names(row->cache_dtypes);
  }
  for (int64_t size : {head_dim, v_head_dim}) {
    if (size <= 0 || size % row->head_dim_multiple || size > row->max_head_dim) {
      return "head_dim " + std::to_string(size) + " is not a multiple of " +
             std::to_string(row->head_dim_multiple) + " up to " + std::to_string(row->max_head_dim);
    }
  }
  if (query_len > row->max_query_len) {
    return "the query length " + std::to_string(query_len) + " is more than " +
           std::to_string(row->max_query_len);
  }
  if (kv_len > row->max_kv_len) {
    return "the key length " + std::to_string(kv_len) + " is more than " +
           std::to_string(row->max_kv_len);
  }
  if (num_batch_dims > kMaxBatchDims) {
    return "vmap is nested " + std::to_string(num_batch_dims - 1) + " deep, at most " +
           std::to_string(kMaxBatchDims - 1) + " is supported";
  }
  return "";
}

}  // namespace jax_attn
