// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The backward kernels. A team does all query rows of a kv head of a sequence, so that gradients
// of keys and values are sums in registers; every element of every gradient is written once.

#ifndef JAX_ATTN_CSRC_GPU_SMALL_SEQ_BACKWARD_H_
#define JAX_ATTN_CSRC_GPU_SMALL_SEQ_BACKWARD_H_

#include <cstdint>

#include "small_seq_rows.h"

namespace jax_attn::gpu {

template <typename Team>
JAX_ATTN_DEVICE char* QueryGradient(const SmallSeqBackwardParams& p, const Sequence& seq, int t,
                                    int head) {
  return static_cast<char*>(p.dquery) + seq.QueryRow(p, t, head) * p.head_dim * Team::kSize;
}

// Zeroes the gradients of queries that see nothing and of keys that nothing sees, from key
// `num_keys` on, and of all logits of queries that see nothing.
template <typename Team>
JAX_ATTN_DEVICE void ClearUnseen(const SmallSeqBackwardParams& p, const SmallSeqWork& w,
                                 const Sequence& seq, int head, int num_keys) {
  const int dim = static_cast<int>(p.head_dim), v_dim = static_cast<int>(p.v_head_dim);
  const int group = w.group_size;
  const auto clear_row = [&](int t) {
    for (int g = 0; g < group; ++g) {
      Team::StoreZeros(QueryGradient<Team>(p, seq, t, head * group + g), dim);
    }
  };
  for (int t = 0; t < seq.first_query; ++t) clear_row(t);
  for (int t = seq.end_query; t < seq.query.room; ++t) clear_row(t);
  for (int j = num_keys; j < seq.kv.room; ++j) {
    const int64_t row = seq.KeyRow(p, j, head);
    Team::StoreZeros(static_cast<char*>(p.dkey) + row * dim * Team::kSize, dim);
    Team::StoreZeros(static_cast<char*>(p.dvalue) + row * v_dim * Team::kSize, v_dim);
  }
  if (p.dbias == nullptr) return;
  const int queries = static_cast<int>(p.max_q_len), keys = static_cast<int>(p.max_kv_len);
  for (int g = 0; g < group; ++g) {
    float* dbias =
        p.dbias + (int64_t{seq.batch_index} * p.num_q_heads + head * group + g) * queries * keys;
    for (int i = Team::LaneOfTeam(); i < queries * keys; i += Team::kLanes) {
      const int t = i / keys;
      if (t < seq.first_query || t >= seq.end_query) dbias[i] = 0;
    }
  }
}

// Zeroes the gradients of tokens of no sequence.
template <DType kDType>
JAX_ATTN_DEVICE void ClearUnusedGradients(const SmallSeqBackwardParams& p,
                                          const PackedSequences& packed) {
  const auto clear = [&](bool of_queries, void* data, int64_t elements) {
    packed.ForUnused(of_queries, elements * static_cast<int64_t>(SizeOf(kDType)) / 16,
                     [&](int64_t i) { static_cast<uint4*>(data)[i] = {0, 0, 0, 0}; });
  };
  clear(true, p.dquery, p.num_q_heads * p.head_dim);
  clear(false, p.dkey, p.num_kv_heads * p.head_dim);
  clear(false, p.dvalue, p.num_kv_heads * p.v_head_dim);
}

// Makes weights of a lane's products of the query with keys, `s`, and gradients of these products
// of the products of the output's cotangent with values, `dp`. Writes the gradients of the bias.
template <typename Team, int kChunks>
JAX_ATTN_DEVICE void SoftmaxGradient(const SmallSeqBackwardParams& p, const Sequence& seq, int t,
                                     int head, bool wanted, float (&s)[kChunks],
                                     float (&dp)[kChunks]) {
  const RowLogits row(p, seq, t, head);
  const int own = Lane() % kChunk;
  const float lse = wanted ? p.lse.data[seq.at.lse + seq.QueryIn(p, t, head)] : -kInfinity;
  const float dlse =
      wanted && p.dlse.data != nullptr ? p.dlse.data[seq.at.dlse + seq.QueryIn(p, t, head)] : 0.0f;
  float slopes[kChunks], mean = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int key = c * kChunk + own;
    // What is not seen is not multiplied either: it may be NaN.
    const bool sees = wanted && row.Sees(key);
    slopes[c] = 0;
    const float logit = sees ? row.Of(p, s[c], key, slopes[c]) : -kInfinity;
    s[c] = sees && lse != -kInfinity ? Exp2((logit - lse) * kLog2OfE) : 0.0f;
    dp[c] = sees ? dp[c] : 0.0f;
    mean += s[c] * dp[c];
  }
  mean = SumOfChunk(mean) - dlse;
  float* dbias = nullptr;
  if (p.dbias != nullptr && wanted && Team::LaneOfTeam() < kChunk) {
    const int64_t index = (int64_t{seq.batch_index} * p.num_q_heads + head) * p.max_q_len + t;
    dbias = p.dbias + index * p.max_kv_len;
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int key = c * kChunk + own;
    const float gradient = wanted && row.Sees(key) ? s[c] * (dp[c] - mean) : 0.0f;
    if (dbias != nullptr && key < p.max_kv_len) dbias[key] = gradient;
    dp[c] = wanted && row.Sees(key) ? gradient * slopes[c] * p.scale : 0.0f;
  }
}

