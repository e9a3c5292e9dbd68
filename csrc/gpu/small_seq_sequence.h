// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Where sequences begin and end, and which team does which.

#ifndef JAX_ATTN_CSRC_GPU_SMALL_SEQ_SEQUENCE_H_
#define JAX_ATTN_CSRC_GPU_SMALL_SEQ_SEQUENCE_H_

#include <cstdint>
#include <type_traits>

#include "../small_seq_attention.h"
#include "small_seq_kernels.h"
#include "wave.h"

namespace jax_attn::gpu {

// Where the arrays of a sequence, or the packed ones that it is in, begin: elements from the first
// one of each operand. Found together, since dimensions of vmap need divisions.
struct Offsets {
  int64_t query = 0, key = 0, value = 0, bias = 0, query_lengths = 0, kv_lengths = 0;
  int64_t lse = 0, dout = 0, dlse = 0;

  template <typename Params>
  JAX_ATTN_DEVICE Offsets(const Params& p, unsigned index) {
#pragma unroll 1
    for (int d = p.batch.num_dims - 1; d > 0; --d) {
      const unsigned size = static_cast<unsigned>(p.batch.sizes[d]);
      Add(p, d, index % size);
      index /= size;
    }
    Add(p, 0, index);
  }

 private:
  template <typename Params>
  JAX_ATTN_DEVICE void Add(const Params& p, int d, unsigned index) {
    query += index * p.query.batch.strides[d];
    key += index * p.key.batch.strides[d];
    value += index * p.value.batch.strides[d];
    bias += index * p.bias.batch.strides[d];
    query_lengths += index * p.query_lengths.batch.strides[d];
    kv_lengths += index * p.kv_lengths.batch.strides[d];
    if constexpr (std::is_same_v<Params, SmallSeqBackwardParams>) {
      lse += index * p.lse.batch.strides[d];
      dout += index * p.dout.batch.strides[d];
      dlse += index * p.dlse.batch.strides[d];
    }
  }
};

// The tokens of a sequence; `room` are those up to the next one.
struct Span {
  int begin = 0;
  int length = 0;
  int room = 0;
};

// One pair of sequences. Queries before `first_query` and from `end_query` on see nothing, and
// nothing sees keys from `num_keys` on.
struct Sequence {
  template <typename Params>
  JAX_ATTN_DEVICE Sequence(const Params& p, unsigned index) : batch_index(index), at(p, index) {}

  // Elements in front of a query, or of the first key, of a head in an operand with `dim` elements
  // a head, and in a result.
  JAX_ATTN_DEVICE int64_t QueryIn(const SmallSeqProblem& p, int t, int head) const {
    return (static_cast<int64_t>(query.begin) + t) * p.num_q_heads + head;
  }
  JAX_ATTN_DEVICE int64_t KeyIn(const SmallSeqProblem& p, int j, int head) const {
    return (static_cast<int64_t>(kv.begin) + j) * p.num_kv_heads + head;
  }
  JAX_ATTN_DEVICE int64_t QueryRow(const SmallSeqProblem& p, int t, int head) const {
    return array * p.query_tokens * p.num_q_heads + QueryIn(p, t, head);
  }
  JAX_ATTN_DEVICE int64_t KeyRow(const SmallSeqProblem& p, int j, int head) const {
    return array * p.kv_tokens * p.num_kv_heads + KeyIn(p, j, head);
  }

  // To be called when the spans are known.
  JAX_ATTN_DEVICE void FindVisible(const SmallSeqProblem& p) {
    end_query = p.num_q_heads == 0 ? 0 : query.length;
    num_keys = 0;
    if (end_query > 0) num_keys = VisibleKeys(p, end_query - 1);
    if (num_keys == 0) end_query = 0;
    first_query = 0;
    if (p.causal == Causal::kBottomRight && query.length > kv.length) {
      first_query = query.length - kv.length;
    }
    if (first_query > end_query) first_query = end_query;
  }

  JAX_ATTN_DEVICE int VisibleKeys(const SmallSeqProblem& p, int t) const {
    return static_cast<int>(VisibleEnd(p, query.length, kv.length, t));
  }

