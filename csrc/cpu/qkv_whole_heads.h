// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Heads of the usual sizes that are rotated whole, by halves: as many blocks as the compiler knows,
// so that a head stays in registers from the first load to the last store.

#ifndef JAX_ATTN_CSRC_CPU_QKV_WHOLE_HEADS_H_
#define JAX_ATTN_CSRC_CPU_QKV_WHOLE_HEADS_H_

#include "qkv_blocks.h"
#include "qkv_norm.h"

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

  // Computes a head; false if some of its elements must be computed again by ComputeAny. kSmall:
  // none is infinite or NaN.
  template <bool kSmall, typename F>
  bool Compute(const Element* x, float inverse, const F& factors) {
    U32 least = ~U32{};
    F32 sum = {};
    JAX_ATTN_UNROLL
    for (int i = 0; i < kBlocks / 2; ++i) {
      const int j = i + kBlocks / 2;
      const TurnedBlocks turned = TurnBlocks<B>(x, i * kPair, j * kPair, inverse, factors);
      if constexpr (B::kSpoilsNan) {
        if (!kSmall) {
          sum += (turned.first[0] + turned.first[1]) + (turned.second[0] + turned.second[1]);
        }
        blocks[i] = B::PackHalvesUp(turned.first[0], turned.first[1], least);
        blocks[j] = B::PackHalvesUp(turned.second[0], turned.second[1], least);
      } else {
        blocks[i] = B::Pack(turned.first[0], turned.first[1]);
        blocks[j] = B::Pack(turned.second[0], turned.second[1]);
      }
    }
    if constexpr (B::kSpoilsNan) {
      // A sum of numbers is a NaN if one of them is, and of both infinities.
      return !B::SawHalves(least) && (kSmall || !Any(IsNan(sum)));
    }
    return true;
  }

  template <typename F>
  void ComputeAny(const Element* x, float inverse, const F& factors) {
    JAX_ATTN_UNROLL
    for (int i = 0; i < kBlocks / 2; ++i) {
      const int j = i + kBlocks / 2;
      const TurnedBlocks turned = TurnBlocks<B>(x, i * kPair, j * kPair, inverse, factors);
      blocks[i] = B::PackAny(turned.first[0], turned.first[1]);
      blocks[j] = B::PackAny(turned.second[0], turned.second[1]);
    }
  }

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

// Sums of the squares of kHeadsAtOnce heads that are `stride` bytes apart, of which `num_heads`
// exist.
static_assert(kHeadsAtOnce == kLanes || 2 * kHeadsAtOnce == kLanes);
template <DType kDType, int kBlocks>
__attribute__((always_inline)) inline void SumSquaresOfHeads(const char* head, int64_t stride,
                                                             int64_t num_heads, float* sums) {
  using Whole = WholeHead<kDType, kBlocks>;
  F32 squares[kHeadsAtOnce];
  JAX_ATTN_UNROLL
  for (int i = 0; i < kHeadsAtOnce; ++i) {
    squares[i] = Whole::Squares(reinterpret_cast<const typename Whole::Element*>(head));
    head += i + 1 < num_heads ? stride : 0;
  }
  F32 totals = SumLanes<kHeadsAtOnce>(squares);
  if constexpr (kHeadsAtOnce < kLanes) {
    totals = EveryOther(totals, totals, int{0}, std::make_integer_sequence<int, kLanes>());
  }
  memcpy(sums, &totals, kHeadsAtOnce * sizeof(float));
}

// Heads of a token: where they are, and where they go.
struct HeadRows {
  int64_t count = 0;
  const char* from = nullptr;
  int64_t from_stride = 0;
  int64_t next_token = 0;  // bytes to the same head of the next token
  char* to = nullptr;      // one after the other
  char* stored = nullptr;  // null: nowhere else
  int64_t stored_stride = 0;
  bool stream = false;
  bool stream_stored = false;

  void Skip(int64_t num_heads, int64_t head_bytes) {
    count -= num_heads;
    from += num_heads * from_stride;
    to += num_heads * head_bytes;
    if (stored != nullptr) stored += num_heads * stored_stride;
  }
};

// Factors in registers, where there are enough.
template <int kBlocks>
struct HeldFactors {
  F32 own[2 * kBlocks];
  F32 other[2 * kBlocks];

  explicit HeldFactors(const Factors& factors) {
    JAX_ATTN_UNROLL
    for (int i = 0; i < 2 * kBlocks; ++i) {
      own[i] = factors.Own(i * kLanes);
      other[i] = factors.Other(i * kLanes);
    }
  }
  F32 Own(int64_t i) const { return own[i / kLanes]; }
  F32 Other(int64_t i) const { return other[i / kLanes]; }
};
template <int kBlocks>
using WholeFactors =
    std::conditional_t<kManyRegisters && kBlocks <= 4, HeldFactors<kBlocks>, const Factors&>;

