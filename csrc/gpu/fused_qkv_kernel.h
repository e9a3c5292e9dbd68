// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The fused QKV pass: one launch. A wave computes heads of one kind of one token; a few lanes have
// a head, 16 elements each, so that a rotation needs no other lane and factors stay in registers.

#ifndef JAX_ATTN_CSRC_GPU_FUSED_QKV_KERNEL_H_
#define JAX_ATTN_CSRC_GPU_FUSED_QKV_KERNEL_H_

#include <cstdint>

#include "fused_qkv_factors.h"
#include "fused_qkv_few.h"
#include "fused_qkv_kernels.h"
#include "fused_qkv_plain.h"
#include "fused_qkv_rows.h"
#include "fused_qkv_slots.h"

namespace jax_attn::gpu {

template <DType kDType, QkvKernel kKernel>
class FusedQkvItem {
 public:
  static constexpr bool kBatched = kKernel == QkvKernel::kAnywhere;

  // `slot` of the token, kNoSlot if it is not stored.
  JAX_ATTN_DEVICE FusedQkvItem(const FusedQkvWork& w, QkvIndex<kBatched> b, int kind, int token)
      : w_(w),
        b_(b),
        part_(w.parts[kind]),
        kind_(kind),
        token_(token),
        at_(w, part_, Lane() & ((1 << part_.lane_bits) - 1)) {
    row_ = static_cast<const char*>(w.qkv) +
           (b.Offset(b.batch.qkv) + token * w.columns + part_.first_column) * kSize;
  }

  // Computes heads from `begin` up to `end`. `find_slot` says where the token is stored.
  template <typename FindSlot>
  JAX_ATTN_DEVICE void Run(int begin, int end, FindSlot find_slot) {
    const int rows = kWave >> part_.lane_bits;
    int head = begin + (Lane() >> part_.lane_bits);
    Piece<kDType> pieces[2];
    Load(head, head < end, pieces);
    const bool computed = part_.normalized || part_.rotated;
    const bool stores = kind_ == kKeys || kind_ == kValues;
    Factors factors;
    float inverse = 1.0f;
    CachePlace place;
    if (computed)
      LoadFactors<kKernel>(FreshParameter(w_), part_, b_, WeightStrides(), token_, at_, factors);
    if (part_.over_all_heads) inverse = InverseOverAllHeads(rows);
    if (stores) place = PlaceOf(find_slot());
    char* const out = Again().Out();
    for (int first = begin; first < end; first += rows, head += rows) {
      const bool wanted = head < end;
      Same of_head = Again();
      const QkvPart& part = of_head.part_;
      // The next heads are read while these are computed.
      Piece<kDType> next[2];
      if (first + rows < end) of_head.Load(head + rows, head + rows < end, next);
      if (part.normalized || part.rotated) {
        of_head.Compute(wanted ? head : begin, factors, inverse, pieces);
      }
      if (wanted) of_head.StoreOwn(pieces, out + head * part.head_dim * kSize);
      if (place.data != nullptr && of_head.w_.converts) {
        ConvertRow<kDType>(place, of_head.w_.stored_dtype, head, part.lane_bits, of_head.at_,
                           pieces, wanted);
      } else if (place.data != nullptr && wanted) {
        of_head.StoreOwn(pieces, place.data + head * place.head_stride);
      }
      pieces[0] = next[0];
      pieces[1] = next[1];
    }
  }

 private:
  JAX_ATTN_DEVICE FusedQkvItem(const FusedQkvItem& item, const FusedQkvWork& w,
                               const QkvBatch& batch)
      : w_(w),
        b_{batch, item.b_.index},
        part_(w.parts[Fresh(item.kind_)]),
        kind_(item.kind_),
        token_(item.token_),
        at_(item.at_.template Again<kKernel == QkvKernel::kHalves>()),
        row_(item.row_) {}

