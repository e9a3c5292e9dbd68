// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The instruction sets that kernels are compiled for; CMakeLists.txt has their flags.

#ifndef JAX_ATTN_CSRC_CPU_INSTRUCTION_SETS_H_
#define JAX_ATTN_CSRC_CPU_INSTRUCTION_SETS_H_

#include <string_view>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Calls a macro with each set, the best first. The last runs on every machine of its kind.
// JAX_ATTN_TILE_SET is the one that also has kernels with matrix instructions.
#if defined(JAX_ATTN_EMULATE_TILES)
#define JAX_ATTN_FOR_EACH_SET(visit) visit(portable)
#define JAX_ATTN_TILE_SET portable
#elif defined(__x86_64__)
#define JAX_ATTN_FOR_EACH_SET(visit) visit(avx512) visit(avx2) visit(portable)
#define JAX_ATTN_TILE_SET avx512
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

// The kernels of an operation that has none with matrix instructions are those of the set.
inline std::string_view SetOf(std::string_view variant) {
  return variant == "amx" ? "avx512" : variant;
}

// Whether this process may use the tiles of AMX. Linux wants to be asked, since they make the state
// of a thread 8 KiB larger.
inline bool MayUseTiles() {
#if defined(JAX_ATTN_EMULATE_TILES)
  return true;
#elif defined(__x86_64__) && defined(__linux__)
  static const bool allowed = [] {
    constexpr unsigned kAmxBFloat16 = 1u << 22, kAmxTile = 1u << 24;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    return CanRun("avx512") && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 &&
           (d & kAmxBFloat16) != 0 && (d & kAmxTile) != 0 &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return allowed;
#else
  return false;
#endif
}

}  // namespace jax_attn::cpu

#endif  // JAX_ATTN_CSRC_CPU_INSTRUCTION_SETS_H_
