// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Rows of the fused QKV pass: from storage to floats and back, copied, or quantised.

#ifndef JAX_ATTN_CSRC_CPU_QKV_ROWS_H_
#define JAX_ATTN_CSRC_CPU_QKV_ROWS_H_

#include "encode.h"
#include "fused_qkv_kernel.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {
namespace {

// A head in float32. Loops over it may run past its end, up to a whole pair of vectors.
struct alignas(64) Head {
  float values[kMaxFusedHeadDim + kPair];
};

// ---- Rows of storage

// Decodes `n` elements in the order of memory; never reads past them.
template <DType kDType>
void Decode(const void* from, int64_t n, float* to) {
  using F = Format<kDType>;
  const auto* row = static_cast<const typename F::Element*>(from);
  F32 a, b;
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    F::LoadPair(row + i, a, b);
    Store(to + i, a);
    Store(to + i + kLanes, b);
  }
  if (i == n) return;
  LoadPartialPair<F>(row + i, static_cast<int>(n - i), a, b);
  Store(to + i, a);
  Store(to + i + kLanes, b);
}

void DecodeFloats(const void* data, DType dtype, int64_t first, int64_t n, float* to) {
  const char* from = static_cast<const char*>(data) + first * SizeOf(dtype);
  if (dtype == DType::kFloat32) return Decode<DType::kFloat32>(from, n, to);
  if (dtype == DType::kBFloat16) return Decode<DType::kBFloat16>(from, n, to);
  Decode<DType::kFloat16>(from, n, to);
}

// Streaming stores need whole, aligned vectors.
bool CanStream(const void* to, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(to) % 64 == 0 && bytes % 64 == 0;
}

template <DType kDType>
void Encode(const float* from, int64_t n, typename Format<kDType>::Element* to) {
  using F = Format<kDType>;
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    StoreVector<false>(to + i, F::Pack(Load(from + i), Load(from + i + kLanes)));
  }
  if (i == n) return;
  typename F::Element padded[kPair];
  StoreVector<false>(padded, F::Pack(Load(from + i), Load(from + i + kLanes)));
  memcpy(to + i, padded, (n - i) * sizeof(padded[0]));
}

// Asks for a row of the next token: prefetching by hardware alone leaves memory idle while a head
// is computed. Into L2, since a core can wait for few lines on their way to L1.
inline void PrefetchRow(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
}

// Copies a row to one place, and to another unless that is null.
void Copy(const void* from, int64_t bytes, void* to, void* also, bool stream) {
  const auto* row = static_cast<const char*>(from);
  if (stream && CanStream(to, bytes) && (also == nullptr || CanStream(also, bytes))) {
    for (int64_t i = 0; i < bytes; i += sizeof(U32)) {
      const U32 v = LoadAs<U32>(row + i);
      StoreAround(static_cast<char*>(to) + i, v);
      if (also != nullptr) StoreAround(static_cast<char*>(also) + i, v);
    }
    return;
  }
  memcpy(to, from, bytes);
  if (also != nullptr) memcpy(also, from, bytes);
}

// ---- Quantising

// The scale of a row whose largest number `top` is to be the largest of a format.
inline float ScaleOfLargest(float top, float largest) {
  const float scale = top / largest;
  return scale < 1.17549435e-38f ? 1.0f : scale;  // rows of zeros, or nearly
}

template <DType kFrom>
float DynamicScale(const typename Format<kFrom>::Element* row, int64_t n, float largest) {
  F32 top = {};
  int64_t i = 0;
  F32 a, b;
  for (; i + kPair <= n; i += kPair) {
    Format<kFrom>::LoadPair(row + i, a, b);
    top = Max(top, Max(Magnitude(a), Magnitude(b)));
  }
  if (i != n) {
    LoadPartialPair<Format<kFrom>>(row + i, static_cast<int>(n - i), a, b);
    top = Max(top, Max(Magnitude(a), Magnitude(b)));
  }
  return ScaleOfLargest(MaxLane(top), largest);
}

// Where a row of a token goes in the cache.
struct Place {
  char* row = nullptr;  // null: nowhere
  int64_t row_stride = 0;
  const float* scale = nullptr;
  float* dynamic_scale = nullptr;  // where to write the scale of the row; null: it is given
  int64_t scale_stride = 0;
  bool same_type = false;  // stored as it is