  unsigned batch_index;
  Offsets at;
  int64_t array = 0;  // what dense sequences, or packed arrays, are counted by in results
  Span query;
  Span kv;
  int first_query = 0;
  int end_query = 0;
  int num_keys = 0;
};

JAX_ATTN_DEVICE int Clip(int64_t length, int64_t longest) {
  return static_cast<int>(length < 0 ? 0 : length > longest ? longest : length);
}

template <typename Params>
JAX_ATTN_DEVICE Sequence DenseSequence(const Params& p, unsigned index) {
  Sequence seq(p, index);
  seq.array = index;
  seq.query.length = seq.query.room = static_cast<int>(p.max_q_len);
  seq.kv.length = seq.kv.room = static_cast<int>(p.max_kv_len);
  if (p.query_lengths.data != nullptr) {
    seq.query.length = Clip(p.query_lengths.data[seq.at.query_lengths], seq.query.room);
  }
  if (p.kv_lengths.data != nullptr) {
    seq.kv.length = Clip(p.kv_lengths.data[seq.at.kv_lengths], seq.kv.room);
  }
  seq.FindVisible(p);
  return seq;
}

// A block's sequences of a packed array. They begin where those before end, whatever the bounds
// say (see ClippedBound), so a block looks at all bounds in front of its first sequence.
class PackedSequences {
 public:
  struct Side {
    int starts[kMaxThreads + 1];  // of the sequences of a tile, and of the next one
    int first;                    // of the array
    int end;
  };
  struct Shared {
    Side query, kv;
    int maxima[2][kMaxThreads / 32];
  };

  JAX_ATTN_DEVICE PackedSequences(const SmallSeqProblem& p, const SmallSeqWork& w, Shared& shared)
      : p_(p), w_(w), shared_(shared) {}

  // Finds where the block's first sequence begins.
  JAX_ATTN_DEVICE void Begin() {
    const unsigned num_blocks = static_cast<unsigned>(w_.blocks_per_array);
    array_ = blockIdx.x / num_blocks;
    block_ = static_cast<int>(blockIdx.x % num_blocks);
    const int count = static_cast<int>(p_.num_sequences());
    next_ = Clip(int64_t{block_} * w_.sequences_per_block, count);
    last_ = Clip(int64_t{next_} + w_.sequences_per_block, count);
    query_bounds_ = Bounds(p_.query_cu_seqlens);
    kv_bounds_ = Bounds(p_.kv_cu_seqlens);
    FindStart(query_bounds_, p_.query_tokens, shared_.query, query_start_);
    FindStart(kv_bounds_, p_.kv_tokens, shared_.kv, kv_start_);
  }

  // Takes the next sequences of the block, and returns how many; 0 after the last.
  JAX_ATTN_DEVICE int NextTile() {
    first_ = next_;
    const int threads = static_cast<int>(blockDim.x);
    const int count = last_ - next_ < threads ? last_ - next_ : threads;
    if (count == 0) return 0;
    FindTile(query_bounds_, p_.query_tokens, count, query_start_, shared_.query.starts);
    FindTile(kv_bounds_, p_.kv_tokens, count, kv_start_, shared_.kv.starts);
    next_ += count;
    return count;
  }

  // Sequence `i` of the tile.
  template <typename Params>
  JAX_ATTN_DEVICE Sequence At(const Params& p, int i) const {
    const int64_t index = array_ * p.num_sequences() + first_ + i;
    Sequence seq(p, static_cast<unsigned>(index));
    seq.array = array_;
    seq.query =
        SpanOf(shared_.query.starts, i, p.max_q_len, p.query_lengths.data, seq.at.query_lengths);
    seq.kv = SpanOf(shared_.kv.starts, i, p.max_kv_len, p.kv_lengths.data, seq.at.kv_lengths);
    seq.FindVisible(p);
    return seq;
  }

  // Calls fill(token) with this thread's share of the tokens that no sequence has.
  template <typename Fill>
  JAX_ATTN_DEVICE void ForUnused(bool of_queries, int64_t units_per_token, Fill fill) const {
    const Side& side = of_queries ? shared_.query : shared_.kv;
    const int64_t tokens = of_queries ? p_.query_tokens : p_.kv_tokens;
    const int64_t step = static_cast<int64_t>(w_.blocks_per_array) * blockDim.x;
    const int64_t own = static_cast<int64_t>(block_) * blockDim.x + threadIdx.x;
    const int64_t base = array_ * tokens * units_per_token;
    for (int64_t i = own; i < side.first * units_per_token; i += step) fill(base + i);
    for (int64_t i = side.end * units_per_token + own; i < tokens * units_per_token; i += step) {
      fill(base + i);
    }
  }

