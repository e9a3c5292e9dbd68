// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The fused QKV pass of most models, but for what fused_qkv_few.h does. A wave computes heads of
// one kind, queries, gates, keys or values. Some lanes have a head, two pieces of kSize elements of
// it each, so that a rotation needs no other lane: small pieces where few tokens wait for a lane,
// large ones where many do.

#ifndef JAX_ATTN_CSRC_GPU_FUSED_QKV_PLAIN_H_
#define JAX_ATTN_CSRC_GPU_FUSED_QKV_PLAIN_H_

#include <cstdint>

#include "fused_qkv_head.h"
#include "fused_qkv_kernels.h"
#include "fused_qkv_rows.h"
#include "fused_qkv_slots.h"

namespace jax_attn::gpu {

template <DType kDType, int kSize, bool kConverts>
class FusedQkvPlainItem {
 public:
  JAX_ATTN_DEVICE FusedQkvPlainItem(const FusedQkvPlainWork& w, int kind)
      : w_(w), part_(w.parts[kind]), kind_(kind) {
    at_ = PlainPieces(Lane() & ((1 << w.lane_bits) - 1), w.rotated_slots, w.other_slots,
                      w.num_pieces);
  }

  // Computes a head for each group of lanes, from `begin` up to `end`. `find_slot` says where the
  // token is stored.
  template <typename FindSlot>
  JAX_ATTN_DEVICE void RunOnce(int token, int begin, int end, FindSlot find_slot) {
    const int head = begin + (Lane() >> w_.lane_bits);
    const bool wanted = head < end;
    Pieces pieces[2], weights[2];
    Load(RowOf(token, head), wanted, pieces);
    // All that is read early, before anything is waited for.
    uint32_t position = 0;
    if (part_.rotated) position = Position(token);
    LoadWeights(weights);
    int64_t layer = 0;
    if (kind_ >= kKeys && w_.layer != nullptr) layer = *w_.layer;
    Tables tables;
    if (part_.rotated) LoadTables(position, tables);
    CachePlace place;
    if (kind_ >= kKeys) place = FindPlace(find_slot(token), layer);
    if (part_.computed) {
      Factors factors;
      MakeFactors(weights, tables, factors);
      Compute(factors, pieces);
    }
    Store(pieces, wanted, OutOf(token, head));
    if (place.data != nullptr) StoreInCache(place, head, wanted, pieces);
  }

  // Computes all heads of every `step`th token from `token` up to `last`. `shared` belongs to the
  // wave.
  template <typename FindSlot>
  JAX_ATTN_DEVICE void RunMany(int token, int last, int step, char* shared, FindSlot find_slot) {
    if (token >= last) return;
    const SharedFactors<kSize> held(shared, w_.lane_bits);
    const int heads = kWave >> w_.lane_bits;  // at once
    const int own = Lane() >> w_.lane_bits, end = part_.num_heads;
    const int in_step = heads * part_.column_stride, out_step = heads * w_.head_bytes;
    const char* row = RowOf(token, own);
    Pieces pieces[2];
    Load(row, own < end, pieces);
    uint32_t position = 0;
    if (part_.rotated) position = Position(token);
    int64_t layer = 0;
    if (kind_ >= kKeys && w_.layer != nullptr) layer = *w_.layer;

    for (; token < last; token += step) {
      Same of_token = Again();
      Tables tables;
      Pieces weights[2];
      if (of_token.part_.computed) of_token.LoadWeights(weights);
      if (of_token.part_.rotated) of_token.LoadTables(position, tables);
      const bool is_last = token + step >= last;
      if (of_token.part_.rotated && !is_last) position = of_token.Position(token + step);
      CachePlace place;
      if (of_token.kind_ >= kKeys) place = of_token.FindPlace(find_slot(token), layer);
      if (of_token.part_.computed) {
        Factors factors;
        of_token.MakeFactors(weights, tables, factors);
        held.Store(factors);
      }

      const char* in = row;
      row += step * of_token.w_.token_bytes;
      char* out = of_token.OutOf(token, own);
      int head = own;
      for (int first = 0; first < end; first += heads, head += heads) {
        Same of_head = Again();
        // The next heads, or those of the next token, are read while these are computed.
        Pieces next[2];
        in += in_step;
        if (first + heads < end) {
          of_head.Load(in, head + heads < end, next);
        } else if (!is_last) {
          of_head.Load(row, own < end, next);
        }
        if (of_head.part_.computed) {
          BeginReads();  // not in front of the loop
          Factors factors;
          held.Load(factors);
          of_head.Compute(factors, pieces);
        }
        of_head.Store(pieces, head < end, out);
        out += out_step;
        if (place.data != nullptr) of_head.StoreInCache(place, head, head < end, pieces);
        pieces[0] = next[0];
        pieces[1] = next[1];
      }
    }
  }