  // The same, of which nothing was read or compared yet.
  using Same = std::conditional_t<kMovesAhead, FusedQkvItem, const FusedQkvItem&>;
  JAX_ATTN_DEVICE Same Again() const {
    if constexpr (kMovesAhead) {
      return FusedQkvItem(*this, FreshParameter(w_), FreshParameter<FusedQkvWork>(b_.batch));
    } else {
      return *this;
    }
  }

  static constexpr int kSize = static_cast<int>(SizeOf(kDType));
  static constexpr int kPieceBytes = kSize * kPieceSize;

  JAX_ATTN_DEVICE const BatchStrides& WeightStrides() const {
    return b_.batch.weights[kind_ == kKeys];
  }
  JAX_ATTN_DEVICE char* Out() const {
    const int64_t tokens = b_.Times(w_.num_tokens) + token_;
    return static_cast<char*>(part_.out) + tokens * part_.num_heads * part_.head_dim * kSize;
  }
  JAX_ATTN_DEVICE const char* HeadOf(int head) const {
    return row_ + head * part_.column_stride * kSize;
  }

  JAX_ATTN_DEVICE void Load(int head, bool wanted, Piece<kDType> (&pieces)[2]) const {
    pieces[0] = pieces[1] = {};
    const char* const from = HeadOf(head);
    if (wanted && at_.has_first) pieces[0].Load(from + at_.first * kPieceBytes);
    if (wanted && at_.has_second) pieces[1].Load(from + at_.second * kPieceBytes);
  }
  JAX_ATTN_DEVICE void StoreOwn(const Piece<kDType> (&pieces)[2], char* row) const {
    if (at_.has_first) pieces[0].Store(row + at_.first * kPieceBytes);
    if (at_.has_second) pieces[1].Store(row + at_.second * kPieceBytes);
  }

  JAX_ATTN_DEVICE static float SumSquares(const float (&x)[2][kPieceSize]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPieceSize; ++i) {
      sum = __builtin_fmaf(x[0][i], x[0][i], sum);
      sum = __builtin_fmaf(x[1][i], x[1][i], sum);
    }
    return sum;
  }

  // Every wave adds up all heads by itself: they are in a cache.
  JAX_ATTN_DEVICE float InverseOverAllHeads(int rows) const {
    float sum = 0;
    for (int head = Lane() >> part_.lane_bits; head < part_.num_heads; head += rows) {
      Piece<kDType> pieces[2];
      Load(head, true, pieces);
      float x[2][kPieceSize];
      pieces[0].Decode(x[0]);
      pieces[1].Decode(x[1]);
      sum += SumSquares(x);
    }
#pragma unroll
    for (int mask = 1; mask < kWave; mask *= 2) sum += ShuffleXor(sum, mask);
    return InverseSqrt(sum * part_.inverse_size + w_.epsilon);
  }

