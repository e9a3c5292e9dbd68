// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// What a wave of a stream kernel does with its tiles, on matrix instructions.
//
// 16-bit keys and values are multiplied as they are. All 8-bit formats are exact in float16, and
// one instruction makes two float16 of two float8, so float16 is what is multiplied there. Queries
// and weights are brought to the middle of its range, by powers of 2.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_STREAM_CORE_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_STREAM_CORE_H_

#include <cstdint>

#include "matrix.h"
#include "split_kv_logits.h"
#include "split_kv_stream_tiles.h"

#if JAX_ATTN_TENSOR_COPIES

namespace jax_attn::gpu {

// The scale of a head; null if there is none.
JAX_ATTN_DEVICE const float* ScaleOf(const ScaledStreamParams& p,
                                     const ScaledStreamParams::Scale& scale, const EntryRows& rows,
                                     int kv_head) {
  if (scale.data == nullptr) return nullptr;
  int64_t offset = scale.batch_stride * rows.batch_index + scale.head_stride * kv_head;
  if (scale.layer_stride != 0 && p.layer != nullptr) {
    offset += scale.layer_stride * min(max(*p.layer, 0), p.num_layers - 1);
  }
  return scale.data + offset;
}

// Later they are in the cache of the core.
JAX_ATTN_DEVICE void PrefetchScales(const ScaledStreamParams& p, const EntryRows& rows,
                                    int kv_head) {
  const float* const k_scale = ScaleOf(p, p.k_scale, rows, kv_head);
  const float* const v_scale = ScaleOf(p, p.v_scale, rows, kv_head);
  if (k_scale != nullptr) PrefetchLine(k_scale);
  if (v_scale != nullptr) PrefetchLine(v_scale);
}

template <DType kStored, int kDim, int kRowCount>
class StreamCore {
 public:
  // Begins with the rows of an entry.
  template <typename Params>
  JAX_ATTN_DEVICE StreamCore(const Params& p, const EntryRows& rows, int kv_head) {
    if constexpr (kBytes) {
      LoadScaledQueries(p, rows, kv_head);
    } else {
      LoadQueries(p, rows, kv_head);
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        top_[n][slot] = -kInfinity;
        total_[n][slot] = 0;
      }
#pragma unroll
      for (int h = 0; h < kSteps; ++h) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) out_[h][n][i] = 0;
      }
    }
  }

  // `tile`: keys, then values; the walk is at it.
  template <typename Walk>
  JAX_ATTN_DEVICE void Attend(const StreamParams& p, const Walk& walk, char* tile) {
    const int last = walk.key() + kTileKeys;
    const bool whole = walk.key() >= walk.keys().begin && last <= walk.keys().end;
    if (!whole) ClearValues(walk, tile);
    float x[kParts][kBlocks][kElements] = {}, other[kParts][kBlocks][kElements] = {};
    const uint32_t keys = KeyRow(tile);
#pragma unroll
    for (int c = 0; c < kSteps; ++c) {
      Fragments::A a[kParts];
      LoadKeys(keys, c, a);
#pragma unroll
      for (int g = 0; g < kParts; ++g) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          Fragments::MultiplyAdd<kT>(a[g], query_[c][n],
                                     c % 2 == 0 || !kHalvesSums ? x[g][n] : other[g][n]);
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kParts; ++g) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          if (kHalvesSums) x[g][n][i] += other[g][n][i];
        }
      }
    }
    Fragments::B weights[kParts][kBlocks];
    const bool all_seen = walk.key() >= walk.common().begin && last <= walk.common().end;
    if (!all_seen) Hide(p, walk, x);
    Weigh(p.scale * kLog2E, x, weights);
    const uint32_t values = ValueRow(tile);
#pragma unroll
    for (int h = 0; h < kSteps; ++h) {
      Fragments::A a[kParts];
      LoadValues(values, h, a);
#pragma unroll
      for (int g = 0; g < kParts; ++g) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          Fragments::MultiplyAdd<kT>(a[g], weights[g][n], out_[h][n]);
        }
      }
    }
  }

  // Leaves unnormalised outputs, tops and totals in shared memory.
  JAX_ATTN_DEVICE void Finish(float* outputs, float* tops, float* totals) const {
    const int lane = Lane();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const int row = n * Fragments::kRows + Fragments::Row(lane, slot);
        // The same from every lane that has the row.
        tops[row] = top_[n][slot] - kLargestWeight;
        totals[row] = Fragments::SumOverKeys(total_[n][slot]);
      }