// One row: gradients of keys and values are products, and nothing is summed. Values are on their
// way as far ahead of their use as there are registers.
template <typename Team, int kKeys>
JAX_ATTN_DEVICE void DifferentiateOneRow(const SmallSeqBackwardParams& p, const SmallSeqWork& w,
                                         const Sequence& seq, int head, bool is_there) {
  using Part = typename Team::Part;
  constexpr int kEach = kKeys < kChunk ? kKeys : kChunk;
  constexpr int kChunks = kKeys / kEach;
  constexpr int kAhead = kKeys * Team::kPieces <= 8 ? kKeys : 8 / Team::kPieces;
  const int dim = static_cast<int>(p.head_dim), v_dim = static_cast<int>(p.v_head_dim);
  const int num_keys = seq.num_keys;
  const bool sees = num_keys > 0;
  const char* key = HeadOf<Team>(p.key, seq.at.key + seq.KeyIn(p, 0, head) * dim);
  const char* value = HeadOf<Team>(p.value, seq.at.value + seq.KeyIn(p, 0, head) * v_dim);
  const int64_t key_bytes = p.num_kv_heads * dim * Team::kSize;
  const int64_t value_bytes = p.num_kv_heads * v_dim * Team::kSize;

  const Part query =
      Team::Load(HeadOf<Team>(p.query, seq.at.query + seq.QueryIn(p, 0, head) * dim), dim, sees);
  const Part dout =
      Team::Load(HeadOf<Team>(p.dout, seq.at.dout + seq.QueryIn(p, 0, head) * v_dim), v_dim, sees);
  Part keys[kKeys], values[kKeys];
#pragma unroll
  for (int j = 0; j < kKeys; ++j) keys[j] = Team::Load(key + j * key_bytes, dim, j < num_keys);
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    values[j] = Team::Load(value + j * value_bytes, v_dim, j < num_keys);
  }
  float x[Team::kElements], dx[Team::kElements], s[kChunks], dp[kChunks];
  Team::Unpack(query, x);
  Team::Unpack(dout, dx);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    float products[kEach], dproducts[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) products[i] = Team::Multiply(x, keys[c * kEach + i]);
#pragma unroll
    for (int i = 0; i < kEach; ++i) dproducts[i] = Team::Multiply(dx, values[c * kEach + i]);
    if constexpr (kAhead < kKeys) KeepOrder();
