// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Copies of boxes of a tensor to shared memory, which a unit of its own makes while lanes compute.
// One lane begins a copy; a barrier in shared memory says when its bytes are there. Only for
// NVIDIA devices that have them (Device::tensor_maps).

#ifndef JAX_ATTN_CSRC_GPU_TENSOR_COPIES_H_
#define JAX_ATTN_CSRC_GPU_TENSOR_COPIES_H_

#include <cstdint>

#include "wave.h"

#if JAX_ATTN_NVIDIA && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900)
#define JAX_ATTN_TENSOR_COPIES 1
#else
#define JAX_ATTN_TENSOR_COPIES 0
#endif

#if JAX_ATTN_TENSOR_COPIES

namespace jax_attn::gpu {

JAX_ATTN_DEVICE uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Fetches a map before it is needed.
JAX_ATTN_DEVICE void PrefetchMap(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A barrier that completes when the bytes of a round of copies have arrived.
class CopyBarrier {
 public:
  explicit JAX_ATTN_DEVICE CopyBarrier(const uint64_t* shared) : address_(SharedAddress(shared)) {}

  JAX_ATTN_DEVICE void Initialize() const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address_) : "memory");
  }
  // Makes barriers that this lane initialised known to the copying unit.
  static JAX_ATTN_DEVICE void Publish() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  JAX_ATTN_DEVICE void Expect(int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_),
                 "r"(bytes)
                 : "memory");
  }
  // `parity`: 0 in the first round, then 1, and so on.
  JAX_ATTN_DEVICE void Wait(uint32_t parity) const {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again_%=;\n"
        "}" ::"r"(address_),
        "r"(parity)
        : "memory");
  }
  // The same where blocks of the cluster sent the bytes.
  JAX_ATTN_DEVICE void WaitForBlocks(uint32_t parity) const {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again_%=:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again_%=;\n"
        "}" ::"r"(address_),
        "r"(parity)
        : "memory");
  }
  JAX_ATTN_DEVICE uint32_t address() const { return address_; }

 private:
  uint32_t address_;
};

// Stores by lanes come before copies that begin later to the same place.
JAX_ATTN_DEVICE void OrderStoresBeforeCopies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Copies the box at element 0, `row`, half 0, `head`, `outer` to shared memory, a multiple of 1024
// bytes. There, piece i of 16 bytes of a line of 128 is at i ^ line % 8, of a line of 64 at
// i ^ line / 2 % 4. What lies outside the tensor is 0. What is read is not read again, so that L2
// gives it up first.
JAX_ATTN_DEVICE void TensorCopy(uint32_t to, const TensorMap& map, const CopyBarrier& barrier,
                                int row, int head, int outer) {
  constexpr uint64_t kEvictFirst = 0x12F0000000000000;  // as createpolicy makes it
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %3, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(&map), "r"(barrier.address()), "r"(0), "r"(row), "r"(head), "r"(outer), "l"(kEvictFirst)
      : "memory");
}

// Brings a line of 128 bytes to L2.
JAX_ATTN_DEVICE void PrefetchLine(const void* line) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line) : "memory");
}

// Brings a line to the core's own cache, without waiting for it.
JAX_ATTN_DEVICE void FetchLine(const void* line) {
  uint32_t unused;
  asm volatile("ld.global.ca.u32 %0, [%1];" : "=r"(unused) : "l"(line) : "memory");
}

// Waits for the first `kThreads` threads of a block, of which others do not come.
template <int kThreads>
JAX_ATTN_DEVICE void SyncFirstThreads() {
  asm volatile("barrier.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// ---- Clusters of blocks, which such devices have too

JAX_ATTN_DEVICE int RankInCluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Waits for all threads of the cluster, and makes what they wrote to shared memory known.
JAX_ATTN_DEVICE void SyncCluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The same in two steps. Published barriers become known, but of other writes only those that come
// before an arrival which `orders_writes`, and that is slow.
JAX_ATTN_DEVICE void ArriveInCluster(bool orders_writes) {
  if (orders_writes) {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }
}
JAX_ATTN_DEVICE void WaitForCluster() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// The same place in the shared memory of another block of the cluster.
template <typename T>
JAX_ATTN_DEVICE T* InBlock(int rank, T* shared) {
  T* other;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(shared), "r"(rank));
  return other;
}

// Writes to the same place in another block, whose barrier counts the bytes, if `sends`.
template <typename T>
JAX_ATTN_DEVICE void SendToBlock(int rank, const T* shared, const CopyBarrier& barrier,
                                 const float2& x, bool sends) {
  asm volatile(
      "{\n"
      ".reg .pred sends;\n"
      ".reg .b32 to, counts;\n"
      "setp.ne.b32 sends, %5, 0;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 counts, %1, %2;\n"
      "@sends st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {%3, %4}, "
      "[counts];\n"
      "}" ::"r"(SharedAddress(shared)),
      "r"(barrier.address()), "r"(rank), "f"(x.x), "f"(x.y), "r"(static_cast<int>(sends))
      : "memory");
}
template <typename T>
JAX_ATTN_DEVICE void SendToBlock(int rank, const T* shared, const CopyBarrier& barrier,
                                 const float4& x, bool sends) {
  asm volatile(
      "{\n"
      ".reg .pred sends;\n"
      ".reg .b32 to, counts;\n"
      "setp.ne.b32 sends, %7, 0;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 counts, %1, %2;\n"
      "@sends st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3, %4, %5, %6}, "
      "[counts];\n"
      "}" ::"r"(SharedAddress(shared)),
      "r"(barrier.address()), "r"(rank), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w),
      "r"(static_cast<int>(sends))
      : "memory");
}

// Four 8x8 matrices of 16-bit elements; a lane gives the address of a row.
JAX_ATTN_DEVICE void LoadMatrices(uint32_t address, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
JAX_ATTN_DEVICE void LoadMatricesTransposed(uint32_t address, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_TENSOR_COPIES

#endif  // JAX_ATTN_CSRC_GPU_TENSOR_COPIES_H_