// Computes the next head. Calls nothing, so that what does not change from head to head stays in
// registers.
template <DType kDType, int kBlocks, bool kStream, bool kSmall, typename F>
inline void ComputeHead(HeadRows& rows, float inverse, const F& factors) {
  using Whole = WholeHead<kDType, kBlocks>;
  PrefetchRow(rows.from + rows.next_token, Whole::kBytes);
  const auto* const x = reinterpret_cast<const typename Whole::Element*>(rows.from);
  Whole result;
  if (__builtin_expect(!result.template Compute<kSmall>(x, inverse, factors), 0)) {
    result.ComputeAny(x, inverse, factors);
  }
  result.template Write<kStream>(rows.to);
  if (rows.stored != nullptr) {
    result.Write(rows.stored, rows.stream_stored);
    rows.stored += rows.stored_stride;
  }
  rows.from += rows.from_stride;
  rows.to += Whole::kBytes;
}

// Computes `count` heads. Their inverses are `stride` apart: 0 if they have the same.
template <DType kDType, int kBlocks, bool kStream>
__attribute__((noinline)) void ComputeHeads(HeadRows rows, int64_t count, const float* inverses,
                                            int64_t stride, const Factors& in_memory) {
  const WholeFactors<kBlocks> factors(in_memory);
  for (int64_t i = 0; i < count; ++i) {
    ComputeHead<kDType, kBlocks, kStream, false>(rows, inverses[i * stride], factors);
  }
}

template <DType kDType, int kBlocks>
inline void ComputeHeads(const HeadRows& rows, int64_t count, const float* inverses, int64_t stride,
                         const Factors& factors) {
  if (rows.stream) {
    return ComputeHeads<kDType, kBlocks, true>(rows, count, inverses, stride, factors);
  }
  ComputeHeads<kDType, kBlocks, false>(rows, count, inverses, stride, factors);
}

// ---- Heads with a norm of their own

// An element is below 2e19 if the sum of squares of its head is finite, in which case the factor of
// the norm is not 0. Times this twice it is finite, and so are sums of two: no result is NaN.
constexpr float kLargeFactor = 1e9f;

inline bool AreSmall(F32 inverses) {
  return !Any(~((inverses > 0.0f) & (inverses < kLargeFactor)));
}

template <int kBlocks, typename F>
inline bool AreSmall(const F& factors) {
  F32 own = {}, other = {};
  JAX_ATTN_UNROLL
  for (int i = 0; i < kBlocks * 2; ++i) {
    own += factors.Own(i * kLanes) * factors.Own(i * kLanes);
    other += factors.Other(i * kLanes) * factors.Other(i * kLanes);
  }
  return Sum(own + other) < kLargeFactor * kLargeFactor;
}

// Normalizes and rotates heads until some are met that may have a NaN; returns how many.
template <DType kDType, int kBlocks, bool kStream>
__attribute__((noinline)) int64_t NormalizeHeads(HeadRows rows, float epsilon,
                                                 const Factors& in_memory) {
  const WholeFactors<kBlocks> factors(in_memory);
  if (!AreSmall<kBlocks>(factors)) return 0;
  // Of the heads at hand, and of the next few: see kHeadsAtOnce.
  alignas(64) float inverses[2][kLanes];
  for (int i = 0; i < kLanes; ++i) inverses[0][i] = inverses[1][i] = 1.0f;
  int64_t done = 0;
  for (int64_t found = 0; done < rows.count; found += kHeadsAtOnce) {
    if (found < rows.count) {
      float* const next = inverses[found / kHeadsAtOnce % 2];
      SumSquaresOfHeads<kDType, kBlocks>(rows.from + (found - done) * rows.from_stride,
                                         rows.from_stride, rows.count - found, next);
      InverseRms(kBlocks * kPair, epsilon, next);
    }
    if (found == 0) continue;
    const float* const now = inverses[done / kHeadsAtOnce % 2];
    if (!AreSmall(Load(now))) break;
    const int64_t left = rows.count - done, count = left < kHeadsAtOnce ? left : kHeadsAtOnce;
    for (int64_t i = 0; i < count; ++i) {
      ComputeHead<kDType, kBlocks, kStream, true>(rows, now[i], factors);
    }
    done += count;
  }
  return done;
}

template <DType kDType, int kBlocks>
inline int64_t NormalizeHeads(const HeadRows& rows, float epsilon, const Factors& factors) {
  if (rows.stream) return NormalizeHeads<kDType, kBlocks, true>(rows, epsilon, factors);
  return NormalizeHeads<kDType, kBlocks, false>(rows, epsilon, factors);
}

}  // namespace
}  // namespace jax_attn::cpu::JAX_ATTN_TARGET

#endif  // JAX_ATTN_CSRC_CPU_QKV_WHOLE_HEADS_H_
