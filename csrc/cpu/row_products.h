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

// Keys that fetches are decided for together.
inline constexpr int64_t kFetchGroup = 4;

// Rows [begin, end) to fetch into the cache, a line at a time, while others are computed with. Both
// are multiples of kFetchGroup.
struct Upcoming {
  const char* const* rows;
  int64_t begin, end;

  bool Has(int64_t j) const { return begin <= j && j < end; }
};

// Fetches the lines that begin within kPair elements from `offset` bytes on. Inlined by force: GCC
// drops calls of a function that has no effect but a prefetch.
template <typename Element>
__attribute__((always_inline)) inline void FetchPair(const char* row, int64_t offset) {
  constexpr int kBytes = kPair * sizeof(Element);
  if (kBytes < 64 && offset % 64 != 0) return;
  for (int b = 0; b < kBytes; b += 64) __builtin_prefetch(row + offset + b, 0, 3);
}

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
    F32 qa = Load(q + r * q_stride + first);
    Pin(qa);
    JAX_ATTN_UNROLL
    for (int i = 0; i < kKeys; ++i) sum[r * kKeys + i] += qa * a[i];
    F32 qb = Load(q + r * q_stride + first + kLanes);
    Pin(qb);
    JAX_ATTN_UNROLL
    for (int i = 0; i < kKeys; ++i) sum[r * kKeys + i] += qb * b[i];
  }
}

// Scores kRows rows of queries against the keys of a tile: s[r][j] = q[r] . k[j].
template <typename S, int kRows>
void ScoreRows(const float* q, int64_t q_stride, const char* const* keys, int64_t num_keys,
               int64_t head_dim, float* s, const Upcoming& upcoming) {
  // Sums stay in registers: 8 of 16, or 16 of 32.
  constexpr int kKeys = kRows == 8 || (kRows == 4 && !kManyRegisters) ? 2 : 4;
  constexpr int kSums = kRows * kKeys;
  using Element = typename S::Element;
  const int64_t whole = head_dim / kPair * kPair;
  const int rest = static_cast<int>(head_dim - whole);
  for (int64_t j = 0; j < num_keys; j += kKeys) {
    const bool fetch = upcoming.Has(j);
    const char* const* fetched = upcoming.rows + j;
    F32 sum[kSums];
    const Element* k[kKeys];
    JAX_ATTN_UNROLL
    for (int i = 0; i < kSums; ++i) sum[i] = F32{};
    JAX_ATTN_UNROLL
    for (int i = 0; i < kKeys; ++i) k[i] = reinterpret_cast<const Element*>(keys[j + i]);
    const auto add = [&](int64_t first, int count) {
      AddProducts<S, kRows, kKeys>(q, q_stride, k, first, count, sum);
    };
    for (int64_t c = 0; c < whole; c += kPair) {
      if (fetch) {
        JAX_ATTN_UNROLL
        for (int i = 0; i < kKeys; ++i) FetchPair<Element>(fetched[i], c * sizeof(Element));
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

// Adds p[r][j] * v[j] over the keys to o[r], for kPairs pairs of vectors that begin at `column`; or
// for a part of one pair, `rest` elements of it, if that is not 0.
template <typename S, int kRows, int kPairs, bool kPartial>
inline void AccumulateColumns(const float* p, const char* const* values, int64_t num_keys,
                              int64_t column, int rest, float* o, int64_t o_stride,
                              const Upcoming& upcoming) {
  using Element = typename S::Element;
  constexpr int kVectors = 2 * kPairs;
  const int64_t offset = column * sizeof(Element);
  F32 sum[kRows * kVectors];
  JAX_ATTN_UNROLL
  for (int i = 0; i < kRows * kVectors; ++i) {
    sum[i] = Load(o + i / kVectors * o_stride + column + i % kVectors * kLanes);
  }
  for (int64_t first = 0; first < num_keys; first += kFetchGroup) {
    if (!kPartial && upcoming.Has(first)) {
      JAX_ATTN_UNROLL
      for (int i = 0; i < kFetchGroup; ++i) {
        JAX_ATTN_UNROLL
        for (int pair = 0; pair < kPairs; ++pair) {
          FetchPair<Element>(upcoming.rows[first + i], offset + pair * kPair * sizeof(Element));
        }
      }
    }
    for (int64_t j = first; j < first + kFetchGroup; ++j) {
      const auto* value = reinterpret_cast<const Element*>(values[j] + offset);
      F32 v[kVectors];
      JAX_ATTN_UNROLL
      for (int pair = 0; pair < kPairs; ++pair) {
        if constexpr (kPartial) {
          LoadPartialPair<S>(value, rest, v[0], v[1]);
        } else {
          S::LoadPair(value + pair * kPair, v[2 * pair], v[2 * pair + 1]);
        }
      }
      JAX_ATTN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const F32 weight = Broadcast(p[r * kTileKeys + j]);
        JAX_ATTN_UNROLL
        for (int i = 0; i < kVectors; ++i) sum[r * kVectors + i] += weight * v[i];
      }
    }
  }
  JAX_ATTN_UNROLL
  for (int i = 0; i < kRows * kVectors; ++i) {
    Store(o + i / kVectors * o_stride + column + i % kVectors * kLanes, sum[i]);
  }
}

// Accumulates o[r] += sum over keys of p[r][j] * v[j]. The number of keys is a multiple of
// kFetchGroup.
template <typename S, int kRows>
void AccumulateRows(const float* p, const char* const* values, int64_t num_keys, int64_t v_head_dim,
                    float* o, int64_t o_stride, const Upcoming& upcoming) {
  // As many sums at once as registers hold, so that each has time before its next addition.
  constexpr int kPairs = kRows <= (kManyRegisters ? 4 : 2) ? 2 : 1;
  int64_t c = 0;
  for (; c + kPairs * kPair <= v_head_dim; c += kPairs * kPair) {
    AccumulateColumns<S, kRows, kPairs, false>(p, values, num_keys, c, 0, o, o_stride, upcoming);
  }
  if (kPairs > 1 && c + kPair <= v_head_dim) {
    AccumulateColumns<S, kRows, 1, false>(p, values, num_keys, c, 0, o, o_stride, upcoming);
    c += kPair;
  }
  if (c < v_head_dim) {
    const int rest = static_cast<int>(v_head_dim - c);
    AccumulateColumns<S, kRows, 1, true>(p, values, num_keys, c, rest, o, o_stride, upcoming);
  }
}

}  // namespace jax_attn::cpu::JAX_ATTN_TARGET

#endif  // JAX_ATTN_CSRC_CPU_ROW_PRODUCTS_H_
