// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Rows of the fused QKV pass: pieces of heads from storage to floats and back, and into the cache.

#ifndef JAX_ATTN_CSRC_GPU_FUSED_QKV_ROWS_H_
#define JAX_ATTN_CSRC_GPU_FUSED_QKV_ROWS_H_

#include <cstdint>

#include "elements.h"
#include "encode.h"
#include "fused_qkv_work.h"
#include "wave.h"

namespace jax_attn::gpu {

// Consecutive elements as they are stored.
template <DType kDType, int kSize = kPieceSize>
struct Piece {
  static constexpr int kBytes = kSize * static_cast<int>(SizeOf(kDType));
  static constexpr int kVectorBytes = kBytes < 16 ? kBytes : 16;
  static constexpr int kWords = kBytes / 4;
  static_assert(kWords > 0);
  using Vector = typename Bytes<kVectorBytes>::Type;
  struct Vectors {
    Vector vectors[kBytes / kVectorBytes];
  };
  uint32_t words[kWords] = {};

  JAX_ATTN_DEVICE void Load(const void* from) {
    Vectors read;
#pragma unroll
    for (int i = 0; i < kBytes / kVectorBytes; ++i) {
      read.vectors[i] = static_cast<const Vector*>(from)[i];
    }
    __builtin_memcpy(words, &read, kBytes);
  }
  JAX_ATTN_DEVICE void Store(void* to) const {
    Vectors written;
    __builtin_memcpy(&written, words, kBytes);
#pragma unroll
    for (int i = 0; i < kBytes / kVectorBytes; ++i) {
      static_cast<Vector*>(to)[i] = written.vectors[i];
    }
  }
  JAX_ATTN_DEVICE void Decode(float (&x)[kSize]) const {
    constexpr int kPerWord = kSize / kWords;
#pragma unroll
    for (int i = 0; i < kWords; ++i) ToFloats<kDType>(words[i], x + i * kPerWord);
  }
  JAX_ATTN_DEVICE void Encode(const float (&x)[kSize]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (kDType == DType::kFloat32) {
        words[i] = FloatBits(x[i]);
      } else {
        words[i] = Pack<kDType>(x[2 * i], x[2 * i + 1]);
      }
    }
  }
};

// Reads a piece of an array whose type is known at run time.
JAX_ATTN_DEVICE void LoadFloats(const void* data, DType dtype, int64_t first,
                                float (&x)[kPieceSize]) {
  if (dtype == DType::kFloat32) {
    Piece<DType::kFloat32> piece;
    piece.Load(static_cast<const float*>(data) + first);
    piece.Decode(x);
  } else if (dtype == DType::kBFloat16) {
    Piece<DType::kBFloat16> piece;
    piece.Load(static_cast<const uint16_t*>(data) + first);
    piece.Decode(x);
  } else {
    Piece<DType::kFloat16> piece;
    piece.Load(static_cast<const uint16_t*>(data) + first);
    piece.Decode(x);
  }
}

// Division by a scale, rounded as division is: the quotient by the reciprocal is corrected by its
// remainder (Markstein), a third of the operations.
class ScaleDivisor {
 public:
  JAX_ATTN_DEVICE explicit ScaleDivisor(float scale) {
    // The remainder of a tiny or a huge scale could not be represented.
    factor_ = scale < 1e-30f ? 0x1p96f : scale > 1e30f ? 0x1p-96f : 1.0f;
    scale_ = scale * factor_;
    inverse_ = 1.0f / scale_;
    usual_ = scale_ > 1e-30f && scale_ < 1e30f;
  }

  JAX_ATTN_DEVICE float Divide(float x) const {
    const float scaled = x * factor_, quotient = scaled * inverse_;
    const float remainder = __builtin_fmaf(-quotient, scale_, scaled);
    const float corrected = __builtin_fmaf(remainder, inverse_, quotient);
    // Not of infinities, and a NaN stays one.
    return usual_ && __builtin_fabsf(quotient) < 1e30f ? corrected : quotient;
  }

 private:
  float factor_;
  float scale_;
  float inverse_;
  bool usual_;
};

// Stores a piece in another type than it has.
template <DType kTo, int kSize>
JAX_ATTN_DEVICE void StoreAs(const float (&x)[kSize], char* to) {
  if constexpr (SizeOf(kTo) != 1) {
    Piece<kTo, kSize> piece;
    piece.Encode(x);
    piece.Store(to);
  } else if constexpr (kSize == 4) {
    *reinterpret_cast<uint32_t*>(to) = ToBytes<kTo>(x);
  } else {
    static_assert(kSize == 8);
    *reinterpret_cast<uint2*>(to) = {ToBytes<kTo>(x), ToBytes<kTo>(x + 4)};
  }
}

// The two pieces of a head that a lane has; `first` and `second` count pieces.
struct LanePieces {
  int first = 0;
  int second = 0;
  bool has_first = false;
  bool has_second = false;
  bool rotated = false;  // the pieces are the pairs of a rotation

