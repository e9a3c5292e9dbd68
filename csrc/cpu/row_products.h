// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The inner loops: rows of queries times keys, and weights times values, for a tile.

#ifndef JAX_ATTN_CSRC_CPU_ROW_PRODUCTS_H_
#define JAX_ATTN_CSRC_CPU_ROW_PRODUCTS_H_

#include <cstdint>
#include <cstring>

#include "simd.h"
#include "split_kv_kernel.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {

// Rows [begin, end) to fetch into the cache while others are computed with.
struct Upcoming {
  const char* const* rows;
  int64_t bytes;  // of a row
  int64_t begin, end;

  // Whether a cache line of the rows begins at `offset` (lines are counted from the row's start).
  bool HasLineAt(int64_t offset) const { return offset % 64 == 0 && offset < bytes; }
  // Inlined by force: GCC drops calls of a function that has no effect but a prefetch.
  template <int kBytes>
  __attribute__((always_inline)) void Prefetch(int64_t j, int64_t offset) const {
    if (j < begin || j >= end) return;
    for (int b = 0; b < kBytes; b += 64) __builtin_prefetch(rows[j] + offset + b, 0, 3);
  }
};

// Adds the products of kRows rows of queries with kKeys keys to their sums. Queries are floats in
// the order of the storage.
template <typename S, int kRows, int kKeys>
inline void AddProducts(const float* q, int64_t q_stride, const typename S::Element* const* k,
                        int64_t first, int count, F32* sum) {
  F32 a[kKeys], b[kKeys];
  JAX_ATTN_UNROLL
  for (int i = 0; i < kKeys; ++i) {
    if (count == kPair) {
      S::LoadPair(k[i] + first, a[i], b[i]);
    } else {
      LoadPartialPair<S>(k[i] + first, count, a[i], b[i]);
    }
  }
  JAX_ATTN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const F32 qa = Load(q + r * q_stride + first);
    const F32 qb = Load(q + r * q_stride + first + kLanes);
    JAX_ATTN_UNROLL
    for (int i = 0; i < kKeys; ++i) sum[r * kKeys + i] += qa * a[i];
    JAX_ATTN_UNROLL
    for (int i = 0; i < kKeys; ++i) sum[r * kKeys + i] += qb * b[i];
  }
}

// The same where queries and keys are both bfloat16, and stay so.
template <int kRows, int kKeys>
inline void AddBFloat16Products(const float* q, int64_t q_stride, const uint16_t* const* k,
                                int64_t first, int count, F32* sum) {
  U32 words[kKeys];
  JAX_ATTN_UNROLL
  for (int i = 0; i < kKeys; ++i) {
    uint16_t padded[kPair] = {};
    if (count != kPair) memcpy(padded, k[i] + first, count * sizeof(uint16_t));
    words[i] = LoadAs<U32>(count == kPair ? k[i] + first : padded);
  }
  JAX_ATTN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const U32 row = LoadAs<U32>(reinterpret_cast<const uint16_t*>(q + r * q_stride) + first);
    JAX_ATTN_UNROLL
    for (int i = 0; i < kKeys; ++i) {
      sum[r * kKeys + i] = BFloat16Dot(sum[r * kKeys + i], row, words[i]);
    }
  }
}

