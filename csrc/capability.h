// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// What the compiled kernels can do. The one list: dispatch, error messages, documentation and
// tests are made from it.

#ifndef JAX_ATTN_CSRC_CAPABILITY_H_
#define JAX_ATTN_CSRC_CAPABILITY_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "dtype.h"

namespace jax_attn {

using DTypeSet = uint32_t;

constexpr DTypeSet SetOf(DType dtype) { return DTypeSet{1} << static_cast<int>(dtype); }
constexpr bool Contains(DTypeSet set, DType dtype) { return (set & SetOf(dtype)) != 0; }

inline constexpr DTypeSet kFloats =
    SetOf(DType::kFloat32) | SetOf(DType::kBFloat16) | SetOf(DType::kFloat16);
inline constexpr DTypeSet kQuantized = SetOf(DType::kInt8) | SetOf(DType::kFloat8E4M3FN) |
                                       SetOf(DType::kFloat8E4M3FNUZ) | SetOf(DType::kFloat8E5M2);

struct Capability {
  const char* op;
  const char* platform;  // as JAX names platforms in lowering
  DTypeSet query_dtypes;
  DTypeSet cache_dtypes;  // keys and values have the same dtype
  int64_t head_dim_multiple;
  int64_t max_head_dim;
  int64_t max_query_len;
  int64_t max_kv_len;
};

// A length that is not bounded.
inline constexpr int64_t kAnyLength = INT64_MAX;

inline constexpr Capability kCapabilities[] = {
    {"split_kv_attention", "cpu", kFloats, kFloats | kQuantized, 8, 512, kAnyLength, kAnyLength},
    {"split_kv_attention", "cuda", kFloats, kFloats | kQuantized, 8, 512, kAnyLength, kAnyLength},
    {"split_kv_attention", "rocm", kFloats, kFloats | kQuantized, 8, 512, kAnyLength, kAnyLength},
    {"fused_qkv_rope_cache", "cpu", kFloats, kFloats | kQuantized, 8, 512, kAnyLength, kAnyLength},
    {"fused_qkv_rope_cache", "cuda", kFloats, kFloats | kQuantized, 8, 512, kAnyLength, kAnyLength},
    {"fused_qkv_rope_cache", "rocm", kFloats, kFloats | kQuantized, 8, 512, kAnyLength, kAnyLength},
    {"small_seq_attention", "cpu", kFloats, kFloats, 8, 512, 32, 64},
    {"small_seq_attention", "cuda", kFloats, kFloats, 8, 512, 32, 64},
    {"small_seq_attention", "rocm", kFloats, kFloats, 8, 512, 32, 64},
};

// Why the kernel of `op` on `platform` refuses a problem; empty if it takes it.
std::string Refusal(std::string_view op, std::string_view platform, DType query_dtype,
                    DType cache_dtype, int64_t head_dim, int64_t v_head_dim, int64_t num_batch_dims,
                    int64_t query_len = 0, int64_t kv_len = 0);

}  // namespace jax_attn

#endif  // JAX_ATTN_CSRC_CAPABILITY_H_