#pragma unroll
    for (int j = kAhead + c * kEach; j < kAhead + (c + 1) * kEach && j < kKeys; ++j) {
      values[j] = Team::Load(value + j * value_bytes, v_dim, j < num_keys);
    }
    s[c] = Team::SumOverTeam(products);
    dp[c] = Team::SumOverTeam(dproducts);
  }

  SoftmaxGradient<Team, kChunks>(FreshParameter(p), seq, 0, head, sees, s, dp);
  float dquery[Team::kElements];
  Team::Clear(dquery);
  const SmallSeqBackwardParams& later_p = FreshParameter(p);
  const int written_keys = FreshOfLane(num_keys);
  const int64_t dkey_bytes = FreshOfLane(key_bytes), dvalue_bytes = FreshOfLane(value_bytes);
  const int64_t first_row = seq.KeyRow(later_p, 0, head);
  char* dkey = static_cast<char*>(later_p.dkey) + first_row * dim * Team::kSize;
  char* dvalue = static_cast<char*>(later_p.dvalue) + first_row * v_dim * Team::kSize;
#pragma unroll
  for (int j = 0; j < kKeys; ++j) {
    const float gradient = OfKey(dp[j / kEach], j % kEach), weight = OfKey(s[j / kEach], j % kEach);
    Team::Add(gradient, keys[j], dquery);
    if (j >= written_keys) continue;
    Team::Store(dkey + j * dkey_bytes, dim, gradient, x);
    Team::Store(dvalue + j * dvalue_bytes, v_dim, weight, dx);
  }
  if (!is_there) return;
  if (sees) Team::Store(QueryGradient<Team>(later_p, seq, 0, head), dim, 1.0f, dquery);
  if (seq.query.room > 1 || !sees || num_keys < seq.kv.room || later_p.dbias != nullptr) {
    ClearUnseen<Team>(FreshParameter(p), FreshParameter<SmallSeqBackwardParams>(w), seq, head,
                      num_keys);
  }
}

// Any number of rows and keys. The first pass over the rows finds the weights, their gradients, and
// those of the queries; the others sum the gradients of a few keys and values over the rows.
// Weights stay in shared memory, or, where a head has too many, are found again in each pass.
template <typename Team>
class RowGradients {
 public:
  JAX_ATTN_DEVICE RowGradients(const SmallSeqBackwardParams& p, const SmallSeqWork& w,
                               float* memory, const Sequence& seq, int head)
      : p_(p),
        seq_(seq),
        rows_(w, seq, head),
        dim_(FreshOfLane(static_cast<int>(p.head_dim))),
        v_dim_(FreshOfLane(static_cast<int>(p.v_head_dim))),
        key_bytes_(FreshOfLane(p.num_kv_heads * dim_ * Team::kSize)),
        value_bytes_(FreshOfLane(p.num_kv_heads * v_dim_ * Team::kSize)),
        key_(HeadOf<Team>(p.key, seq.at.key + seq.KeyIn(p, 0, head) * dim_)),
        value_(HeadOf<Team>(p.value, seq.at.value + seq.KeyIn(p, 0, head) * v_dim_)),
        stored_(FreshOfLane(static_cast<int>(w.keeps_weights))),
        stride_(FreshOfLane(w.padded_keys)),
        slopes_(memory),
        weights_(reinterpret_cast<float2*>(memory + w.padded_keys)) {}