  // Moves on to the next head.
  void Next() {
    if (row != nullptr) row += row_stride;
    if (scale != nullptr) scale += scale_stride;
    if (dynamic_scale != nullptr) dynamic_scale += scale_stride;
  }
};

// Division by a scale, rounded as division is, in a third of the time where products can be fused
// with sums: the quotient by the reciprocal is corrected by its remainder (Markstein).
class Divisor {
 public:
  explicit Divisor(float scale)
      : scale_(Broadcast(scale)),
        inverse_(Broadcast(1.0f / scale)),
        usual_(scale > 1e-30f && scale < 1e30f) {}

  F32 Divide(F32 x) const {
#if defined(__FMA__)
    if (usual_) {
      const F32 quotient = x * inverse_;
      const F32 corrected = quotient - (quotient * scale_ - x) * inverse_;  // keeps -0
      return Select(Magnitude(quotient) < 1e30f, corrected, quotient);      // not of infinities
    }
#endif
    return x / scale_;
  }

 private:
  F32 scale_;
  F32 inverse_;
  bool usual_;
};

template <DType kFrom, DType kTo, bool kStream>
void QuantizeTo(const typename Format<kFrom>::Element* row, int64_t n, float scale,
                typename Format<kTo>::Element* to) {
  using From = Format<kFrom>;
  using To = Format<kTo>;
  const Divisor divisor(scale);
  const bool scaled = scale != 1.0f;
  int64_t i = 0;
  F32 a, b;
  for (; i + kPair <= n; i += kPair) {
    From::LoadPair(row + i, a, b);
    if (scaled) {
      a = divisor.Divide(a);
      b = divisor.Divide(b);
    }
    StoreVector<kStream>(to + i, To::Pack(a, b));
  }
  if (i == n) return;
  LoadPartialPair<From>(row + i, static_cast<int>(n - i), a, b);
  typename To::Element padded[kPair];
  StoreVector<false>(padded, To::Pack(divisor.Divide(a), divisor.Divide(b)));
  memcpy(to + i, padded, (n - i) * sizeof(padded[0]));
}

template <DType kFrom, DType kTo>
void Quantize(const void* from, int64_t n, const Place& place, bool stream) {
  const auto* row = static_cast<const typename Format<kFrom>::Element*>(from);
  auto* to = reinterpret_cast<typename Format<kTo>::Element*>(place.row);
  float scale = place.scale == nullptr ? 1.0f : *place.scale;
  if constexpr (SizeOf(kTo) == 1) {
    if (place.dynamic_scale != nullptr) {
      scale = *place.dynamic_scale = DynamicScale<kFrom>(row, n, Format<kTo>::kLargest);
    }
  }
  if (stream && CanStream(to, n * SizeOf(kTo)))
    return QuantizeTo<kFrom, kTo, true>(row, n, scale, to);
  QuantizeTo<kFrom, kTo, false>(row, n, scale, to);
}

// Stores a row in the cache.
template <DType kFrom>
void Quantize(const void* row, int64_t n, DType dtype, const Place& place, bool stream) {
  switch (dtype) {
    case DType::kFloat32:
      return Quantize<kFrom, DType::kFloat32>(row, n, place, stream);
    case DType::kBFloat16:
      return Quantize<kFrom, DType::kBFloat16>(row, n, place, stream);
    case DType::kFloat16:
      return Quantize<kFrom, DType::kFloat16>(row, n, place, stream);
    case DType::kInt8:
      return Quantize<kFrom, DType::kInt8>(row, n, place, stream);
    case DType::kFloat8E4M3FN:
      return Quantize<kFrom, DType::kFloat8E4M3FN>(row, n, place, stream);
    case DType::kFloat8E4M3FNUZ:
      return Quantize<kFrom, DType::kFloat8E4M3FNUZ>(row, n, place, stream);
    case DType::kFloat8E5M2:
      return Quantize<kFrom, DType::kFloat8E5M2>(row, n, place, stream);
  }
}

}  // namespace
}  // namespace jax_attn::cpu::JAX_ATTN_TARGET

#endif  // JAX_ATTN_CSRC_CPU_QKV_ROWS_H_