  // Norm and rotation of a head, in place.
  JAX_ATTN_DEVICE void Compute(int head, const Factors& factors, float inverse,
                               Piece<kDType> (&pieces)[2]) const {
    float x[2][kPieceSize], y[2][kPieceSize];
    const uint32_t rotated = FreshOfLane(factors.rotated);
    pieces[0].Decode(x[0]);
    pieces[1].Decode(x[1]);
    if (part_.normalized && !part_.over_all_heads) {
      float sum = SumSquares(x);
      for (int mask = 1; mask >> part_.lane_bits == 0; mask *= 2) sum += ShuffleXor(sum, mask);
      inverse = InverseSqrt(sum * part_.inverse_size + w_.epsilon);
    }
    if (part_.over_all_heads && part_.weight != nullptr) WeighOwn(head, x);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < kPieceSize; ++i) {
        y[k][i] = x[k][i] * factors.own[k][i];
        if constexpr (kKernel == QkvKernel::kHalves) {
          // Only a rotated partner may be multiplied, even by 0: it may be infinite.
          if (at_.rotated) y[k][i] += x[1 - k][i] * factors.other[k][i];
        } else if ((rotated >> (k * kPieceSize + i) & 1u) != 0) {
          const float partner =
              kKernel == QkvKernel::kNeighbours ? x[k][i ^ 1] : Partner(head, k, i);
          y[k][i] += partner * factors.other[k][i];
        }
        y[k][i] *= inverse;
      }
      pieces[k].Encode(y[k]);
    }
  }

  // Weights that each head has for itself.
  JAX_ATTN_DEVICE void WeighOwn(int head, float (&x)[2][kPieceSize]) const {
    const int64_t first = int64_t{head} * part_.head_dim;
    const int pieces[] = {at_.first, at_.second};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float weights[kPieceSize];
      LoadWeights(w_, part_, b_, WeightStrides(), first + pieces[k] * kPieceSize, weights);
#pragma unroll
      for (int i = 0; i < kPieceSize; ++i) x[k][i] *= weights[i];
    }
  }

  // An element that another lane has.
  JAX_ATTN_DEVICE float Partner(int head, int k, int i) const {
    const RotaryDim dim(w_, part_, (k == 0 ? at_.first : at_.second) * kPieceSize + i);
    float x = LoadElement(HeadOf(head), kDType, dim.partner);
    if (part_.over_all_heads && part_.weight != nullptr) {
      const int64_t at = b_.Offset(WeightStrides()) + int64_t{head} * part_.head_dim + dim.partner;
      x *= w_.weight_offset + LoadElement(part_.weight, part_.weight_dtype, at);
    }
    return x;
  }

  JAX_ATTN_DEVICE CachePlace PlaceOf(int64_t slot) const {
    CachePlace place;
    const int64_t layer = w_.layer != nullptr ? *b_.At(w_.layer, b_.batch.layer) : 0;
    if (slot == kNoSlot || layer < 0 || layer >= w_.num_layers) return place;
    const int which = kind_ - kKeys;
    const QkvPages& pages = w_.pages[which];
    int64_t page = 0;
    if (w_.has_small_slots) {
      page = w_.pages_of_slots.Divide(static_cast<uint32_t>(slot));
    } else {
      page = slot / w_.page_size;
    }
    const int64_t offset = slot - page * w_.page_size;
    const int64_t row =
        layer * pages.layer_stride + page * pages.page_stride + offset * pages.token_stride;
    const int64_t size = SizeOf(w_.stored_dtype);
    place.data = pages.data + (b_.Times(b_.batch.pages[which]) + row) * size;
    place.head_stride = pages.head_stride * size;
    if (pages.dynamic_scale != nullptr) {
      place.dynamic_scale =
          pages.dynamic_scale + b_.Times(b_.batch.dynamic_scales[which]) + row / part_.head_dim;
      place.scale_stride = pages.head_stride / part_.head_dim;
    } else if (pages.scale != nullptr) {
      place.scale = b_.At(pages.scale, b_.batch.scales[which]) + layer * pages.scale_layer_stride +
                    page * pages.scale_page_stride + offset * pages.scale_token_stride;
      place.scale_stride = pages.scale_head_stride;
    }
    return place;
  }

  const FusedQkvWork& w_;
  const QkvIndex<kBatched> b_;
  const QkvPart& part_;
  const int kind_;
  const int token_;
  const LanePieces at_;
  const char* row_;  // columns of the kind
};

// The slots of a batch index.
template <bool kBatched>
JAX_ATTN_DEVICE QkvSlots SlotsOf(const FusedQkvWork& w, QkvIndex<kBatched> b) {
  const int64_t first = b.Offset(b.batch.slots);
  return QkvSlots(w.slots_32 == nullptr ? nullptr : w.slots_32 + first,
                  w.slots_64 == nullptr ? nullptr : w.slots_64 + first, w.capacity, w.num_tokens);
}