  LanePieces() = default;
  JAX_ATTN_DEVICE LanePieces(const FusedQkvWork& w, const QkvPart& part, int lane) {
    const int pieces = part.num_pieces, rotated_pieces = 2 * part.rotated_slots;
    const int begin = w.rotary_piece;
    rotated = lane < part.rotated_slots;
    if (rotated) {
      first = begin + lane;
      second = first + part.rotated_slots;
      has_first = has_second = true;
      return;
    }
    // Of the other pieces the first half, and the second half.
    const int others = pieces - rotated_pieces, half = (others + 1) >> 1;
    const int before = rotated_pieces == 0 ? pieces : begin;  // others in front of the rotated ones
    first = lane - part.rotated_slots;
    second = first + half;
    has_first = first < half;
    has_second = has_first && second < others;
    first = !has_first ? 0 : first < before ? first : first + rotated_pieces;
    second = !has_second ? 0 : second < before ? second : second + rotated_pieces;
  }

  // The same with bits that were not compared yet; of `rotated` only if it is asked for.
  template <bool kRotated = true>
  JAX_ATTN_DEVICE LanePieces Again() const {
    LanePieces fresh = *this;
    fresh.has_first = FreshOfLane(has_first);
    fresh.has_second = FreshOfLane(has_second);
    if (kRotated) fresh.rotated = FreshOfLane(rotated);
    return fresh;
  }
};

// Where the rows of a token go in the cache.
struct CachePlace {
  char* data = nullptr;  // of head 0; null: nowhere
  int64_t head_stride = 0;
  const float* scale = nullptr;
  float* dynamic_scale = nullptr;  // where to write the scale of a row
  int64_t scale_stride = 0;
};

// Stores the pieces of a lane in the row at `row`.
template <DType kTo, int kSize>
JAX_ATTN_DEVICE void StorePieces(const float (&x)[2][kSize], const LanePieces& at, char* row) {
  constexpr int kBytes = kSize * static_cast<int>(SizeOf(kTo));
  if (at.has_first) StoreAs<kTo>(x[0], row + at.first * kBytes);
  if (at.has_second) StoreAs<kTo>(x[1], row + at.second * kBytes);
}

template <int kSize>
JAX_ATTN_DEVICE void StorePieces(DType dtype, const float (&x)[2][kSize], const LanePieces& at,
                                 char* row) {
  switch (dtype) {
    case DType::kFloat32:
      return StorePieces<DType::kFloat32>(x, at, row);
    case DType::kBFloat16:
      return StorePieces<DType::kBFloat16>(x, at, row);
    case DType::kFloat16:
      return StorePieces<DType::kFloat16>(x, at, row);
    case DType::kInt8:
      return StorePieces<DType::kInt8>(x, at, row);
    case DType::kFloat8E4M3FN:
      return StorePieces<DType::kFloat8E4M3FN>(x, at, row);
    case DType::kFloat8E4M3FNUZ:
      return StorePieces<DType::kFloat8E4M3FNUZ>(x, at, row);
    case DType::kFloat8E5M2:
      return StorePieces<DType::kFloat8E5M2>(x, at, row);
  }
}

// Stores a row of a token in another type, or scaled; 2^`lane_bits` lanes have it. All lanes of the
// wave call this; those that have nothing to store are not `wanted`.
template <DType kDType, int kSize>
JAX_ATTN_DEVICE void ConvertRow(const CachePlace& place, DType dtype, int head, int lane_bits,
                                const LanePieces& at, const Piece<kDType, kSize> (&pieces)[2],
                                bool wanted) {
  // What is stored is what is returned: the rounded row.
  float x[2][kSize];
  pieces[0].Decode(x[0]);
  pieces[1].Decode(x[1]);
  float scale = 1.0f;
  if (place.dynamic_scale != nullptr) {
    float top = 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      top = Max(top, Max(__builtin_fabsf(x[0][i]), __builtin_fabsf(x[1][i])));
    }
    for (int mask = 1; mask >> lane_bits == 0; mask *= 2) top = Max(top, ShuffleXor(top, mask));
    scale = top / LargestOf(dtype);
    if (scale < 1.17549435e-38f) scale = 1.0f;  // rows of zeros, or nearly
    const int first_lane = Lane() >> lane_bits << lane_bits;
    if (wanted && Lane() == first_lane) place.dynamic_scale[head * place.scale_stride] = scale;
  } else if (place.scale != nullptr && wanted) {
    scale = place.scale[head * place.scale_stride];
  }
  if (scale != 1.0f) {
    const ScaleDivisor divisor(scale);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      x[0][i] = divisor.Divide(x[0][i]);
      x[1][i] = divisor.Divide(x[1][i]);
    }
  }
  const DType fresh_dtype = static_cast<DType>(Fresh(static_cast<int>(dtype)));
  if (wanted) StorePieces(fresh_dtype, x, at, place.data + head * place.head_stride);
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_FUSED_QKV_ROWS_H_