 private:
  JAX_ATTN_DEVICE FusedQkvPlainItem(const FusedQkvPlainWork& w, int kind, const LanePieces& at)
      : w_(w), part_(w.parts[kind]), kind_(kind), at_(at) {}

  // The same, of which nothing was read or compared yet.
  using Same = std::conditional_t<kMovesAhead, FusedQkvPlainItem, const FusedQkvPlainItem&>;
  JAX_ATTN_DEVICE Same Again() const {
    if constexpr (kMovesAhead) {
      return FusedQkvPlainItem(FreshParameter(w_), Fresh(kind_), at_.Again());
    } else {
      return *this;
    }
  }

  using Pieces = Piece<kDType, kSize>;
  static constexpr int kBytes = Pieces::kBytes;

  using Factors = HeadFactors<kSize>;
  using Tables = TablePieces<kSize>;

  JAX_ATTN_DEVICE bool rotated() const { return at_.rotated && part_.rotated; }

  JAX_ATTN_DEVICE const char* RowOf(int token, int head) const {
    return static_cast<const char*>(w_.qkv) + token * w_.token_bytes +
           (part_.first_column + head * part_.column_stride + at_.first * kBytes);
  }
  JAX_ATTN_DEVICE char* OutOf(int token, int head) const {
    return static_cast<char*>(part_.out) +
           (int64_t{token} * part_.num_heads + head) * w_.head_bytes + at_.first * kBytes;
  }

  JAX_ATTN_DEVICE void LoadWeights(Pieces (&weights)[2]) const {
    if (part_.weight == nullptr) return;
    Load(static_cast<const char*>(part_.weight) + at_.first * kBytes, true, weights);
  }
  JAX_ATTN_DEVICE void StoreInCache(const CachePlace& place, int head, bool wanted,
                                    const Pieces (&pieces)[2]) const {
    if constexpr (kConverts) {
      ConvertRow(place, w_.stored_dtype, head, w_.lane_bits, at_, pieces, wanted);
    } else {
      Store(pieces, wanted, place.data + head * place.head_stride + at_.first * kBytes);
    }
  }

  JAX_ATTN_DEVICE void Load(const char* from, bool wanted, Pieces (&pieces)[2]) const {
    if (wanted && at_.has_first) pieces[0].Load(from);
    if (wanted && at_.has_second) pieces[1].Load(from + (at_.second - at_.first) * kBytes);
  }
  JAX_ATTN_DEVICE void Store(const Pieces (&pieces)[2], bool wanted, char* to) const {
    if (wanted && at_.has_first) pieces[0].Store(to);
    if (wanted && at_.has_second) pieces[1].Store(to + (at_.second - at_.first) * kBytes);
  }

  // Sums wrap around as they do in XLA.
  JAX_ATTN_DEVICE uint32_t Position(int token) const {
    const uint32_t offset = w_.offsets == nullptr ? 0 : w_.offsets[token];
    return w_.positions[token] + offset;
  }

  JAX_ATTN_DEVICE void LoadTables(uint32_t position, Tables& tables) const {
    if (!at_.rotated) return;
    const int32_t asked = static_cast<int32_t>(position);
    const int32_t row = min(max(asked, 0), w_.max_positions - 1);
    const int64_t from = int64_t{row} * w_.table_width + at_.first * kSize;
    tables[0].Load(w_.cos + from);
    tables[1].Load(w_.sin + from);
  }

  JAX_ATTN_DEVICE void MakeFactors(const Pieces (&weights)[2], const Tables& tables,
                                   Factors& factors) const {
    MakeHeadFactors(weights, part_.weight != nullptr, w_.weight_offset, tables, rotated(), factors);
  }

  // Norm and rotation of a head, in place; all lanes call this.
  JAX_ATTN_DEVICE void Compute(const Factors& factors, Pieces (&pieces)[2]) const {
    float x[2][kSize], y[2][kSize];
    pieces[0].Decode(x[0]);
    pieces[1].Decode(x[1]);
    float inverse = 1.0f;
    if (w_.normalizes) inverse = InverseNorm(x, w_.lane_bits, w_.inverse_size, w_.epsilon);
    TurnHead(x, factors, rotated(), inverse, y);
    pieces[0].Encode(y[0]);
    pieces[1].Encode(y[1]);
  }

