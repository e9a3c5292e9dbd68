// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "fused_qkv_kernel.h"

#include "qkv_blocks.h"
#include "qkv_bytes.h"
#include "qkv_norm.h"
#include "qkv_rotation.h"
#include "qkv_rows.h"
#include "qkv_whole_heads.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {
namespace {

// Queries, gates, keys or values of a call.
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
  RotarySpan span;            // empty: not rotated
  bool whole_blocks = false;  // computed block by block
  bool whole_heads = false;   // and rotated by halves from end to end
  Head weights;               // of a head, offset included

  bool weighted() const { return weight != nullptr && weight->data != nullptr; }
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
    if (p.gate != GateLayout::kNone) {
      Part& gate = parts_[1];
      gate.num_heads = p.num_q_heads;
      gate.head_dim = p.head_dim;
      gate.column_stride = query.column_stride;
      gate.first_column = p.head_dim * (p.gate == GateLayout::kInterleaved ? 1 : p.num_q_heads);
      gate.out = rows(p.gate_out, p.num_q_heads, p.head_dim);
    }
    Part& key = parts_[2];
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
    Part& value = parts_[3];
    value.normalized = norm && p.normalize_v;
    value.num_heads = p.num_kv_heads;
    value.head_dim = value.column_stride = p.v_head_dim;
    value.first_column = key.first_column + p.num_kv_heads * p.head_dim;
    value.out = rows(p.value, p.num_kv_heads, p.v_head_dim);
    value.pages = &p.v_pages;
    value.scale = &p.v_scale;
    value.dynamic = &p.v_scales_out;
    layer_ = p.layer.data == nullptr ? 0 : *p.layer.At(p.batch, item.batch_index);
    for (Part& part : parts_) Prepare(part);
  }

  void Run() {
    const int64_t num_units = p_.num_units();
    int64_t token = item_.unit_begin / num_units, begin = item_.unit_begin % num_units;
    for (int64_t left = item_.unit_end - item_.unit_begin; left > 0; ++token, begin = 0) {
      const int64_t end = begin + left < num_units ? begin + left : num_units;
      RunToken(token, begin, end);
      left -= end - begin;
    }
    if (item_.stream) FenceStores();
  }

 private:
  using Element = typename Format<kDType>::Element;
  static constexpr int64_t kSize = SizeOf(kDType);

  // Finds out how the heads of a part are computed, and what is the same for all tokens.
  void Prepare(Part& part) {
    if (part.is_copy()) return;
    if (part.rotated) {
      part.span.begin = p_.nope_first ? p_.head_dim - p_.rotary_dim : 0;
      part.span.size = p_.rotary_dim;
      part.span.neighbours = p_.interleaved;
    }
    const bool weight_of_each_head = part.weighted() && p_.norm_scope == NormScope::kAllHeads;
    part.whole_blocks =
        part.head_dim % kPair == 0 && part.span.IsWholeBlocks() && !weight_of_each_head;
    part.whole_heads =
        part.whole_blocks && part.span.size == part.head_dim && !part.span.neighbours;
    if (weight_of_each_head) return;
    for (int64_t i = 0; i < part.head_dim; ++i) part.weights.values[i] = 1.0f;
    if (part.weighted()) LoadWeight(part, 0);
    if (part.whole_blocks) {
      Arrange<kDType>(part.weights.values, part.head_dim, FactorsOf(part).own.values);
      ArrangeWeights<kDType>(part.weights.values, part.span, WeightsOf(part));
    }
  }

  // Weights of a head, offset included.
  void LoadWeight(Part& part, int64_t head) {
    const FloatOperand& weight = *part.weight;
    const int64_t first = weight.batch.Offset(p_.batch, item_.batch_index) + head * part.head_dim;
    DecodeFloats(weight.data, weight.dtype, first, part.head_dim, part.weights.values);
    for (int64_t i = 0; i < part.head_dim; ++i) part.weights.values[i] += p_.weight_offset;
  }

  Factors& FactorsOf(const Part& part) { return factors_[&part - parts_]; }
  Factors& WeightsOf(const Part& part) { return weights_[&part - parts_]; }

  void RunToken(int64_t token, int64_t begin, int64_t end) {
    const char* row = qkv_ + token * p_.columns() * kSize;
    if (p_.rotary_dim != 0 && begin < p_.num_q_heads + p_.num_kv_heads) {
      LoadAngles(p_, item_, token, angles_);
      if (parts_[0].whole_blocks || parts_[2].whole_blocks) {
        ArrangeAngles<kDType>(angles_, p_.rotary_dim, turns_);
      }
    }
    int64_t first = 0;
    for (Part& part : parts_) {
      const int64_t head_begin = begin > first ? begin - first : 0;
      const int64_t head_end = end - first < part.num_heads ? end - first : part.num_heads;
      if (head_begin < head_end) RunPart(part, row, token, head_begin, head_end);
      // A query and its gate are one unit.
      if (&part != &parts_[0]) first += part.num_heads;
      if (&part == &parts_[0] && parts_[1].num_heads == 0) first += part.num_heads;
    }
  }

  void RunPart(Part& part, const char* row, int64_t token, int64_t begin, int64_t end) {
    if (part.is_copy() && RunAsOneRow(part, row, token, begin, end)) return;
    if (part.rotated && part.whole_blocks) {
      WeighTurns(turns_, WeightsOf(part), part.span, FactorsOf(part));
    }
    switch (part.whole_heads ? part.head_dim / kPair : 0) {
      case 2:
        return RunWholeHeads<2>(part, row, token, begin, end);
      case 4:
        return RunWholeHeads<4>(part, row, token, begin, end);
      case 8:
        return RunWholeHeads<8>(part, row, token, begin, end);
      default:
        return RunInGroups(
            part, row, begin, end,
            [&](int64_t first, int64_t last, float* sums) {
              for (int64_t head = first; head < last; ++head) *sums++ = SumSquares(part, row, head);
            },
            [&](int64_t first, int64_t last, const float* inverses) {
              RunHeads(part, row, token, first, last, inverses);
            });
    }
  }

  // Copies heads that are side by side wherever they are and go, or stores them in another type;
  // false if they are not.
  bool RunAsOneRow(const Part& part, const char* row, int64_t token, int64_t begin, int64_t end) {
    const int64_t head_size = part.head_dim * kSize, size = (end - begin) * head_size;
    Place place = PlaceOf(part, token, begin);
    const bool quantize = place.row != nullptr && !place.same_type;
    if (part.column_stride != part.head_dim || (place.same_type && place.row_stride != head_size)) {
      return false;
    }
    const char* const from = HeadOf(part, row, begin);
    PrefetchRow(from + p_.columns() * kSize, size);
    Copy(from, size, part.out + (token * part.num_heads + begin) * head_size,
         quantize ? nullptr : place.row, item_.stream);
    if (quantize) QuantizeRows(part, from, head_size, end - begin, place);
    return true;
  }

  // Runs a few heads at a time: `squares` sums those of their elements, and `run` gets the factors
  // of their norms. These are found for the next few heads before the ones at hand are computed, so
  // that the square roots are ready by the time that they are needed.
  template <typename Squares, typename Run>
  void RunInGroups(const Part& part, const char* row, int64_t begin, int64_t end, Squares squares,
                   Run run) {
    const bool over_all = part.normalized && p_.norm_scope == NormScope::kAllHeads;
    float of_all_heads = 0;
    for (int64_t head = 0; head < part.num_heads && over_all; ++head) {
      of_all_heads += SumSquares(part, row, head);
    }
    float inverses[2][kHeadsAtOnce];
    const auto end_of_group = [end](int64_t first) {
      return first + kHeadsAtOnce < end ? first + kHeadsAtOnce : end;
    };
    const auto find = [&](int64_t first, float* found) {
      for (int64_t i = 0; i < kHeadsAtOnce; ++i) found[i] = over_all ? of_all_heads : 1.0f;
      if (!part.normalized) return;
      if (!over_all) squares(first, end_of_group(first), found);
      InverseRms(part.head_dim * (over_all ? part.num_heads : 1), p_.epsilon, found);
    };
    find(begin, inverses[0]);
    for (int64_t first = begin, now = 0; first < end; first += kHeadsAtOnce, now ^= 1) {
      const int64_t last = end_of_group(first);
      if (last < end) find(last, inverses[now ^ 1]);
      run(first, last, inverses[now]);
    }
  }

  const char* HeadOf(const Part& part, const char* row, int64_t head) const {
    return row + (part.first_column + head * part.column_stride) * kSize;
  }

  float SumSquares(const Part& part, const char* row, int64_t head) {
    const char* from = HeadOf(part, row, head);
    if (part.head_dim % kPair == 0) {
      return SumSquaresOfRow<kDType>(reinterpret_cast<const Element*>(from), part.head_dim);
    }
    Decode<kDType>(from, part.head_dim, x_.values);
    return SumSquaresOf(x_.values, part.head_dim);
  }

  // Runs a few heads of a token; `inverses` are the factors of their norm.
  void RunHeads(Part& part, const char* row, int64_t token, int64_t first, int64_t last,
                const float* inverses) {
    const int64_t n = part.head_dim, size = n * kSize;
    const int64_t from_stride = part.column_stride * kSize, token_stride = p_.columns() * kSize;
    const bool copy = part.is_copy(), whole_blocks = part.whole_blocks;
    const RotarySpan span = part.span;
    const Factors& factors = FactorsOf(part);
    const char* from = HeadOf(part, row, first);
    char* out = part.out + (token * part.num_heads + first) * size;
    const bool stream = item_.stream && CanStream(out, size);
    Place place = PlaceOf(part, token, first);
    for (int64_t head = first; head < last; ++head) {
      PrefetchRow(from + token_stride, size);
      const char* result = from;
      if (!copy) {
        // Streaming stores must fill whole lines one after the other, which blocks do not.
        Element* const to = stream ? rounded_ : reinterpret_cast<Element*>(out);
        if (!whole_blocks || !ComputeBlocks<kDType>(reinterpret_cast<const Element*>(from), n,
                                                    inverses[head - first], factors, span, to)) {
          ComputeHead(part, inverses[head - first], from, head, to);
        }
        result = reinterpret_cast<const char*>(to);
      }
      // The cache holds what is returned: the rounded row.
      char* const as_it_is = place.same_type ? place.row : nullptr;
      if (result != out) {
        Copy(result, size, out, as_it_is, stream);
      } else if (as_it_is != nullptr) {
        memcpy(as_it_is, result, size);
      }
      if (place.row != nullptr && as_it_is == nullptr) {
        QuantizeRows(part, result, size, 1, place);
      } else {
        place.Next();
      }
      from += from_stride;
      out += size;
    }
  }

  // Runs heads of a token that are rotated whole.
  template <int kBlocks>
  void RunWholeHeads(Part& part, const char* row, int64_t token, int64_t begin, int64_t end) {
    constexpr int64_t kBytes = WholeHead<kDType, kBlocks>::kBytes;
    const Factors& factors = FactorsOf(part);
    HeadRows rows;
    rows.count = end - begin;
    rows.from = HeadOf(part, row, begin);
    rows.from_stride = part.column_stride * kSize;
    rows.next_token = p_.columns() * kSize;
    rows.to = part.out + (token * part.num_heads + begin) * kBytes;
    rows.stream = item_.stream && CanStream(rows.to, kBytes);
    Place place = PlaceOf(part, token, begin);
    if (place.same_type) {
      rows.stored = place.row;
      rows.stored_stride = place.row_stride;
      rows.stream_stored =
          item_.stream && CanStream(place.row, kBytes) && place.row_stride % 64 == 0;
    }
    const bool quantize = place.row != nullptr && !place.same_type;
    if (!part.normalized && !quantize) {
      const float one = 1.0f;
      return ComputeHeads<kDType, kBlocks>(rows, rows.count, &one, 0, factors);
    }
    // Rows to be quantised wait for it in L1, a few at a time.
    char* const waiting = reinterpret_cast<char*>(rounded_);
    if (quantize) rows.stored_stride = kBytes;
    int64_t left = rows.count;
    while (left > 0 && p_.norm_scope == NormScope::kHead) {
      rows.count = quantize && left > kHeadsAtOnce ? kHeadsAtOnce : left;
      if (quantize) rows.stored = waiting;
      const int64_t done = NormalizeHeads<kDType, kBlocks>(rows, p_.epsilon, factors);
      if (quantize) QuantizeRows(part, waiting, kBytes, done, place);
      rows.Skip(done, kBytes);
      left -= done;
      if (rows.count != 0) break;
    }
    rows.count = left;
    if (rows.count == 0) return;
    const auto squares = [&](int64_t first, int64_t last, float* sums) {
      SumSquaresOfHeads<kDType, kBlocks>(HeadOf(part, row, first), rows.from_stride, last - first,
                                         sums);
    };
    const auto run = [&](int64_t first, int64_t last, const float* inverses) {
      if (quantize) rows.stored = waiting;
      ComputeHeads<kDType, kBlocks>(rows, last - first, inverses, 1, factors);
      if (quantize) QuantizeRows(part, waiting, kBytes, last - first, place);
      rows.Skip(last - first, kBytes);
    };
    RunInGroups(part, row, end - rows.count, end, squares, run);
  }

  // Stores `count` heads that are `stride` bytes apart in the cache, which has another type.
  void QuantizeRows(const Part& part, const char* from, int64_t stride, int64_t count,
                    Place& place) {
    while (count > 0) {
      if constexpr (kDType == DType::kBFloat16) {
        const int64_t done = QuantizeHeads(from, stride, count, part.head_dim, part.pages->dtype,
                                           item_.stream, place);
        from += done * stride;
        count -= done;
        if (count == 0) return;
      }
      Quantize<kDType>(from, part.head_dim, part.pages->dtype, place, item_.stream);
      place.Next();
      from += stride;
      --count;
    }
  }

  // Computes a head of any size by way of float rows.
  void ComputeHead(Part& part, float inverse, const char* from, int64_t head, Element* to) {
    const int64_t n = part.head_dim;
    Decode<kDType>(from, n, x_.values);
    if (part.normalized) {
      if (part.weighted() && p_.norm_scope == NormScope::kAllHeads) LoadWeight(part, head);
      Normalize(inverse, part.weighted() ? part.weights.values : nullptr, n, x_.values);
    }
    if (part.rotated) Rotate(p_, angles_, x_.values, y_.values);
    Encode<kDType>(part.rotated ? y_.values : x_.values, n, to);
  }

  // Where the row of a head goes in the cache; the rows of later heads follow by Next().
  Place PlaceOf(const Part& part, int64_t token, int64_t head) const {
    Place place;
    if (part.pages == nullptr) return place;
    const int64_t slot = item_.slots[token];
    if (slot == kNoSlot) return place;
    const PagesOperand& pages = *part.pages;
    const int64_t page = slot / p_.page_size, offset = slot % p_.page_size;
    const int64_t row = layer_ * pages.layer_stride + page * pages.page_stride +
                        offset * pages.token_stride + head * pages.head_stride;
    const int64_t size = SizeOf(pages.dtype);
    place.row =
        static_cast<char*>(pages.data) + (item_.batch_index * pages.batch_stride + row) * size;
    place.row_stride = pages.head_stride * size;
    if (part.dynamic->data != nullptr) {
      place.dynamic_scale =
          part.dynamic->data + item_.batch_index * part.dynamic->batch_stride + row / part.head_dim;
      place.scale_stride = pages.head_stride / part.head_dim;
    } else if (part.scale->data != nullptr) {
      const ScaleOperand& scale = *part.scale;
      place.scale = scale.data + scale.batch.Offset(p_.batch, item_.batch_index) +
                    layer_ * scale.layer_stride + page * scale.page_stride +
                    offset * scale.token_stride + head * scale.head_stride;
      place.scale_stride = scale.head_stride;
    }
    place.same_type = pages.dtype == kDType && place.scale == nullptr;
    return place;
  }

  const FusedQkvRopeCacheParams& p_;
  const QkvItem& item_;
  const char* qkv_ = nullptr;
  int64_t layer_ = 0;
  Part parts_[4];  // query, gate, key, value
  Factors factors_[4];
  Factors weights_[4];  // of the rotary dims: of each element, and of its partner; arranged
  Angles angles_;
  Factors turns_;  // the angles, arranged
  Head x_;
  Head y_;
  // A head of any size, or a few that are rotated whole.
  alignas(64) Element rounded_[kHeadsAtOnce * 8 * kPair + kMaxFusedHeadDim];
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
