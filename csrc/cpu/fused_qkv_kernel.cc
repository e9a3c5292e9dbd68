// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "fused_qkv_kernel.h"

#include "encode.h"
#include "simd.h"

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
  typename F::Element padded[kPair] = {};
  memcpy(padded, row + i, (n - i) * sizeof(padded[0]));
  F::LoadPair(padded, a, b);
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

// Encodes `n` elements to one place, and to another unless that is null.
template <DType kDType, bool kStream>
void EncodeTo(const float* from, int64_t n, void* to, void* also) {
  using F = Format<kDType>;
  auto* row = static_cast<typename F::Element*>(to);
  auto* second = static_cast<typename F::Element*>(also);
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    const typename F::Packed packed = F::Pack(Load(from + i), Load(from + i + kLanes));
    StoreAs<kStream>(row + i, packed);
    if (second != nullptr) StoreAs<kStream>(second + i, packed);
  }
  if (i == n) return;
  typename F::Element padded[kPair];
  StoreAs<false>(padded, F::Pack(Load(from + i), Load(from + i + kLanes)));
  memcpy(row + i, padded, (n - i) * sizeof(padded[0]));
  if (second != nullptr) memcpy(second + i, padded, (n - i) * sizeof(padded[0]));
}

template <DType kDType>
void Encode(const float* from, int64_t n, void* to, void* also, bool stream) {
  const int64_t bytes = n * sizeof(typename Format<kDType>::Element);
  if (stream && CanStream(to, bytes) && (also == nullptr || CanStream(also, bytes))) {
    return EncodeTo<kDType, true>(from, n, to, also);
  }
  EncodeTo<kDType, false>(from, n, to, also);
}

// Copies a row to one place, and to another unless that is null.
void Copy(const void* from, int64_t bytes, void* to, void* also, bool stream) {
  const auto* row = static_cast<const char*>(from);
  if (stream && CanStream(to, bytes) && (also == nullptr || CanStream(also, bytes))) {
    for (int64_t i = 0; i < bytes; i += sizeof(U32)) {
      const U32 v = LoadAs<U32>(row + i);
      StoreStreaming(static_cast<char*>(to) + i, v);
      if (also != nullptr) StoreStreaming(static_cast<char*>(also) + i, v);
    }
    return;
  }
  memcpy(to, from, bytes);
  if (also != nullptr) memcpy(also, from, bytes);
}

// ---- Norm