template <DType kDType, QkvKernel kKernel>
__global__ void __launch_bounds__(kMaxFusedQkvThreads)
    FusedQkvKernel(JAX_ATTN_PARAMETER FusedQkvWork w, JAX_ATTN_PARAMETER QkvBatch batch) {
  using Item = FusedQkvItem<kDType, kKernel>;
  JAX_ATTN_DYNAMIC_SHARED(shared);
  BlockSlots& block_slots = *reinterpret_cast<BlockSlots*>(shared);
  int block = static_cast<int>(blockIdx.x);
  int64_t index = 0;
  if constexpr (Item::kBatched) {
    index = block / w.blocks;
    block %= w.blocks;
  }
  const QkvIndex<Item::kBatched> b{batch, index};
  const int wave = WaveIndex(), waves = static_cast<int>(blockDim.x) / kWave;

  const bool stores = block < w.storing_blocks;
  const int first_token = block * w.block_tokens;
  // Items of this wave: keys and values of tokens in turn, or one of any kind.
  int i = wave, num_items = 0;
  if (stores) {
    const int left = w.num_tokens - first_token;
    const int count = left < w.block_tokens ? left : w.block_tokens;
    num_items = 2 * count;
    block_slots.Find(SlotsOf(w, b), first_token, count);
  } else {
    i += (block - w.storing_blocks) * waves;
    num_items = i + 1;
  }
  // What waits for the next item does so in registers of a lane.
  const int waiting_waves = FreshOfLane(waves), waiting_token = FreshOfLane(first_token);
  const int waiting_items = FreshOfLane(num_items);
  const int waiting_stores = FreshOfLane(static_cast<int>(stores));
  for (; i < Uniform(waiting_items); i += Uniform(waiting_waves)) {
    const FusedQkvWork& fresh_w = FreshParameter(w);
    const QkvIndex<Item::kBatched> fresh_b{FreshParameter<FusedQkvWork>(batch), index};
    int kind = kKeys + (i & 1), token = Uniform(waiting_token) + (i >> 1), begin = 0;
    if (Uniform(waiting_stores) == 0) {
      token = static_cast<int>(fresh_w.tokens_of_items.Divide(static_cast<uint32_t>(i)));
      if (token >= fresh_w.num_tokens) return;
      const int item = i - token * fresh_w.first_items[kNumQkvKinds];
      kind = (item >= fresh_w.first_items[kGates]) + (item >= fresh_w.first_items[kKeys]) +
             (item >= fresh_w.first_items[kValues]);
      begin = (item - fresh_w.first_items[kind]) * fresh_w.parts[kind].item_heads;
    }
    const QkvPart& part = fresh_w.parts[kind];
    const int end = begin + part.item_heads;
    Item item(fresh_w, fresh_b, kind, token);
    item.Run(begin, end < part.num_heads ? end : part.num_heads, [&] {
      if (Uniform(waiting_stores) != 0) return block_slots.Of(i >> 1);
      const QkvSlots slots = SlotsOf(fresh_w, fresh_b);
      return slots.StoredLast(token, slots.Read(token));
    });
  }
}

template <DType kDType>
const void* FusedQkvKernelOf(QkvKernel kernel, int piece_size) {
  constexpr int kSmall = kPieceSize / 2;
  switch (kernel) {
    case QkvKernel::kFew:
      return piece_size == kSmall ? KernelAddress(FusedQkvFewKernel<kDType, kSmall>)
                                  : KernelAddress(FusedQkvFewKernel<kDType, kPieceSize>);
    case QkvKernel::kFewOtherwise:
      return piece_size == kSmall ? KernelAddress(FusedQkvPlainKernel<kDType, kSmall, true>)
                                  : KernelAddress(FusedQkvPlainKernel<kDType, kPieceSize, true>);
    case QkvKernel::kMany:
      return KernelAddress(FusedQkvManyKernel<kDType, false>);
    case QkvKernel::kManyConverting:
      return KernelAddress(FusedQkvManyKernel<kDType, true>);
    case QkvKernel::kHalves:
      return KernelAddress(FusedQkvKernel<kDType, QkvKernel::kHalves>);
    case QkvKernel::kNeighbours:
      return KernelAddress(FusedQkvKernel<kDType, QkvKernel::kNeighbours>);
    default:
      return KernelAddress(FusedQkvKernel<kDType, QkvKernel::kAnywhere>);
  }
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_FUSED_QKV_KERNEL_H_