#pragma unroll
      for (int h = 0; h < kSteps; ++h) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          const int row = n * Fragments::kRows + Fragments::Row(lane, Fragments::SlotOf(i));
          const int d = h * 16 + Fragments::Element<kStored>(lane, i);
          outputs[row * (StreamOutputStride(kDim) / 4) + d] = out_[h][n][i];
        }
      }
    }
  }

  // What outputs are to be multiplied by.
  JAX_ATTN_DEVICE float ValueFactor() const { return kBytes ? value_factor_ : 1.0f; }

 private:
  static constexpr bool kBytes = SizeOf(kStored) == 1;
  static constexpr DType kT = kBytes ? DType::kFloat16 : kStored;  // what is multiplied
  static constexpr int kTileKeys = StreamTileKeys(static_cast<int>(SizeOf(kStored)));
  static constexpr int kParts = kTileKeys / kFragmentKeys;
  static constexpr int kBlocks = kRowCount / Fragments::kRows;
  static constexpr int kSteps = kDim / 16;
  static constexpr int kElements = Fragments::kElements;
  static constexpr int kSlots = Fragments::kSlots;
  // A tile has boxes of 16 keys one after the other, and a box has lines of its keys.
  static constexpr int kRowBytes = kDim * static_cast<int>(SizeOf(kStored));
  static constexpr int kLineBytes = kRowBytes < 128 ? kRowBytes : 128;
  static constexpr int kBoxBytes = kStreamMinKeys * kRowBytes;
  static constexpr int kPieceBytes = kStreamMinKeys * kLineBytes;  // lines of all keys of a box
  static constexpr int kSideBytes = kStreamRowBytes * kDim;
  static_assert(kStreamMinKeys == kFragmentKeys && kRowBytes % 64 == 0);
  // Two sums, of every other step, are not as long a wait as one. With more keys there are two.
  static constexpr bool kHalvesSums = kParts == 1;
  // Weights are up to 2^this, so that those of many keys do not vanish in float16 together.
  static constexpr float kLargestWeight = kBytes ? 15.0f : 0.0f;

  // Where piece `piece` of 16 bytes of a key is, if that is in its first line. Other pieces `i` of
  // the row: see Piece.
  static JAX_ATTN_DEVICE uint32_t Row(int key, int piece) {
    constexpr bool kWhole = kLineBytes == 128;
    const int swizzle = kWhole ? key % 8 : key / 2 % 4;
    const int box = kTileKeys == kStreamMinKeys ? 0 : key / kStreamMinKeys;
    return box * kBoxBytes + key % kStreamMinKeys * kLineBytes + (piece ^ swizzle) * 16;
  }
  static JAX_ATTN_DEVICE uint32_t Piece(uint32_t row, int i) {
    constexpr int kPieces = kLineBytes / 16;
    return (row ^ (i % kPieces * 16)) + i / kPieces * kPieceBytes;
  }

  // The lane's row of the matrices of keys.
  static JAX_ATTN_DEVICE uint32_t KeyRow(const char* tile) {
    const int lane = Lane();
    return SharedAddress(tile) + (kBytes ? Row(lane, 0) : Row(lane % 16, lane / 16));
  }
  static JAX_ATTN_DEVICE uint32_t ValueRow(const char* tile) {
    const int lane = Lane();
    return SharedAddress(tile) + kSideBytes +
           (kBytes ? Row(lane, 0) : Row(lane % 8 + lane / 16 * 8, lane / 8 % 2));
  }

  // Elements 16 * c and on of the keys: see Fragments::LoadKeys.
  static JAX_ATTN_DEVICE void LoadKeys(uint32_t row, int c, Fragments::A (&a)[kParts]) {
    if constexpr (kBytes) {
      uint32_t bytes[4];
      LoadMatrices(Piece(row, c), bytes);
#pragma unroll
      for (int g = 0; g < kParts; ++g) {
        Widen<kStored, kT>(bytes[2 * g], a[g].words[0], a[g].words[2]);
        Widen<kStored, kT>(bytes[2 * g + 1], a[g].words[1], a[g].words[3]);
      }
    } else {
      LoadMatrices(Piece(row, 2 * c), a[0].words);
    }
  }

  // Elements 16 * h and on of the values: see Fragments::LoadValues.
  static JAX_ATTN_DEVICE void LoadValues(uint32_t row, int h, Fragments::A (&a)[kParts]) {
    if constexpr (kBytes) {
      uint32_t bytes[4];
      LoadMatricesTransposed(Piece(row, h), bytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t* const words = a[i / 2].words + i % 2 * 2;
        WidenAcross<kStored, kT>(bytes[i], words[0], words[1]);
      }
    } else {
      LoadMatricesTransposed(Piece(row, 2 * h), a[0].words);
    }
  }

  JAX_ATTN_DEVICE void LoadQueries(const StreamParams& p, const EntryRows& rows, int kv_head) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const int row = n * Fragments::kRows + Lane() / 4;
      const bool exists = row < rows.num_rows;
      const uint32_t* const elements = reinterpret_cast<const uint32_t*>(
          QueryRow(p, rows, kv_head, exists ? row : 0, kDim) + Lane() % 4 * 2);