float SumSquares(const float* x, int64_t n) {
  F32 sums[2] = {};
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    const F32 a = Load(x + i), b = Load(x + i + kLanes);
    sums[0] += a * a;
    sums[1] += b * b;
  }
  float sum = Sum(sums[0] + sums[1]);
  for (; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

float InverseRms(float sum_squares, int64_t n, float epsilon) {
  return 1.0f / __builtin_sqrtf(sum_squares / static_cast<float>(n) + epsilon);
}

void Normalize(float inverse, const float* weight, int64_t n, float* x) {
  if (weight == nullptr) {
    for (int64_t i = 0; i < n; i += kLanes) Store(x + i, Load(x + i) * inverse);
  } else {
    for (int64_t i = 0; i < n; i += kLanes) Store(x + i, Load(x + i) * inverse * Load(weight + i));
  }
}

// ---- Rotation

// Factors of the rotary dims of a token: y[i] = x[i] * cos[i] + x[partner of i] * sin[i].
struct Angles {
  Head cos;
  Head sin;
};

int64_t TableRow(const FusedQkvRopeCacheParams& p, int64_t batch_index, int64_t token,
                 int64_t axis) {
  uint32_t position = p.positions.At(p.batch, batch_index)[axis * p.num_tokens + token];
  // Sums wrap around as they do in XLA.
  if (p.offsets.data != nullptr) position += p.offsets.At(p.batch, batch_index)[token];
  const int64_t row = static_cast<int32_t>(position);
  return row < 0 ? 0 : row >= p.max_positions ? p.max_positions - 1 : row;
}

// Reads the rows of a table that turn a token, one for each pair or each dim.
void LoadTableRow(const FusedQkvRopeCacheParams& p, const FloatOperand& table, const QkvItem& item,
                  const int64_t* rows, float* to) {
  const int64_t first = table.batch.Offset(p.batch, item.batch_index), width = p.table_width;
  DecodeFloats(table.data, table.dtype, first + rows[0] * width, width, to);
  if (!p.has_mrope) return;
  const int64_t pairs = p.rotary_dim / 2;
  for (int axis = 1; axis < 3; ++axis) {
    Head other;
    DecodeFloats(table.data, table.dtype, first + rows[axis] * width, width, other.values);
    for (int64_t i = 0; i < width; ++i) {
      const int64_t pair = !p.full_width_table ? i : p.interleaved ? i / 2 : i % pairs;
      if (item.mrope_axes[pair] == axis) to[i] = other.values[i];
    }
  }
}

void LoadAngles(const FusedQkvRopeCacheParams& p, const QkvItem& item, int64_t token,
                Angles& angles) {
  int64_t rows[3] = {};
  for (int axis = 0; axis < (p.has_mrope ? 3 : 1); ++axis) {
    rows[axis] = TableRow(p, item.batch_index, token, axis);
  }
  float* const cos = angles.cos.values;
  float* const sin = angles.sin.values;
  LoadTableRow(p, p.cos, item, rows, cos);
  LoadTableRow(p, p.sin, item, rows, sin);
  const int64_t pairs = p.rotary_dim / 2;
  if (p.interleaved) {
    for (int64_t i = pairs; i-- > 0;) {
      const int64_t first = p.full_width_table ? 2 * i : i;
      const int64_t second = p.full_width_table ? 2 * i + 1 : i;
      const float cos_first = cos[first], cos_second = cos[second];
      const float sin_first = sin[first], sin_second = sin[second];
      cos[2 * i] = cos_first;
      cos[2 * i + 1] = cos_second;
      sin[2 * i] = -sin_first;
      sin[2 * i + 1] = sin_second;
    }
  } else {
    for (int64_t i = 0; i < pairs; ++i) {
      if (!p.full_width_table) {
        cos[pairs + i] = cos[i];
        sin[pairs + i] = sin[i];
      }
      sin[i] = -sin[i];
    }
  }
}

F32 Neighbours(F32 v) { return Partners<1>(v, std::make_integer_sequence<int, kLanes>()); }

// Rotates the `n` dims at x into y. The last vector may overlap the one before it.
void RotateNeighbours(const float* x, const Angles& angles, int64_t n, float* y) {
  const float *cos = angles.cos.values, *sin = angles.sin.values;
  if (n < kLanes) {
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * cos[i] + x[i ^ 1] * sin[i];
    return;
  }
  for (int64_t next = 0; next < n; next += kLanes) {
    const int64_t i = next + kLanes <= n ? next : n - kLanes;
    const F32 v = Load(x + i);
    Store(y + i, v * Load(cos + i) + Neighbours(v) * Load(sin + i));
  }
}

void RotateHalves(const float* x, const Angles& angles, int64_t n, float* y) {
  const int64_t half = n / 2;
  const float *cos = angles.cos.values, *sin = angles.sin.values;
  if (half < kLanes) {
    for (int64_t i = 0; i < half; ++i) {
      y[i] = x[i] * cos[i] + x[i + half] * sin[i];
      y[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half];
    }
    return;
  }
  for (int64_t next = 0; next < half; next += kLanes) {
    const int64_t i = next + kLanes <= half ? next : half - kLanes, j = i + half;
    const F32 first = Load(x + i), second = Load(x + j);
    Store(y + i, first * Load(cos + i) + second * Load(sin + i));
    Store(y + j, second * Load(cos + j) + first * Load(sin + j));
  }
}

// Rotates the rotary dims of a head from x to y; the others are moved.
void Rotate(const FusedQkvRopeCacheParams& p, const Angles& angles, const float* x, float* y) {
  const int64_t start = p.nope_first ? p.head_dim - p.rotary_dim : 0;
  if (p.rotary_dim != p.head_dim) memcpy(y, x, p.head_dim * sizeof(float));
  if (p.interleaved) {
    RotateNeighbours(x + start, angles, p.rotary_dim, y + start);
  } else {
    RotateHalves(x + start, angles, p.rotary_dim, y + start);
  }
}

// ---- Storing a row in the cache

// Quantises a row that is rounded already.
template <DType kDType>
void Quantize(float* row, int64_t n, const float* scale, float* dynamic_scale, void* to,
              bool stream) {
  if constexpr (sizeof(typename Format<kDType>::Element) == 1) {
    if (dynamic_scale != nullptr) {
      for (int64_t i = n; i < (n + kPair - 1) / kPair * kPair; ++i) row[i] = 0.0f;
      F32 top = {};
      for (int64_t i = 0; i < n; i += kLanes) top = Max(top, Magnitude(Load(row + i)));
      const float found = MaxLane(top) / Format<kDType>::kLargest;
      *dynamic_scale = found < 1.17549435e-38f ? 1.0f : found;  // rows of (nearly) zeros
      scale = dynamic_scale;
    }
  }
  if (scale != nullptr && *scale != 1.0f) {
    const F32 divisor = Broadcast(*scale);
    for (int64_t i = 0; i < n; i += kLanes) Store(row + i, Load(row + i) / divisor);
  }
  Encode<kDType>(row, n, to, nullptr, stream);
}

void Quantize(DType dtype, float* row, int64_t n, const float* scale, float* dynamic_scale,
              void* to, bool stream) {
  switch (dtype) {
    case DType::kFloat32:
      return Quantize<DType::kFloat32>(row, n, scale, dynamic_scale, to, stream);
    case DType::kBFloat16:
      return Quantize<DType::kBFloat16>(row, n, scale, dynamic_scale, to, stream);
    case DType::kFloat16:
      return Quantize<DType::kFloat16>(row, n, scale, dynamic_scale, to, stream);
    case DType::kInt8:
      return Quantize<DType::kInt8>(row, n, scale, dynamic_scale, to, stream);
    case DType::kFloat8E4M3FN:
      return Quantize<DType::kFloat8E4M3FN>(row, n, scale, dynamic_scale, to, stream);
    case DType::kFloat8E4M3FNUZ:
      return Quantize<DType::kFloat8E4M3FNUZ>(row, n, scale, dynamic_scale, to, stream);
    case DType::kFloat8E5M2:
      return Quantize<DType::kFloat8E5M2>(row, n, scale, dynamic_scale, to, stream);
  }
}

// Where a row of a token goes in the cache.
struct Place {
  char* row = nullptr;  // null: nowhere
  const float* scale = nullptr;
  float* dynamic_scale = nullptr;
};

// ---- The pass

// Keys, values or queries of a call.
struct Part {
  const FloatOperand* weight = nullptr;  // null: no weight
  bool normalized = false;
  bool rotated = false;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  int64_t first_column = 0;
  int64_t column_stride = 0;  // between heads
  char* out = nullptr;        // [tokens, num_heads, head_dim] of the batch index
  const PagesOperand* pages = nullptr;
  const ScaleOperand* scale = nullptr;
  const DynamicScales* dynamic = nullptr;

  bool is_copy() const { return !normalized && !rotated; }
};

template <DType kDType>
class Pass {
 public:
  Pass(const FusedQkvRopeCacheParams& p, const QkvItem& item) : p_(p), item_(item) {
    const bool norm = p.norm_scope != NormScope::kNone, rope = p.rotary_dim != 0;
    const int64_t tokens = item.batch_index * p.num_tokens;
    const auto rows = [&](void* data, int64_t heads, int64_t head_dim) {
      return static_cast<char*>(data) + tokens * heads * head_dim * kSize;
    };
    qkv_ = static_cast<const char*>(p.qkv) + p.qkv_batch.Offset(p.batch, item.batch_index) * kSize;
    Part& query = parts_[0];
    query.weight = &p.q_weight;
    query.normalized = norm;
    query.rotated = rope;
    query.num_heads = p.num_q_heads;
    query.head_dim = p.head_dim;
    query.column_stride = p.head_dim * (p.gate == GateLayout::kInterleaved ? 2 : 1);
    query.out = rows(p.query, p.num_q_heads, p.head_dim);
    Part& key = parts_[1];
    key.weight = &p.k_weight;
    key.normalized = norm;
    key.rotated = rope;
    key.num_heads = p.num_kv_heads;
    key.head_dim = key.column_stride = p.head_dim;
    key.first_column = p.query_columns();
    key.out = rows(p.key, p.num_kv_heads, p.head_dim);
    key.pages = &p.k_pages;
    key.scale = &p.k_scale;
    key.dynamic = &p.k_scales_out;
    Part& value = parts_[2];
    value.normalized = norm && p.normalize_v;
    value.num_heads = p.num_kv_heads;
    value.head_dim = value.column_stride = p.v_head_dim;
    value.first_column = key.first_column + p.num_kv_heads * p.head_dim;
    value.out = rows(p.value, p.num_kv_heads, p.v_head_dim);
    value.pages = &p.v_pages;
    value.scale = &p.v_scale;
    value.dynamic = &p.v_scales_out;
    if (p.gate_out != nullptr) gate_out_ = rows(p.gate_out, p.num_q_heads, p.head_dim);
    layer_ = p.layer.data == nullptr ? 0 : *p.layer.At(p.batch, item.batch_index);
    if (p.norm_scope == NormScope::kHead) {
      for (int i = 0; i < 2; ++i) LoadWeight(parts_[i], 0, weights_[i].values);
    }
  }

  void Run() {
    const int64_t num_units = p_.num_units();
    for (int64_t unit = item_.unit_begin; unit < item_.unit_end;) {
      const int64_t token = unit / num_units, begin = unit % num_units;
      const int64_t left = begin + item_.unit_end - unit;
      const int64_t end = left < num_units ? left : num_units;
      RunToken(token, begin, end);
      unit += end - begin;
    }
    if (item_.stream) FinishStreaming();
  }

 private:
  static constexpr int64_t kSize = SizeOf(kDType);

  // Weight of the dims of a head, offset included.
  void LoadWeight(const Part& part, int64_t head, float* to) {
    if (part.weight == nullptr || part.weight->data == nullptr) return;
    const FloatOperand& weight = *part.weight;
    const int64_t first = weight.batch.Offset(p_.batch, item_.batch_index) + head * part.head_dim;
    DecodeFloats(weight.data, weight.dtype, first, part.head_dim, to);
    for (int64_t i = 0; i < part.head_dim; ++i) to[i] += p_.weight_offset;
  }

  void RunToken(int64_t token, int64_t begin, int64_t end) {
    const char* row = qkv_ + token * p_.columns() * kSize;
    if (p_.rotary_dim != 0 && begin < p_.num_q_heads + p_.num_kv_heads) {
      LoadAngles(p_, item_, token, angles_);
    }
    int64_t first = 0;
    for (int i = 0; i < 3; ++i) {
      const Part& part = parts_[i];
      const int64_t head_begin = begin > first ? begin - first : 0;
      const int64_t head_end = end - first < part.num_heads ? end - first : part.num_heads;
      if (head_begin < head_end) {
        float inverse = 0;
        if (part.normalized && p_.norm_scope == NormScope::kAllHeads) {
          inverse = InverseOfAllHeads(part, row);
        }
        for (int64_t head = head_begin; head < head_end; ++head) {
          RunHead(part, weights_[i].values, inverse, row, token, head);
        }
      }
      first += part.num_heads;
    }
    if (gate_out_ != nullptr && begin < p_.num_q_heads) CopyGates(row, token, begin, end);
  }

  const char* HeadOf(const Part& part, const char* row, int64_t head) const {
    return row + (part.first_column + head * part.column_stride) * kSize;
  }

  float InverseOfAllHeads(const Part& part, const char* row) {
    float sum = 0;
    for (int64_t head = 0; head < part.num_heads; ++head) {
      Decode<kDType>(HeadOf(part, row, head), part.head_dim, x_.values);
      sum += SumSquares(x_.values, part.head_dim);
    }
    return InverseRms(sum, part.num_heads * part.head_dim, p_.epsilon);
  }

  void RunHead(const Part& part, float* weight, float inverse, const char* row, int64_t token,
               int64_t head) {
    const char* from = HeadOf(part, row, head);
    const int64_t n = part.head_dim;
    char* const out = part.out + (token * part.num_heads + head) * n * kSize;
    const Place place = PlaceOf(part, token, head);
    const bool cached_as_is = place.row != nullptr && part.pages->dtype == kDType &&
                              (place.scale == nullptr || *place.scale == 1.0f);
    void* const also = cached_as_is ? place.row : nullptr;
    if (part.is_copy()) {
      Copy(from, n * kSize, out, also, item_.stream);
    } else {
      Decode<kDType>(from, n, x_.values);
      if (part.normalized) {
        if (p_.norm_scope == NormScope::kHead) {
          inverse = InverseRms(SumSquares(x_.values, n), n, p_.epsilon);
        } else {
          LoadWeight(part, head, weight);
        }
        const bool weighted = part.weight != nullptr && part.weight->data != nullptr;
        Normalize(inverse, weighted ? weight : nullptr, n, x_.values);
      }
      if (part.rotated) Rotate(p_, angles_, x_.values, y_.values);
      Encode<kDType>(part.rotated ? y_.values : x_.values, n, out, also, item_.stream);
    }
    if (place.row == nullptr || cached_as_is) return;
    // The cache holds what is returned: the rounded row.
    if (part.is_copy()) {
      Decode<kDType>(from, n, x_.values);
    } else {
      const float* exact = part.rotated ? y_.values : x_.values;
      EncodeTo<kDType, false>(exact, n, rounded_, nullptr);
      Decode<kDType>(rounded_, n, x_.values);
    }
    Quantize(part.pages->dtype, x_.values, n, place.scale, place.dynamic_scale, place.row,
             item_.stream);
  }

  Place PlaceOf(const Part& part, int64_t token, int64_t head) const {
    Place place;
    if (part.pages == nullptr) return place;
    const int64_t slot = item_.slots[token];
    if (slot == kNoSlot) return place;
    const PagesOperand& pages = *part.pages;
    const int64_t page = slot / p_.page_size, offset = slot % p_.page_size;
    const int64_t row = layer_ * pages.layer_stride + page * pages.page_stride +
                        offset * pages.token_stride + head * pages.head_stride;
    place.row = static_cast<char*>(pages.data) +
                (item_.batch_index * pages.batch_stride + row) * SizeOf(pages.dtype);
    if (part.dynamic->data != nullptr) {
      place.dynamic_scale =
          part.dynamic->data + item_.batch_index * part.dynamic->batch_stride + row / part.head_dim;
    } else if (part.scale->data != nullptr) {
      const ScaleOperand& scale = *part.scale;
      place.scale = scale.data + scale.batch.Offset(p_.batch, item_.batch_index) +
                    layer_ * scale.layer_stride + page * scale.page_stride +
                    offset * scale.token_stride + head * scale.head_stride;
    }
    return place;
  }

  void CopyGates(const char* row, int64_t token, int64_t begin, int64_t end) const {
    const int64_t n = p_.head_dim, heads = p_.num_q_heads;
    const bool interleaved = p_.gate == GateLayout::kInterleaved;
    for (int64_t head = begin; head < end && head < heads; ++head) {
      const int64_t column = interleaved ? (2 * head + 1) * n : (heads + head) * n;
      Copy(row + column * kSize, n * kSize, gate_out_ + (token * heads + head) * n * kSize, nullptr,
           item_.stream);
    }
  }

  const FusedQkvRopeCacheParams& p_;
  const QkvItem& item_;
  const char* qkv_ = nullptr;
  char* gate_out_ = nullptr;
  int64_t layer_ = 0;
  Part parts_[3];  // query, key, value
  Head weights_[2 + 1] = {};
  Head x_ = {};
  Head y_ = {};
  Angles angles_ = {};
  typename Format<kDType>::Element rounded_[kMaxFusedHeadDim + kPair];
};

void FusedQkvKernel(const FusedQkvRopeCacheParams& p, const QkvItem& item) {
  switch (p.dtype) {
    case DType::kFloat32:
      return Pass<DType::kFloat32>(p, item).Run();
    case DType::kBFloat16:
      return Pass<DType::kBFloat16>(p, item).Run();
    default:
      return Pass<DType::kFloat16>(p, item).Run();
  }
}

}  // namespace

// Not inline, and declared again where the sets are chosen among: see fused_qkv_rope_cache.cc.
extern const FusedQkvKernels kFusedQkvKernels;
#define JAX_ATTN_STRING(x) #x
#define JAX_ATTN_NAME(x) JAX_ATTN_STRING(x)
const FusedQkvKernels kFusedQkvKernels = {JAX_ATTN_NAME(JAX_ATTN_TARGET), FusedQkvKernel};

}  // namespace jax_attn::cpu::JAX_ATTN_TARGET
