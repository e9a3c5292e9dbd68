// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Heads of the usual sizes that are rotated whole, by halves: as many blocks as the compiler knows,
// so that a head stays in registers from the first load to the last store.

#ifndef JAX_ATTN_CSRC_CPU_QKV_WHOLE_HEADS_H_
#define JAX_ATTN_CSRC_CPU_QKV_WHOLE_HEADS_H_

#include "qkv_blocks.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {
namespace {

template <DType kDType, int kBlocks>
struct WholeHead {
  using B = Block<kDType>;
  using Element = typename B::Element;
  static constexpr int64_t kBytes = kBlocks * sizeof(typename B::Packed);

  typename B::Packed blocks[kBlocks];

  static F32 Squares(const Element* x) {
    F32 sums[2] = {};
    JAX_ATTN_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      F32 a, b;
      B::LoadPair(x + i * kPair, a, b);
      sums[0] += a * a;
      sums[1] += b * b;
    }
    return sums[0] + sums[1];
  }

  // Computes a head, and returns sums of its elements: if none is NaN, packing has spoiled no NaN.
  F32 Compute(const Element* x, float inverse, const Factors& factors) {
    F32 sum = {};
    JAX_ATTN_UNROLL
    for (int i = 0; i < kBlocks / 2; ++i) {
      const int j = i + kBlocks / 2;
      const TurnedBlocks turned = TurnBlocks<B>(x, i * kPair, j * kPair, inverse, factors);
      if constexpr (B::kSpoilsNan) {
        sum += (turned.first[0] + turned.first[1]) + (turned.second[0] + turned.second[1]);
      }
      blocks[i] = B::Pack(turned.first[0], turned.first[1]);
      blocks[j] = B::Pack(turned.second[0], turned.second[1]);
    }
    return sum;
  }

  void Read(const Element* from) { memcpy(blocks, from, sizeof(blocks)); }

  template <bool kAround>
  void Write(void* to) const {
    JAX_ATTN_UNROLL
    for (int k = 0; k < kBlocks; ++k) {
      StoreVector<kAround>(static_cast<Element*>(to) + k * kPair, blocks[k]);
    }
  }
  void Write(void* to, bool around) const {
    if (around) return Write<true>(to);
    Write<false>(to);
  }
};

// Sums of the squares of kCount heads that are `stride` bytes apart, of which `num_heads` exist.
template <DType kDType, int kBlocks, int kCount>
void SumSquaresOfHeads(const char* first, int64_t stride, int64_t num_heads, float* sums) {
  using Whole = WholeHead<kDType, kBlocks>;
  F32 squares[kCount];
  JAX_ATTN_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const char* const head = first + (i < num_heads ? i : 0) * stride;
    squares[i] = Whole::Squares(reinterpret_cast<const typename Whole::Element*>(head));
  }
  F32 totals = SumLanes<kCount>(squares);
  if constexpr (kCount < kLanes) {
    static_assert(2 * kCount == kLanes);
    totals = EveryOther(totals, totals, int{0}, std::make_integer_sequence<int, kLanes>());
  }
  memcpy(sums, &totals, kCount * sizeof(float));
}

}  // namespace
}  // namespace jax_attn::cpu::JAX_ATTN_TARGET

#endif  // JAX_ATTN_CSRC_CPU_QKV_WHOLE_HEADS_H_
