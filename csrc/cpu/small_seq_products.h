// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The inner loops: products of rows, and weighted sums of rows, all in the dtype of the operands.

#ifndef JAX_ATTN_CSRC_CPU_SMALL_SEQ_PRODUCTS_H_
#define JAX_ATTN_CSRC_CPU_SMALL_SEQ_PRODUCTS_H_

#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {

// Vectors of `dim` elements; row i begins offset[i] elements from `data`.
template <typename Element>
struct Rows {
  Element* data;
  int64_t dim;
  const int32_t* offset;

  Element* operator[](int64_t i) const { return data + offset[i]; }
};

// Products of kRows rows of `a` with kKeys rows of `b`: out[r * stride + j] = a[r] . b[j].
template <typename S, int kRows, int kKeys>
inline void Multiply(const Rows<const typename S::Element>& a, int64_t first_a,
                     const Rows<const typename S::Element>& b, int64_t first_b, float* out,
                     int64_t stride) {
  using Element = typename S::Element;
  constexpr int kSums = kRows * kKeys;
  const Element *x[kRows], *y[kKeys];
  F32 sum[kSums];
  JAX_ATTN_UNROLL
  for (int r = 0; r < kRows; ++r) x[r] = a[first_a + r];
  JAX_ATTN_UNROLL
  for (int j = 0; j < kKeys; ++j) y[j] = b[first_b + j];
  JAX_ATTN_UNROLL
  for (int i = 0; i < kSums; ++i) sum[i] = F32{};
  const auto add = [&](auto load) {
    F32 xa[kRows], xb[kRows];
    JAX_ATTN_UNROLL
    for (int r = 0; r < kRows; ++r) load(x[r], xa[r], xb[r]);
    JAX_ATTN_UNROLL
    for (int j = 0; j < kKeys; ++j) {
      F32 ya, yb;
      load(y[j], ya, yb);
      JAX_ATTN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sum[r * kKeys + j] += xa[r] * ya;
        sum[r * kKeys + j] += xb[r] * yb;
      }
    }
  };
  int64_t c = 0;
  for (; c + kPair <= a.dim; c += kPair) {
    add([&](const Element* from, F32& u, F32& v) { S::LoadPair(from + c, u, v); });
  }
  if (c < a.dim) {
    const int rest = static_cast<int>(a.dim - c);
    add([&](const Element* from, F32& u, F32& v) { LoadPartialPair<S>(from + c, rest, u, v); });
  }
  constexpr int kAtOnce = kSums < kLanes ? kSums : kLanes;
  JAX_ATTN_UNROLL
  for (int first = 0; first < kSums; first += kAtOnce) {
    const F32 totals = SumLanes<kAtOnce>(sum + first);
    JAX_ATTN_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int r = (first + i) / kKeys, j = (first + i) % kKeys;
      out[r * stride + j] = totals[i * (kLanes / kAtOnce)];
    }
  }
}

template <typename S, int kRows, int kKeys>
inline void MultiplyKeys(const Rows<const typename S::Element>& a, int64_t r,
                         const Rows<const typename S::Element>& b, int64_t num_keys, float* out,
                         int64_t stride) {
  int64_t j = 0;
  for (; j + kKeys <= num_keys; j += kKeys) {
    Multiply<S, kRows, kKeys>(a, r, b, j, out + j, stride);
  }
  if constexpr (kKeys > 4) {
    if (j + 4 <= num_keys) Multiply<S, kRows, 4>(a, r, b, j, out + j, stride), j += 4;
  }
  if constexpr (kKeys > 2) {
    if (j + 2 <= num_keys) Multiply<S, kRows, 2>(a, r, b, j, out + j, stride), j += 2;
  }
  if (j < num_keys) Multiply<S, kRows, 1>(a, r, b, j, out + j, stride);
}