  JAX_ATTN_DEVICE CachePlace FindPlace(int64_t slot, int64_t layer) const {
    CachePlace place;
    if (slot == kNoSlot || layer < 0 || layer >= w_.num_layers) return place;
    const QkvPages& pages = w_.pages[kind_ - kKeys];
    const int64_t page = w_.pages_of_slots.Divide(static_cast<uint32_t>(slot));
    const int64_t offset = slot - page * w_.page_size;
    const int64_t size = kConverts ? SizeOf(w_.stored_dtype) : SizeOf(kDType);
    const int64_t row =
        layer * pages.layer_stride + page * pages.page_stride + offset * pages.token_stride;
    place.data = pages.data + row * size;
    place.head_stride = pages.head_stride * size;
    if (!kConverts) return place;
    if (pages.dynamic_scale != nullptr) {
      place.dynamic_scale = pages.dynamic_scale + row / (w_.num_pieces * kSize);
      place.scale_stride = pages.head_stride / (w_.num_pieces * kSize);
    } else if (pages.scale != nullptr) {
      place.scale = pages.scale + layer * pages.scale_layer_stride +
                    page * pages.scale_page_stride + offset * pages.scale_token_stride;
      place.scale_stride = pages.scale_head_stride;
    }
    return place;
  }

  const FusedQkvPlainWork& w_;
  const QkvPlainPart& part_;
  const int kind_;
  LanePieces at_;
};

// For few tokens with gates or conversion: a wave computes some heads of one.
template <DType kDType, int kSize, bool kConverts>
__global__ void __launch_bounds__(kMaxFusedQkvThreads)
    FusedQkvPlainKernel(JAX_ATTN_PARAMETER FusedQkvPlainWork w) {
  const int i = static_cast<int>(blockIdx.x * (blockDim.x / kWave)) + WaveIndex();
  const int token = static_cast<int>(w.tokens_of_items.Divide(static_cast<uint32_t>(i)));
  if (token >= w.num_tokens) return;
  const int item = i - token * w.items_per_token;
  const int kind = (item >= w.parts[kGates].first_item) + (item >= w.parts[kKeys].first_item) +
                   (item >= w.parts[kValues].first_item);
  const int begin = (item - w.parts[kind].first_item) << (kWaveBits - w.lane_bits);
  const QkvSlots slots(w.slots, nullptr, w.capacity, w.num_tokens);
  SlotReads reads;
  if (kind >= kKeys) reads = slots.Read(token);
  FusedQkvPlainItem<kDType, kSize, kConverts>(w, kind).RunOnce(
      token, begin, w.parts[kind].num_heads,
      [&](int asked) { return slots.StoredLast(asked, reads); });
}

// Blocks of 128 threads that a core has room for: as many as registers allow, nearly without
// spilling.
constexpr int BlocksPerCore(DType dtype, bool converts) {
  return converts || dtype == DType::kFloat32 ? 4 : 5;
}

// For many: the first blocks store keys and values, the others compute queries or gates.
template <DType kDType, bool kConverts>
__global__ void JAX_ATTN_LAUNCH_BOUNDS(kMaxFusedQkvThreads, BlocksPerCore(kDType, kConverts))
    FusedQkvManyKernel(JAX_ATTN_PARAMETER FusedQkvPlainWork w) {
  JAX_ATTN_DYNAMIC_SHARED(shared);
  BlockSlots& block_slots = *reinterpret_cast<BlockSlots*>(shared);
  const QkvSlots slots(w.slots, nullptr, w.capacity, w.num_tokens);
  const int block = static_cast<int>(blockIdx.x);
  const bool stores = block < w.storing_blocks;
  int kind = kKeys, last_kind = kValues, first = block * w.block_tokens, count = w.block_tokens;
  if (!stores) {
    const int index = block - w.storing_blocks;
    const bool has_gates = w.parts[kGates].num_heads != 0;
    kind = last_kind = has_gates ? index & 1 : kQueries;
    count = w.item_tokens;
    first = (has_gates ? index >> 1 : index) * count;
  }
  const int last = min(first + count, w.num_tokens);
  if (stores) block_slots.Find(slots, first, last - first);
  for (; kind <= last_kind; ++kind) {
    const FusedQkvPlainWork& fresh_w = FreshParameter(w);
    FusedQkvPlainItem<kDType, kPieceSize, kConverts>(fresh_w, kind)
        .RunMany(first + WaveIndex(), last, static_cast<int>(blockDim.x) / kWave,
                 shared + kBlockSlotsBytes +
                     WaveIndex() * SharedFactors<kPieceSize>::Bytes(fresh_w.lane_bits),
                 [&](int asked) { return block_slots.Of(asked - first); });
  }
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_FUSED_QKV_PLAIN_H_