#pragma unroll
      for (int c = 0; c < kSteps; ++c) {
        query_[c][n].words[0] = exists ? elements[c * 8] : 0;
        query_[c][n].words[1] = exists ? elements[c * 8 + 4] : 0;
      }
    }
  }

  // As float16, whichever type they have.
  JAX_ATTN_DEVICE void LoadScaledQueries(const ScaledStreamParams& p, const EntryRows& rows,
                                         int kv_head) {
    const float* const k_scale = ScaleOf(p, p.k_scale, rows, kv_head);
    const float* const v_scale = ScaleOf(p, p.v_scale, rows, kv_head);
    const float key_factor = k_scale == nullptr ? 1.0f : *k_scale;
    value_factor_ = v_scale == nullptr ? 1.0f : *v_scale;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const int row = n * Fragments::kRows + Lane() / 4;
      const bool exists = row < rows.num_rows;
      // Beside each other as LoadKeys has those of keys.
      const uint2* const elements = reinterpret_cast<const uint2*>(
          QueryRow(p, rows, kv_head, exists ? row : 0, kDim) + Lane() % 4 * 4);
#pragma unroll
      for (int c = 0; c < kSteps; ++c) {
        const uint2 four = exists ? elements[c * 4] : uint2{0, 0};
        query_[c][n].words[0] = four.x;
        query_[c][n].words[1] = four.y;
      }
    }
    const bool are_bfloat16 = p.query_dtype == DType::kBFloat16;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const float inverse = are_bfloat16 ? MakeQueryFloat16(n) : 1.0f;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        factor_[n][slot] =
            p.scale * kLog2E * key_factor * Broadcast(inverse, Fragments::Row(Lane(), slot) * 4);
      }
    }
  }

  // Makes float16 of a row of bfloat16, times a power of 2 of which it returns the inverse. The
  // largest element comes near 2^15, and others that are not 2^29 times smaller stay exact.
  JAX_ATTN_DEVICE float MakeQueryFloat16(int n) {
    uint32_t sizes = 0;  // the largest in both halves
#pragma unroll
    for (int c = 0; c < kSteps; ++c) {
#pragma unroll
      for (const uint32_t word : query_[c][n].words) sizes = __vmaxu2(sizes, word & 0x7fff7fffu);
    }
    int largest = static_cast<int>(max(sizes & 0xffffu, sizes >> 16));
    largest = max(largest, ShuffleXor(largest, 1));
    largest = max(largest, ShuffleXor(largest, 2));
    constexpr int kBias = 127;
    const int exponent =
        min(largest >> 7, 2 * kBias) - kBias;   // of finite ones, if there are others
    const int shift = min(14 - exponent, 100);  // its inverse times other factors is a number
    const float factor = BitsFloat(static_cast<uint32_t>(kBias + shift) << 23);
#pragma unroll
    for (int c = 0; c < kSteps; ++c) {
#pragma unroll
      for (uint32_t& word : query_[c][n].words) {
        float x[2];
        ToFloats<DType::kBFloat16>(word, x);
        word = Pack<kT>(x[0] * factor, x[1] * factor);
      }
    }
    return BitsFloat(static_cast<uint32_t>(kBias - shift) << 23);
  }

  // Values of keys outside the part, which may be anything, become 0: a weight of 0 would not do.
  template <typename Walk>
  static JAX_ATTN_DEVICE void ClearValues(const Walk& walk, char* tile) {
    constexpr int kLineChunks = kLineBytes / 16, kBoxChunks = kBoxBytes / 16;
    for (int i = Lane(); i < kParts * kBoxChunks; i += kWave) {
      const int box = kParts == 1 ? 0 : i / kBoxChunks;
      const int key = walk.key() + box * kStreamMinKeys + i / kLineChunks % kStreamMinKeys;
      if (key < walk.keys().begin || key >= walk.keys().end) {
        reinterpret_cast<uint4*>(tile + kSideBytes)[i] = {0, 0, 0, 0};
      }
    }
    OrderStoresBeforeCopies();
    WaveFence();
  }

  // Scores of keys that a row does not see become -inf.
  template <typename Walk>
  static JAX_ATTN_DEVICE void Hide(const StreamParams& p, const Walk& walk,
                                   float (&x)[kParts][kBlocks][kElements]) {
    const int lane = Lane();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const int row = n * Fragments::kRows + Fragments::Row(lane, slot);
        const int query = QueryOfRow(p, walk.rows().first_row + row);
        const KeyRange seen = VisibleKeys(p, walk.context(), query);
#pragma unroll
        for (int g = 0; g < kParts; ++g) {
#pragma unroll
          for (int i = 0; i < kElements; ++i) {
            if (Fragments::SlotOf(i) != slot) continue;
            const int key = walk.key() + g * kFragmentKeys + Fragments::Key(lane, i);
            const bool visible =
                key >= max(seen.begin, walk.keys().begin) && key < min(seen.end, walk.keys().end);
            if (!visible) x[g][n][i] = -kInfinity;
          }
        }
      }
    }
  }

  // `factor`: from dot products to logits in base 2, unless rows have their own.
  JAX_ATTN_DEVICE void Weigh(float factor, float (&x)[kParts][kBlocks][kElements],
                             Fragments::B (&weights)[kParts][kBlocks]) {
    float rescale[kBlocks][kSlots];
    bool any_rescale = false;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      float top[kSlots];
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) top[slot] = -kInfinity;
#pragma unroll
      for (int g = 0; g < kParts; ++g) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          const int slot = Fragments::SlotOf(i);
          x[g][n][i] *= kBytes ? factor_[kBytes ? n : 0][slot] : factor;
          top[slot] = Max(top[slot], x[g][n][i]);
        }
      }
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const float new_top = Max(top_[n][slot], Fragments::MaxOverKeys(top[slot]));
        const float base = Base(new_top);
        rescale[n][slot] = Exp2(top_[n][slot] - base);
        any_rescale |= top_[n][slot] != new_top;
        top_[n][slot] = new_top;
        total_[n][slot] *= rescale[n][slot];
        top[slot] = base - kLargestWeight;
      }
#pragma unroll
      for (int g = 0; g < kParts; ++g) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          const int slot = Fragments::SlotOf(i);
          x[g][n][i] = Exp2(x[g][n][i] - top[slot]);
          total_[n][slot] += x[g][n][i];
        }
        weights[g][n] = Fragments::FromScores<kT>(x[g][n]);
      }
    }
    if (!Any(any_rescale)) return;
#pragma unroll
    for (int h = 0; h < kSteps; ++h) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) out_[h][n][i] *= rescale[n][Fragments::SlotOf(i)];
      }
    }
  }

  Fragments::B query_[kSteps][kBlocks];
  float factor_[kBytes ? kBlocks : 1][kSlots];  // of rows
  float value_factor_;
  float top_[kBlocks][kSlots];
  float total_[kBlocks][kSlots];  // of the lane's own keys
  float out_[kSteps][kBlocks][kElements];
};

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_TENSOR_COPIES

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_STREAM_CORE_H_