// out[r * stride + j] = a[r] . b[j] for all rows of both.
template <typename S>
inline void MultiplyAll(const Rows<const typename S::Element>& a, int64_t num_rows,
                        const Rows<const typename S::Element>& b, int64_t num_keys, float* out,
                        int64_t stride) {
  // Sums stay in registers: 8 of 16, or 16 of 32.
  constexpr int kWide = kManyRegisters ? 4 : 2;
  int64_t r = 0;
  for (; r + 4 <= num_rows; r += 4) {
    MultiplyKeys<S, 4, kWide>(a, r, b, num_keys, out + r * stride, stride);
  }
  for (; r + 2 <= num_rows; r += 2) {
    MultiplyKeys<S, 2, 4>(a, r, b, num_keys, out + r * stride, stride);
  }
  if (r < num_rows) MultiplyKeys<S, 1, 8>(a, r, b, num_keys, out + r * stride, stride);
}

// Pairs of vectors in a cache line, at least one.
template <typename Element>
inline constexpr int kLinePairs = 64 / (kPair * sizeof(Element)) > 1 ? 2 : 1;

// What a weighted sum multiplies input i with for output o.
struct Weights {
  const float* data;
  int64_t of_output;  // strides
  int64_t of_input;
};

// Elements [c, c + kPairs * kPair) of kOutputs sums: out[o] = sum over i of w[o, i] * in[i].
template <typename S, DType kDType, int kOutputs, int kPairs, bool kAround, bool kWhole>
inline void SumElements(const Weights& w, const Rows<const typename S::Element>& in,
                        int64_t num_inputs, typename S::Element* const* out, int64_t c, int rest) {
  constexpr int kVectors = 2 * kPairs;
  F32 sum[kOutputs * kVectors];
  JAX_ATTN_UNROLL
  for (int i = 0; i < kOutputs * kVectors; ++i) sum[i] = F32{};
  for (int64_t i = 0; i < num_inputs; ++i) {
    const typename S::Element* x = in[i] + c;
    F32 v[kVectors];
    JAX_ATTN_UNROLL
    for (int k = 0; k < kPairs; ++k) {
      if constexpr (kWhole) {
        S::LoadPair(x + k * kPair, v[2 * k], v[2 * k + 1]);
      } else {
        LoadPartialPair<S>(x, rest, v[0], v[1]);
      }
    }
    JAX_ATTN_UNROLL
    for (int o = 0; o < kOutputs; ++o) {
      const F32 weight = Broadcast(w.data[o * w.of_output + i * w.of_input]);
      JAX_ATTN_UNROLL
      for (int k = 0; k < kVectors; ++k) sum[o * kVectors + k] += weight * v[k];
    }
  }
  JAX_ATTN_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    JAX_ATTN_UNROLL
    for (int k = 0; k < kPairs; ++k) {
      const F32 a = sum[o * kVectors + 2 * k], b = sum[o * kVectors + 2 * k + 1];
      if constexpr (kWhole) {
        StorePair<kDType, kAround>(out[o] + c + k * kPair, a, b);
      } else {
        StorePartialPair<kDType>(out[o] + c, rest, a, b);
      }
    }
  }
}

template <typename S, DType kDType, int kOutputs, bool kAround>
inline void SumRows(const Weights& w, const Rows<const typename S::Element>& in, int64_t num_inputs,
                    const Rows<typename S::Element>& out, int64_t first) {
  // A cache line should be used up at once: rows at a distance of pages share few places in the
  // cache, and a store around the caches may wait for the rest of a line.
  constexpr int kPairs = kOutputs <= 2 ? kLinePairs<typename S::Element> : 1;
  typename S::Element* to[kOutputs];
  JAX_ATTN_UNROLL
  for (int o = 0; o < kOutputs; ++o) to[o] = out[first + o];
  int64_t c = 0;
  for (; c + kPairs * kPair <= out.dim; c += kPairs * kPair) {
    SumElements<S, kDType, kOutputs, kPairs, kAround, true>(w, in, num_inputs, to, c, 0);
  }
  for (; c + kPair <= out.dim; c += kPair) {
    SumElements<S, kDType, kOutputs, 1, kAround, true>(w, in, num_inputs, to, c, 0);
  }
  if (c < out.dim) {
    const int rest = static_cast<int>(out.dim - c);
    SumElements<S, kDType, kOutputs, 1, false, false>(w, in, num_inputs, to, c, rest);
  }
}