 private:
  JAX_ATTN_DEVICE const int32_t* Bounds(const Operand<int32_t>& bounds) const {
    int64_t offset = 0;
    unsigned index = static_cast<unsigned>(array_);
#pragma unroll 1
    for (int d = p_.batch.num_dims - 2; d >= 0; --d) {
      const unsigned size = static_cast<unsigned>(p_.batch.sizes[d]);
      offset += index % size * bounds.batch.strides[d];
      index /= size;
    }
    return bounds.data + offset;
  }

  JAX_ATTN_DEVICE static int MaxOfWave(int x) {
#pragma unroll
    for (int mask = 1; mask < kWave; mask *= 2) {
      const int other = ShuffleXor(x, mask);
      x = other > x ? other : x;
    }
    return x;
  }

  // Finds where the array's sequences, and this block's, begin, and where the last ends.
  JAX_ATTN_DEVICE void FindStart(const int32_t* bounds, int64_t tokens, Side& side,
                                 int& start) const {
    const int count = static_cast<int>(p_.num_sequences());
    int before = 0, all = 0;
#pragma unroll 8
    for (int i = static_cast<int>(threadIdx.x); i <= count; i += static_cast<int>(blockDim.x)) {
      const int bound = Clip(bounds[i], tokens);
      if (i <= next_ && bound > before) before = bound;
      if (bound > all) all = bound;
    }
    before = MaxOfWave(before);
    all = MaxOfWave(all);
    if (Lane() == 0) {
      shared_.maxima[0][WaveIndex()] = before;
      shared_.maxima[1][WaveIndex()] = all;
    }
    __syncthreads();
    start = 0;
    int end = 0;
    for (int i = 0; i < static_cast<int>(blockDim.x) / kWave; ++i) {
      start = shared_.maxima[0][i] > start ? shared_.maxima[0][i] : start;
      end = shared_.maxima[1][i] > end ? shared_.maxima[1][i] : end;
    }
    if (threadIdx.x == 0) {
      side.first = Clip(bounds[0], tokens);
      side.end = end;
    }
    __syncthreads();
  }

  // The running maximum of the bounds of a tile.
  JAX_ATTN_DEVICE void FindTile(const int32_t* bounds, int64_t tokens, int count, int& start,
                                int* starts) const {
    const int i = static_cast<int>(threadIdx.x);
    __syncthreads();  // nobody looks at the tile before any more
    int x = start;
    if (i < count) {
      const int bound = Clip(bounds[next_ + 1 + i], tokens);
      x = bound > x ? bound : x;
      starts[1 + i] = x;
    }
    if (i == 0) starts[0] = start;
    __syncthreads();
    for (int distance = 1; distance < count; distance *= 2) {
      const bool moves = i < count && i >= distance;
      const int other = moves ? starts[1 + i - distance] : 0;
      __syncthreads();
      if (moves && other > x) starts[1 + i] = x = other;
      __syncthreads();
    }
    start = starts[count];
  }

  JAX_ATTN_DEVICE static Span SpanOf(const int* starts, int i, int64_t longest,
                                     const int32_t* lengths, int64_t offset) {
    Span span;
    span.begin = starts[i];
    span.room = starts[i + 1] - span.begin;
    span.length = Clip(span.room, longest);
    if (lengths != nullptr) span.length = Clip(lengths[offset], span.length);
    return span;
  }

  const SmallSeqProblem& p_;
  const SmallSeqWork& w_;
  Shared& shared_;
  int64_t array_ = 0;
  int block_ = 0, first_ = 0, next_ = 0, last_ = 0;
  int query_start_ = 0, kv_start_ = 0;
  const int32_t* query_bounds_ = nullptr;
  const int32_t* kv_bounds_ = nullptr;
};

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SMALL_SEQ_SEQUENCE_H_
