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
  int row_tile = 0;  // of the tiles of rows of a head, the team's
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

// A block's heads of a packed array: tiles, of one head or a few for each of its teams, which
// follow each other, are dealt to the blocks in turn, so that blocks that run together are near
// each other in memory. Sequences begin where those before end, whatever the bounds say (see
// ClippedBound), so a block looks at all bounds. What it knows is kept in shared memory: registers
// are for what is on its way.
class PackedSequences {
 public:
  struct Side {
    int32_t ahead[kCopiesThroughRegisters ? 1 : kMostAhead];  // bounds for the next tile
    int starts[kMostInTile + 1];  // of the sequences of a tile, and of the next one
    int maxima[kMaxThreads / 32];
    int first;    // of the array
    int reached;  // where the last sequence of the tile starts; after the last tile, where all end
  };
  struct Shared {
    Side query, kv;
  };

  JAX_ATTN_DEVICE PackedSequences(const SmallSeqProblem& p, const SmallSeqWork& w, Shared& shared)
      : p_(p), w_(w), shared_(shared) {}

  // The same with parameters that are read again.
  template <typename Params>
  JAX_ATTN_DEVICE PackedSequences Fresh() const {
    return PackedSequences(FreshParameter(p_), FreshParameter<Params>(w_), shared_);
  }

  // Finds the sequences of tile `i` of the block. To be called for tiles in order, and once after
  // the last, for the bounds behind it. Nobody uses At for the tile before any more. kPending:
  // batches that began after AskForTile(i).
  template <int kPending = 0>
  JAX_ATTN_DEVICE void FindTile(int i) const {
    const Stretch s = StretchOf(i);
    const int32_t* query_bounds = Bounds(p_.query_cu_seqlens);
    const int32_t* kv_bounds = Bounds(p_.kv_cu_seqlens);
    if (s.ahead) {
      WaitForBatches<kPending>();
      query_bounds = shared_.query.ahead - s.known - 1;
      kv_bounds = shared_.kv.ahead - s.known - 1;
    }
    __syncthreads();  // all have found what they need of the tile before
    LookAtBounds(query_bounds, kv_bounds, s.known, s.last);
    __syncthreads();
    if (WaveIndex() == 0) Fill(query_bounds, p_.query_tokens, i == 0, s, shared_.query);
    if (WaveIndex() == 1) Fill(kv_bounds, p_.kv_tokens, i == 0, s, shared_.kv);
    __syncthreads();
  }

  // Asks for the bounds that FindTile(i) looks at, when the tile before has been found: they come
  // while that is done. Always one batch.
  JAX_ATTN_DEVICE void AskForTile(int i) const {
    const Stretch s = StretchOf(i);
    if (!s.ahead) return EndBatch();
    const int32_t* const query_bounds = Bounds(p_.query_cu_seqlens) + s.known + 1;
    const int32_t* const kv_bounds = Bounds(p_.kv_cu_seqlens) + s.known + 1;
    Copies<4, 1> copies;
    for (int j = static_cast<int>(threadIdx.x); j < s.last + s.size - s.known;
         j += static_cast<int>(blockDim.x)) {
      copies.Begin(0, shared_.query.ahead + j, query_bounds + j, true);
      copies.Begin(0, shared_.kv.ahead + j, kv_bounds + j, true);
    }
    EndBatch();
  }

  // The first head of a tile, where the heads of all sequences of the array follow each other.
  JAX_ATTN_DEVICE unsigned FirstHead(int tile) const {
    return (static_cast<unsigned>(tile) * w_.blocks_per_array + Block()) * w_.heads_per_tile;
  }
  JAX_ATTN_DEVICE unsigned NumHeads() const {
    return static_cast<unsigned>(p_.num_sequences() * p_.num_kv_heads);
  }

  // Whether a tile has no heads after its first `done`.
  JAX_ATTN_DEVICE bool IsDone(int tile, unsigned done) const {
    return done >= w_.heads_per_tile || FirstHead(tile) + done >= NumHeads();
  }

  // Sequence `index` of the array, one of a tile.
  template <typename Params>
  JAX_ATTN_DEVICE Sequence At(const Params& p, int tile, int index) const {
    const int i = index - FirstSequence(tile);
    Sequence seq(p, static_cast<unsigned>(Array() * p.num_sequences() + index));
    seq.array = Array();
    seq.query =
        SpanOf(shared_.query.starts, i, p.max_q_len, p.query_lengths.data, seq.at.query_lengths);
    seq.kv = SpanOf(shared_.kv.starts, i, p.max_kv_len, p.kv_lengths.data, seq.at.kv_lengths);
    seq.FindVisible(p);
    return seq;
  }