// Scores kRows rows of queries against the keys of a tile: s[r][j] = q[r] . k[j]. kDot: queries
// are bfloat16 in the memory of their floats.
template <typename S, bool kDot, int kRows>
void ScoreRows(const float* q, int64_t q_stride, const char* const* keys, int64_t num_keys,
               int64_t head_dim, float* s, const Upcoming& upcoming) {
  // Sums stay in registers: 8 of 16, or 16 of 32.
  constexpr int kKeys = kRows == 4 && !kManyRegisters ? 2 : 4;
  constexpr int kSums = kRows * kKeys;
  using Element = typename S::Element;
  const int64_t whole = head_dim / kPair * kPair;
  const int rest = static_cast<int>(head_dim - whole);
  for (int64_t j = 0; j < num_keys; j += kKeys) {
    F32 sum[kSums];
    const Element* k[kKeys];
    JAX_ATTN_UNROLL
    for (int i = 0; i < kSums; ++i) sum[i] = F32{};
    JAX_ATTN_UNROLL
    for (int i = 0; i < kKeys; ++i) k[i] = reinterpret_cast<const Element*>(keys[j + i]);
    const auto add = [&](int64_t first, int count) {
      if constexpr (kDot) {
        AddBFloat16Products<kRows, kKeys>(q, q_stride, k, first, count, sum);
      } else {
        AddProducts<S, kRows, kKeys>(q, q_stride, k, first, count, sum);
      }
    };
    for (int64_t c = 0; c < whole; c += kPair) {
      const int64_t offset = c * sizeof(Element);
      if (upcoming.HasLineAt(offset)) {
        JAX_ATTN_UNROLL
        for (int i = 0; i < kKeys; ++i) {
          upcoming.template Prefetch<kPair * sizeof(Element)>(j + i, offset);
        }
      }
      add(c, kPair);
    }
    if (rest != 0) add(whole, rest);
    constexpr int kAtOnce = kSums < kLanes ? kSums : kLanes;
    JAX_ATTN_UNROLL
    for (int first = 0; first < kSums; first += kAtOnce) {
      float totals[kLanes];
      Store(totals, SumLanes<kAtOnce>(sum + first));
      JAX_ATTN_UNROLL
      for (int i = 0; i < kAtOnce; i += kKeys) {
        float* to = s + (first + i) / kKeys * kTileKeys + j;
        if constexpr (kAtOnce == kLanes) {
          memcpy(to, totals + i, kKeys * sizeof(float));
        } else {
          constexpr int kApart = kLanes / kAtOnce;
          JAX_ATTN_UNROLL
          for (int key = 0; key < kKeys; ++key) to[key] = totals[(i + key) * kApart];
        }
      }
    }
  }
}

// Adds p[r][j] * v[j] over the keys to the sums of kRows rows, for one pair of vectors.
template <typename S, int kRows, bool kWhole, bool kFetch>
inline void AccumulatePair(const float* p, const char* const* values, int64_t num_keys,
                           int64_t offset, int rest, F32* sum, const Upcoming& upcoming) {
  F32 total[2 * kRows];
  JAX_ATTN_UNROLL
  for (int i = 0; i < 2 * kRows; ++i) total[i] = sum[i];
  for (int64_t j = 0; j < num_keys; ++j) {
    F32 a, b;
    const auto* value = reinterpret_cast<const typename S::Element*>(values[j] + offset);
    if constexpr (kWhole) {
      S::LoadPair(value, a, b);
    } else {
      LoadPartialPair<S>(value, rest, a, b);
    }
    if constexpr (kFetch) {
      upcoming.template Prefetch<kPair * sizeof(typename S::Element)>(j, offset);
    }
    JAX_ATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const F32 weight = Broadcast(p[r * kTileKeys + j]);
      total[2 * r] += weight * a;
      total[2 * r + 1] += weight * b;
    }
  }
  JAX_ATTN_UNROLL
  for (int i = 0; i < 2 * kRows; ++i) sum[i] = total[i];
}

// Accumulates o[r] += sum over keys of p[r][j] * v[j].
template <typename S, int kRows>
void AccumulateRows(const float* p, const char* const* values, int64_t num_keys, int64_t v_head_dim,
                    float* o, int64_t o_stride, const Upcoming& upcoming) {
  for (int64_t c = 0; c < v_head_dim; c += kPair) {
    F32 sum[2 * kRows];
    JAX_ATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[2 * r] = Load(o + r * o_stride + c);
      sum[2 * r + 1] = Load(o + r * o_stride + c + kLanes);
    }
    const int64_t offset = c * sizeof(typename S::Element);
    const int rest = static_cast<int>(v_head_dim - c);
    if (rest < kPair) {
      AccumulatePair<S, kRows, false, false>(p, values, num_keys, offset, rest, sum, upcoming);
    } else if (upcoming.HasLineAt(offset)) {
      AccumulatePair<S, kRows, true, true>(p, values, num_keys, offset, rest, sum, upcoming);
    } else {
      AccumulatePair<S, kRows, true, false>(p, values, num_keys, offset, rest, sum, upcoming);
    }
    JAX_ATTN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      Store(o + r * o_stride + c, sum[2 * r]);
      Store(o + r * o_stride + c + kLanes, sum[2 * r + 1]);
    }
  }
}

}  // namespace jax_attn::cpu::JAX_ATTN_TARGET

#endif  // JAX_ATTN_CSRC_CPU_ROW_PRODUCTS_H_