  JAX_ATTN_DEVICE void Run(int head) {
    const int num_keys = FreshOfLane(seq_.num_keys);
#pragma unroll 1
    for (int pass = -kSummed; Any(pass < num_keys); pass += kSummed) {
      float dkey[kSummed][Team::kElements], dvalue[kSummed][Team::kElements];
#pragma unroll
      for (int i = 0; i < kSummed; ++i) {
        Team::Clear(dkey[i]);
        Team::Clear(dvalue[i]);
      }
#pragma unroll 1
      for (int r = 0; Any(r < rows_.count); ++r) {
        const SmallSeqBackwardParams& p = FreshParameter(p_);
        const auto [t, query_head] = rows_.At(r);
        const bool wanted = r < rows_.count;
        float x[Team::kElements], dx[Team::kElements];
        const int64_t row = seq_.QueryIn(p, t, query_head);
        Team::Unpack(Team::Load(HeadOf<Team>(p.query, seq_.at.query + row * dim_), dim_, wanted),
                     x);
        Team::Unpack(Team::Load(HeadOf<Team>(p.dout, seq_.at.dout + row * v_dim_), v_dim_, wanted),
                     dx);
        float2* weights = weights_ + (stored_ && wanted ? r * stride_ : 0);
        if (pass < 0 || !stored_) FindWeights(t, query_head, wanted, pass < 0, x, dx, weights);
        if (pass < 0) continue;
#pragma unroll
        for (int i = 0; i < kSummed; ++i) {
          // Teams that have fewer rows or keys read what is not theirs.
          const bool is_own = wanted && pass + i < num_keys;
          const float2 own = is_own ? weights[pass + i] : float2{0, 0};
#pragma unroll
          for (int e = 0; e < Team::kElements; ++e) {
            dvalue[i][e] += own.x * dx[e];
            dkey[i][e] += own.y * x[e];
          }
        }
      }
      WaveFence();
      if (pass < 0) continue;
#pragma unroll
      for (int i = 0; i < kSummed; ++i) {
        if (pass + i >= num_keys) continue;
        const SmallSeqBackwardParams& p = FreshParameter(p_);
        const int64_t row = seq_.KeyRow(p, pass + i, head);
        Team::Store(static_cast<char*>(p.dkey) + row * dim_ * Team::kSize, dim_, 1.0f, dkey[i]);
        Team::Store(static_cast<char*>(p.dvalue) + row * v_dim_ * Team::kSize, v_dim_, 1.0f,
                    dvalue[i]);
      }
    }
  }

 private:
  // Keys whose gradients are summed in one pass.
  static constexpr int kSummed =
      (kManyRegisters ? 32 : 16) / (Team::kElements < 8 ? 8 : Team::kElements);
  // Whether products with keys are found before values are loaded: both would take more than 256
  // registers.
  static constexpr bool kKeysFirst = Team::kPieces > 2;

  // Fills in the weights of a row and the gradients of its products with the keys.
  JAX_ATTN_DEVICE void FindWeights(int t, int head, bool wanted, bool writes, const float* x,
                                   const float* dx, float2* weights) {
    const RowLogits row(p_, seq_, t, head);
    const int num_keys = seq_.num_keys, own = Lane() % kChunk;
    const float lse = wanted ? p_.lse.data[seq_.at.lse + seq_.QueryIn(p_, t, head)] : -kInfinity;
    float mean = 0;
    WaveFence();  // the weights of the row before have been read
    const char *key = key_, *value = value_;
#pragma unroll 1
    for (int j = 0; Any(j < num_keys); j += kChunk) {
      float products[kChunk], dproducts[kChunk];
      typename Team::Part parts[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i, key += key_bytes_) {
        parts[i] = Team::Load(key, dim_, j + i < num_keys);
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        products[i] = Team::Multiply(x, parts[i]);
        if constexpr (kKeysFirst) products[i] = FreshOfLane(products[i]);
        KeepOrder();
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i, value += value_bytes_) {
        parts[i] = Team::Load(value, v_dim_, j + i < num_keys);
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        dproducts[i] = Team::Multiply(dx, parts[i]);
        KeepOrder();
      }
      const float product = Team::SumOverTeam(products), dproduct = Team::SumOverTeam(dproducts);
      if (!wanted || !row.Sees(j + own)) continue;
      float slope;
      const float logit = row.Of(FreshParameter(p_), product, j + own, slope);
      const float weight = lse == -kInfinity ? 0.0f : Exp2((logit - lse) * kLog2OfE);
      mean += weight * dproduct;
      if (Team::LaneOfTeam() < kChunk) {
        weights[j + own] = {weight, dproduct};
        slopes_[j + own] = slope;
      }
    }
    mean = SumOfChunk(mean);
    const SmallSeqBackwardParams& p = FreshParameter(p_);
    if (wanted && p.dlse.data != nullptr) {
      mean -= p.dlse.data[seq_.at.dlse + seq_.QueryIn(p, t, head)];
    }
    WaveFence();

    float dquery[Team::kElements];
    Team::Clear(dquery);
    key = key_;
    const int64_t logits = (int64_t{seq_.batch_index} * p.num_q_heads + head) * p.max_q_len + t;
#pragma unroll 1
    for (int j = 0; Any(j < num_keys); j += kChunk) {
      float gradients[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i, key += key_bytes_) {
        const bool sees = wanted && row.Sees(FreshOfLane(j) + i);
        const float2 both = sees ? weights[j + i] : float2{0, 0};
        const float gradient = sees ? both.x * (both.y - mean) : 0.0f;
        gradients[i] = sees ? gradient * slopes_[j + i] * p.scale : 0.0f;
        if (!writes) continue;
        if (wanted && p.dbias != nullptr && Team::LaneOfTeam() == i && j + i < p.max_kv_len) {
          p.dbias[logits * p.max_kv_len + j + i] = gradient;
        }
        Team::Add(gradients[i], Team::Load(key, dim_, j + i < num_keys), dquery);
      }
      WaveFence();  // all lanes have read them
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (wanted && Team::LaneOfTeam() == i && j + i < num_keys) {
          weights[j + i] = {row.Sees(j + i) ? weights[j + i].x : 0.0f, gradients[i]};
        }
      }
    }
    WaveFence();
    if (!writes || !wanted) return;
    Team::Store(QueryGradient<Team>(p, seq_, t, head), dim_, 1.0f, dquery);
    if (p.dbias == nullptr) return;
    for (int j = FreshOfLane(num_keys) + Team::LaneOfTeam(); j < p.max_kv_len; j += Team::kLanes) {
      p.dbias[logits * p.max_kv_len + j] = 0;
    }
  }

  const SmallSeqBackwardParams& p_;
  const Sequence& seq_;
  const RowsOfHead rows_;
  const int dim_, v_dim_;
  const int64_t key_bytes_, value_bytes_;
  const char* const key_;
  const char* const value_;
  const int stored_;
  const int stride_;
  float* const slopes_;    // of the row at hand
  float2* const weights_;  // and the gradients of the products that they were made of
};