// The same of a single input: weights stay in registers, and so does what is loaded.
template <typename S, DType kDType, int kOutputs, bool kAround>
inline void ScaleRow(const Weights& w, const typename S::Element* in,
                     const Rows<typename S::Element>& out, int64_t first) {
  typename S::Element* to[kOutputs];
  F32 weight[kOutputs];
  JAX_ATTN_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    to[o] = out[first + o];
    weight[o] = Broadcast(w.data[o * w.of_output]);
  }
  // A cache line at a time, which is all of it that a store around the caches may wait for.
  constexpr int kPairs = kLinePairs<typename S::Element>;
  const auto scale = [&](int64_t c, auto pairs) {
    constexpr int kCount = decltype(pairs)::value;
    F32 x[2 * kCount];
    JAX_ATTN_UNROLL
    for (int k = 0; k < kCount; ++k) S::LoadPair(in + c + k * kPair, x[2 * k], x[2 * k + 1]);
    JAX_ATTN_UNROLL
    for (int o = 0; o < kOutputs; ++o) {
      JAX_ATTN_UNROLL
      for (int k = 0; k < kCount; ++k) {
        StorePair<kDType, kAround>(to[o] + c + k * kPair, weight[o] * x[2 * k],
                                   weight[o] * x[2 * k + 1]);
      }
    }
  };
  int64_t c = 0;
  for (; c + kPairs * kPair <= out.dim; c += kPairs * kPair) {
    scale(c, std::integral_constant<int, kPairs>());
  }
  for (; c + kPair <= out.dim; c += kPair) scale(c, std::integral_constant<int, 1>());
  if (c < out.dim) {
    F32 a, b;
    const int rest = static_cast<int>(out.dim - c);
    LoadPartialPair<S>(in + c, rest, a, b);
    JAX_ATTN_UNROLL
    for (int o = 0; o < kOutputs; ++o) {
      StorePartialPair<kDType>(to[o] + c, rest, weight[o] * a, weight[o] * b);
    }
  }
}

// out[o] = sum over i of w[o, i] * in[i], for outputs [first, last).
template <typename S, DType kDType, bool kAround>
inline void SumAll(Weights w, const Rows<const typename S::Element>& in, int64_t num_inputs,
                   const Rows<typename S::Element>& out, int64_t first, int64_t last) {
  const float* data = w.data;
  int64_t o = first;
  const auto at = [&](int64_t o) {
    return Weights{data + o * w.of_output, w.of_output, w.of_input};
  };
  if (num_inputs == 1) {
    for (; o + 4 <= last; o += 4) ScaleRow<S, kDType, 4, kAround>(at(o), in[0], out, o);
    for (; o < last; ++o) ScaleRow<S, kDType, 1, kAround>(at(o), in[0], out, o);
    return;
  }
  if constexpr (!kAround || kLinePairs<typename S::Element> == 1) {
    for (; o + 4 <= last; o += 4) SumRows<S, kDType, 4, kAround>(at(o), in, num_inputs, out, o);
  }
  for (; o + 2 <= last; o += 2) SumRows<S, kDType, 2, kAround>(at(o), in, num_inputs, out, o);
  if (o < last) SumRows<S, kDType, 1, kAround>(at(o), in, num_inputs, out, o);
}

}  // namespace jax_attn::cpu::JAX_ATTN_TARGET

#endif  // JAX_ATTN_CSRC_CPU_SMALL_SEQ_PRODUCTS_H_
