// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The instruction sets that kernels are compiled for; CMakeLists.txt has their flags.

#ifndef JAX_ATTN_CSRC_CPU_INSTRUCTION_SETS_H_
#define JAX_ATTN_CSRC_CPU_INSTRUCTION_SETS_H_

#include <string_view>

// Calls a macro with each set, the best first. The last runs on every machine of its kind.
#if defined(__x86_64__)
#define JAX_ATTN_FOR_EACH_SET(visit) visit(avx512) visit(avx2) visit(portable)
#elif defined(__aarch64__)
#define JAX_ATTN_FOR_EACH_SET(visit) visit(neon)
#else
#define JAX_ATTN_FOR_EACH_SET(visit) visit(portable)
#endif

namespace jax_attn::cpu {

// Whether this machine has a set.
inline bool CanRun(std::string_view set) {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (set == "avx512") return has_avx512;
  if (set == "avx2") return has_avx2;
#endif
  return set == "portable" || set == "neon";
}

}  // namespace jax_attn::cpu

#endif  // JAX_ATTN_CSRC_CPU_INSTRUCTION_SETS_H_