  // After the last tile: calls fill(token) with this thread's share of the tokens that no sequence
  // has.
  template <typename Fill>
  JAX_ATTN_DEVICE void ForUnused(bool of_queries, int64_t units_per_token, Fill fill) const {
    const Side& side = of_queries ? shared_.query : shared_.kv;
    const int64_t tokens = of_queries ? p_.query_tokens : p_.kv_tokens;
    const int64_t step = static_cast<int64_t>(w_.blocks_per_array) * blockDim.x;
    const int64_t own = static_cast<int64_t>(Block()) * blockDim.x + threadIdx.x;
    const int64_t base = Array() * tokens * units_per_token;
    for (int64_t i = own; i < side.first * units_per_token; i += step) fill(base + i);
    for (int64_t i = side.reached * units_per_token + own; i < tokens * units_per_token;
         i += step) {
      fill(base + i);
    }
  }

 private:
  JAX_ATTN_DEVICE int64_t Array() const {
    return blockIdx.x / static_cast<unsigned>(w_.blocks_per_array);
  }
  JAX_ATTN_DEVICE int Block() const {
    return static_cast<int>(blockIdx.x % static_cast<unsigned>(w_.blocks_per_array));
  }
  // All of them, after the last tile.
  JAX_ATTN_DEVICE int FirstSequence(int tile) const { return SequenceOf(FirstHead(tile)); }
  JAX_ATTN_DEVICE int SequenceOf(unsigned head) const {
    const unsigned all = NumHeads();
    return static_cast<int>((head < all ? head : all) / static_cast<unsigned>(p_.num_kv_heads));
  }
  JAX_ATTN_DEVICE static int Least(int a, int b) { return a < b ? a : b; }
  JAX_ATTN_DEVICE static int Most(int a, int b) { return a > b ? a : b; }

  // What FindTile looks at: the bounds after `known` up to `last`, where the tile begins, and those
  // of its sequences.
  struct Stretch {
    int known;
    int last;
    int size;
    bool ahead;  // AskForTile asks for it
  };

  JAX_ATTN_DEVICE Stretch StretchOf(int i) const {
    const unsigned count = NumHeads(), first = FirstHead(i);
    const auto last_of = [&](unsigned head) {
      const unsigned end = head + w_.heads_per_tile;
      return SequenceOf((end < count ? end : count) - 1);
    };
    Stretch s;
    s.known = i == 0 ? -1 : last_of(FirstHead(i - 1));
    s.last = SequenceOf(first);
    s.size = first < count ? last_of(first) - s.last + 1 : 0;
    s.ahead = !kCopiesThroughRegisters && i > 0 && FirstHead(i - 1) < count &&
              s.last + s.size - s.known <= kMostAhead;
    return s;
  }

  JAX_ATTN_DEVICE const int32_t* Bounds(const Operand<int32_t>& bounds) const {
    int64_t offset = 0;
    unsigned index = static_cast<unsigned>(Array());
#pragma unroll 1
    for (int d = p_.batch.num_dims - 2; d >= 0; --d) {
      const unsigned size = static_cast<unsigned>(p_.batch.sizes[d]);
      offset += index % size * bounds.batch.strides[d];
      index /= size;
    }
    return bounds.data + offset;
  }

  // Leaves the largest of the bounds after `known`, up to `last`, of each wave.
  JAX_ATTN_DEVICE void LookAtBounds(const int32_t* query_bounds, const int32_t* kv_bounds,
                                    int known, int last) const {
    constexpr int kAtOnce = 4;  // of each side, on their way
    const int threads = static_cast<int>(blockDim.x);
    int query_most = 0, kv_most = 0;
#pragma unroll 1
    for (int first = known + 1 + static_cast<int>(threadIdx.x); first <= last;
         first += kAtOnce * threads) {
      int x[kAtOnce], y[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = Least(first + i * threads, last);
        x[i] = query_bounds[at];
        y[i] = kv_bounds[at];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        query_most = Most(query_most, x[i]);
        kv_most = Most(kv_most, y[i]);
      }
    }
    query_most = MaxOfWave(query_most);
    kv_most = MaxOfWave(kv_most);
    if (Lane() != 0) return;
    shared_.query.maxima[WaveIndex()] = Clip(query_most, p_.query_tokens);
    shared_.kv.maxima[WaveIndex()] = Clip(kv_most, p_.kv_tokens);
  }

  // One wave: the running maximum of the bounds of a tile.
  JAX_ATTN_DEVICE void Fill(const int32_t* bounds, int64_t tokens, bool is_first, const Stretch& s,
                            Side& side) const {
    const int size = s.size;
    int start = is_first ? 0 : side.reached;
#pragma unroll 1
    for (int i = 0; i < static_cast<int>(blockDim.x) / kWave; ++i) {
      start = Most(start, side.maxima[i]);
    }
    const int lane = Lane();
    int most = lane < size ? Most(start, Clip(bounds[s.last + 1 + lane], tokens)) : start;
#pragma unroll
    for (int distance = 1; distance < kMostInTile; distance *= 2) {
      most = Most(most, ShuffleUp(most, distance));
    }
    if (lane < size) side.starts[lane + 1] = most;
    most = Broadcast(most, size > 1 ? size - 2 : 0);
    WaveFence();
    if (lane != 0) return;
    side.starts[0] = start;
    side.reached = size > 1 ? most : start;
    if (is_first) side.first = Clip(bounds[0], tokens);
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
};

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SMALL_SEQ_SEQUENCE_H_