// `kKeys`: at most, and one row; 0: any number of both.
template <typename Team, int kKeys>
__global__ void JAX_ATTN_LAUNCH_BOUNDS(
    kMaxThreads, BlocksPerCore(SmallSeqShape{Team::kLanes, Team::kPieces, kKeys}, true))
    SmallSeqBackward(JAX_ATTN_PARAMETER SmallSeqBackwardParams p,
                     JAX_ATTN_PARAMETER SmallSeqWork w) {
  __shared__ PackedSequences::Shared shared;
  JAX_ATTN_DYNAMIC_SHARED(small_seq_weights);
  const auto visit = [&](const SmallSeqBackwardParams& p, const SmallSeqWork& w,
                         const Sequence& seq, int head, bool is_there, auto meanwhile) {
    if constexpr (kKeys > 0) {
      DifferentiateOneRow<Team, kKeys>(p, w, seq, head, is_there);
    } else {
      const int team = static_cast<int>(threadIdx.x) / Team::kLanes;
      float* memory = reinterpret_cast<float*>(small_seq_weights) + team * w.floats_per_team;
      RowGradients<Team>(p, w, memory, seq, head).Run(head);
      if (is_there) ClearUnseen<Team>(p, w, seq, head, seq.num_keys);
    }
    meanwhile();
  };
  const PackedSequences packed(p, w, shared);
  ForEachHead<Team::kLanes>(p, w, packed, p.packed(), 0, visit);
  if (p.packed())
    ClearUnusedGradients<Team::kDType>(FreshParameter(p), packed.Fresh<SmallSeqBackwardParams>());
}

// Kernels for SmallSeqKernelOf. One row needs registers for all keys, of which some AMD GPUs have
// but 256.
struct BackwardKernels {
  static constexpr int kMaxPieces = kManyRegisters ? 32 : 12;
  template <typename Team, int kKeys>
  static const void* Of() {
    return KernelAddress(SmallSeqBackward<Team, kKeys>);
  }
};

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SMALL_SEQ_BACKWARD_H_
