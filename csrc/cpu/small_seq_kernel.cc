// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "small_seq_kernel.h"

#include <cstring>
#include <type_traits>

#include "../math/convert.h"
#include "small_seq_products.h"

namespace jax_attn::cpu::JAX_ATTN_TARGET {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = __builtin_inff();

// Bytes of keys that are read, and read again, while they are in a nearby cache.
constexpr int64_t kGroupBytes = 64 * 1024;

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

// Where the tokens of a sequence begin, how many there are, and where the next sequence begins.
struct TokenRange {
  int64_t begin;
  int64_t length;
  int64_t next;
};

TokenRange RangeOf(const SmallSeqProblem& p, const Operand<int32_t>& bounds,
                   const Operand<int32_t>& lengths, int64_t num_tokens, int64_t longest, int64_t i,
                   int64_t begin) {
  TokenRange range{0, longest, longest};
  if (p.packed()) {
    range = {begin, 0, ClippedBound(begin, bounds.At(p.batch, i)[1], num_tokens)};
    range.length = Min(range.next - range.begin, longest);
  }
  if (lengths.data != nullptr) {
    const int64_t length = *lengths.At(p.batch, i);
    range.length = length < 0 ? 0 : Min(length, range.length);
  }
  return range;
}

// One pair of sequences. Queries that see nothing are left out: those before `first_query` and
// from `end_query` on; so are keys that nothing sees, from `num_keys` on.
struct Sequence {
  int64_t batch_index;
  TokenRange query;
  TokenRange kv;
  int64_t first_query;
  int64_t end_query;
  int64_t num_keys;
  int64_t num_rows;       // of a kv head
  int64_t logits_stride;  // floats between rows of logits

  Sequence(const SmallSeqProblem& p, int64_t i, int64_t query_start, int64_t kv_start)
      : batch_index(i),
        query(RangeOf(p, p.query_cu_seqlens, p.query_lengths, p.query_tokens, p.max_q_len, i,
                      query_start)),
        kv(RangeOf(p, p.kv_cu_seqlens, p.kv_lengths, p.kv_tokens, p.max_kv_len, i, kv_start)) {
    end_query = query.length;
    if (p.num_q_heads == 0) end_query = 0;
    num_keys = end_query == 0 ? 0 : VisibleEnd(p, query.length, kv.length, end_query - 1);
    if (num_keys == 0) end_query = 0;
    first_query = 0;
    while (first_query < end_query && VisibleEnd(p, query.length, kv.length, first_query) == 0) {
      ++first_query;
    }
    num_rows = (end_query - first_query) * p.group_size();
    logits_stride = PaddedKeys(num_keys);
  }

  // kv heads whose logits, keys and values fit in the nearest caches together.
  int64_t HeadsAtATime(const SmallSeqProblem& p) const {
    const int64_t by_logits = kLogits / (num_rows * logits_stride);
    const int64_t by_bytes = kGroupBytes / (num_keys * p.head_dim * SizeOf(p.dtype));
    const int64_t heads = Min(Min(by_logits, by_bytes), p.num_kv_heads);
    return heads < 1 ? 1 : heads;
  }
};

// The arrays of a sequence from its first token, or the first query that sees something, on.
template <typename Element>
Element* Tokens(Element* data, const BatchStrides& strides, const SmallSeqProblem& p,
                int64_t batch_index, int64_t elements) {
  return data + strides.Offset(p.batch, batch_index) + elements;
}

// Logits of one row and what became of them.
class RowLogits {
 public:
  RowLogits(const SmallSeqProblem& p, const Sequence& seq, int64_t head, int64_t query) : p_(p) {
    end_ = static_cast<int32_t>(VisibleEnd(p, seq.query.length, seq.kv.length, query));
    if (p.bias.data == nullptr) return;
    const int64_t offset = p.bias.batch.Offset(p.batch, seq.batch_index) +
                           head * p.bias.head_stride + query * p.bias.query_stride;
    bias_ = static_cast<const char*>(p.bias.data) + offset * SizeOf(p.bias.dtype);
  }

  // Keys [first, first + kLanes) of the row that it sees.
  I32 Visible(int64_t first) const {
    I32 lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    return lanes < static_cast<int32_t>(end_ - first);
  }

  // The capped and biased logits of products `s`, and the derivative of the cap.
  F32 Of(F32 s, int64_t first, F32& slope) const {
    s = s * p_.scale;
    slope = Broadcast(1.0f);
    if (p_.logits_soft_cap != 0) {
      const F32 tanh = Tanh(s * (1.0f / p_.logits_soft_cap));
      s = tanh * p_.logits_soft_cap;
      slope = 1.0f - tanh * tanh;
    }
    if (bias_ != nullptr) s += Bias(first);
    return s;
  }

 private:
  F32 Bias(int64_t first) const {
    F32 bias{};
    for (int i = 0; i < kLanes && first + i < end_; ++i) {
      if (p_.bias.dtype == DType::kFloat32) {
        bias[i] = reinterpret_cast<const float*>(bias_)[first + i];
      } else {
        const uint16_t bits = reinterpret_cast<const uint16_t*>(bias_)[first + i];
        bias[i] = p_.bias.dtype == DType::kBFloat16 ? FromBFloat16(bits) : FromFloat16(bits);
      }
    }
    return bias;
  }

  const SmallSeqProblem& p_;
  int32_t end_;
  const char* bias_ = nullptr;
};

// Replaces products by softmax weights, 0 for keys that the row does not see. Returns the lse.
float Softmax(const RowLogits& row, float* s, int64_t num_keys) {
  F32 tops = Broadcast(-kInfinity), slope;
  for (int64_t j = 0; j < num_keys; j += kLanes) {
    const F32 logits = Select(row.Visible(j), row.Of(Load(s + j), j, slope), Broadcast(-kInfinity));
    Store(s + j, logits);
    tops = Max(tops, logits);
  }
  const float top = MaxLane(tops);
  const bool infinite = top == kInfinity || top == -kInfinity;
  F32 sums{};
  for (int64_t j = 0; j < num_keys; j += kLanes) {
    const F32 logits = Load(s + j);
    // Of logits that are all -inf none has weight; if some are inf, they have all of it.
    F32 weights = infinite ? Select(logits == kInfinity, Broadcast(1.0f), F32{})
                           : Exp2((logits - top) * kLog2E);
    weights = Select(row.Visible(j), weights, F32{});
    Store(s + j, weights);
    sums += weights;
  }
  const float total = Sum(sums);
  if (total == 0) return -kInfinity;
  const F32 factor = Broadcast(1.0f / total);
  for (int64_t j = 0; j < num_keys; j += kLanes) Store(s + j, Quiet(Load(s + j) * factor));
  return infinite ? top : top + __builtin_logf(total);
}

// Makes weights of the products of queries and keys, `s`, and gradients of these products from
// those of the weights, `dp`. Writes the gradients of the bias if there are any.
void SoftmaxGradient(const SmallSeqProblem& p, const RowLogits& row, float lse, float dlse,
                     float* s, float* dp, int64_t num_keys, float* dbias) {
  float slopes[kMaxKeys + kLanes];
  F32 sums{};
  for (int64_t j = 0; j < num_keys; j += kLanes) {
    F32 slope;
    const F32 logits = row.Of(Load(s + j), j, slope);
    const F32 weights = lse == -kInfinity ? F32{} : Exp2((logits - lse) * kLog2E);
    // What is not seen is not multiplied either: it may be NaN.
    const I32 visible = row.Visible(j);
    const F32 seen = Select(visible, weights, F32{}),
              gradient = Select(visible, Load(dp + j), F32{});
    Store(s + j, Quiet(seen));
    Store(dp + j, gradient);
    Store(slopes + j, Select(visible, slope, F32{}));
    sums += seen * gradient;
  }
  const float mean = Sum(sums) - dlse;
  for (int64_t j = 0; j < num_keys; j += kLanes) {
    const F32 gradient = Load(s + j) * (Load(dp + j) - mean);
    if (dbias != nullptr) {
      float seen[kLanes];
      Store(seen, Select(row.Visible(j), gradient, F32{}));
      memcpy(dbias + j, seen, Min(kLanes, num_keys - j) * sizeof(float));
    }
    // A mean that is NaN is not that of keys that are not seen.
    const F32 scaled = gradient * Load(slopes + j) * p.scale;
    Store(dp + j, Quiet(Select(row.Visible(j), scaled, F32{})));
  }
}

// Zeroes tokens [begin, end) of `token_bytes` each.
void Clear(void* tokens, int64_t begin, int64_t end, int64_t token_bytes) {
  if (begin < end)
    memset(static_cast<char*>(tokens) + begin * token_bytes, 0, (end - begin) * token_bytes);
}

void ClearLse(float* lse, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) lse[i] = -kInfinity;
}

// ---- Forward

// Where sets have 32 registers, memory is fetched ahead: too little of it is otherwise under way
// while there is computing to do. On an AVX2 processor (AMD, family 25) the same was slower.
constexpr bool kFetchAhead = kManyRegisters;

// Fetches elements into the second-level cache. Inlined by force: GCC drops calls of a function
// that has no effect but a prefetch.
template <typename Element>
__attribute__((always_inline)) inline void Fetch(const Element* elements, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(elements);
  for (int64_t b = 0; b < count * static_cast<int64_t>(sizeof(Element)); b += 64) {
    __builtin_prefetch(bytes + b, 0, 2);
  }
}

template <DType kDType, bool kAround>
void ForwardOne(const SmallSeqAttentionParams& p, const SmallSeqItem& item, const Sequence& seq,
                void* out_tokens, float* lse_tokens) {
  using S = Storage<kDType>;
  using Element = typename S::Element;
  const int64_t n = p.num_q_heads, k = p.num_kv_heads, group = p.group_size();
  const int64_t token_bytes = n * p.v_head_dim * sizeof(Element);
  Clear(out_tokens, 0, seq.first_query, token_bytes);
  Clear(out_tokens, seq.end_query, seq.query.next - seq.query.begin, token_bytes);
  ClearLse(lse_tokens, 0, seq.first_query * n);
  ClearLse(lse_tokens, seq.end_query * n, (seq.query.next - seq.query.begin) * n);
  if (seq.num_rows == 0) return;

  const int64_t first_row = (seq.query.begin + seq.first_query) * n;
  const Element* query = Tokens(static_cast<const Element*>(p.query.data), p.query.batch, p,
                                seq.batch_index, first_row * p.head_dim);
  const Element* key = Tokens(static_cast<const Element*>(p.key.data), p.key.batch, p,
                              seq.batch_index, seq.kv.begin * k * p.head_dim);
  const Element* value = Tokens(static_cast<const Element*>(p.value.data), p.value.batch, p,
                                seq.batch_index, seq.kv.begin * k * p.v_head_dim);
  Element* out = static_cast<Element*>(out_tokens) + seq.first_query * n * p.v_head_dim;
  float* lse = lse_tokens + seq.first_query * n;

  const int64_t stride = seq.logits_stride, heads_at_a_time = seq.HeadsAtATime(p);
  // With all heads at a time, values are one piece of memory, and the next sequence's keys another.
  // Each head fetches its share: of the values during products, of those keys during sums.
  const bool fetch = kFetchAhead && heads_at_a_time == k;
  const Element* next_key = key + (seq.kv.next - seq.kv.begin) * k * p.head_dim;
  for (int64_t first = 0; first < k; first += heads_at_a_time) {
    const int64_t last = Min(first + heads_at_a_time, k);
    for (int64_t j = 0; j < seq.num_keys; j += 8) {
      const int64_t num_keys = Min(8, seq.num_keys - j);
      for (int64_t head = first; head < last; ++head) {
        float* s = item.scratch + (head - first) * seq.num_rows * stride;
        MultiplyAll<S>({query + head * group * p.head_dim, p.head_dim, item.row_offsets},
                       seq.num_rows, {key + head * p.head_dim, p.head_dim, item.key_offsets + j},
                       num_keys, s + j, stride);
        if (fetch) {
          const int64_t share = num_keys * p.v_head_dim;
          Fetch(value + j * k * p.v_head_dim + head * share, share);
        }
      }
    }
    for (int64_t head = first; head < last; ++head) {
      float* s = item.scratch + (head - first) * seq.num_rows * stride;
      for (int64_t r = 0, t = seq.first_query, g = 0; r < seq.num_rows; ++r) {
        const RowLogits row(p, seq, head * group + g, t);
        lse[(t - seq.first_query) * n + head * group + g] =
            Softmax(row, s + r * stride, seq.num_keys);
        if (++g == group) g = 0, ++t;
      }
      SumAll<S, kDType, kAround>(
          {s, stride, 1}, {value + head * p.v_head_dim, p.v_head_dim, item.v_key_offsets},
          seq.num_keys, {out + head * group * p.v_head_dim, p.v_head_dim, item.v_row_offsets}, 0,
          seq.num_rows);
      if (fetch) {
        const int64_t share = seq.num_keys * p.head_dim;
        Fetch(next_key + head * share, share);
      }
    }
  }
}

template <DType kDType, bool kAround>
void Forward(const SmallSeqAttentionParams& p, const SmallSeqItem& item) {
  using Element = typename Storage<kDType>::Element;
  const int64_t sequences = p.num_sequences(), n = p.num_q_heads;
  int64_t query_start = item.query_start, kv_start = item.kv_start;
  for (int64_t i = item.begin; i < item.end; ++i) {
    const Sequence seq(p, i, query_start, kv_start);
    // Of a dense array every sequence is one of the tokens' own dimension.
    const int64_t outer = p.packed() ? i / sequences : i;
    const int64_t row = (outer * p.query_tokens + seq.query.begin) * n;
    ForwardOne<kDType, kAround>(p, item, seq, static_cast<Element*>(p.out) + row * p.v_head_dim,
                                p.lse + row);
    query_start = seq.query.next;
    kv_start = seq.kv.next;
  }
  FenceStores();
}

// ---- Backward

template <DType kDType, bool kAround>
void BackwardOne(const SmallSeqBackwardParams& p, const SmallSeqItem& item, const Sequence& seq,
                 void* dquery_tokens, void* dkey_tokens, void* dvalue_tokens) {
  using S = Storage<kDType>;
  using Element = typename S::Element;
  const int64_t n = p.num_q_heads, k = p.num_kv_heads, group = p.group_size();
  const int64_t size = sizeof(Element);
  const int64_t query_room = seq.query.next - seq.query.begin;
  const int64_t kv_room = seq.kv.next - seq.kv.begin;
  Clear(dquery_tokens, 0, seq.first_query, n * p.head_dim * size);
  Clear(dquery_tokens, seq.end_query, query_room, n * p.head_dim * size);
  Clear(dkey_tokens, seq.num_keys, kv_room, k * p.head_dim * size);
  Clear(dvalue_tokens, seq.num_keys, kv_room, k * p.v_head_dim * size);
  float* dbias = nullptr;
  if (p.dbias != nullptr) {
    const int64_t num_logits = n * p.max_q_len * p.max_kv_len;
    dbias = p.dbias + seq.batch_index * num_logits;
    memset(dbias, 0, num_logits * sizeof(float));
  }
  if (seq.num_rows == 0) return;

  const int64_t first_row = (seq.query.begin + seq.first_query) * n;
  const Element* query = Tokens(static_cast<const Element*>(p.query.data), p.query.batch, p,
                                seq.batch_index, first_row * p.head_dim);
  const Element* dout = Tokens(static_cast<const Element*>(p.dout.data), p.dout.batch, p,
                               seq.batch_index, first_row * p.v_head_dim);
  const float* lse = Tokens(p.lse.data, p.lse.batch, p, seq.batch_index, first_row);
  const float* dlse = p.dlse.data == nullptr
                          ? nullptr
                          : Tokens(p.dlse.data, p.dlse.batch, p, seq.batch_index, first_row);
  const Element* key = Tokens(static_cast<const Element*>(p.key.data), p.key.batch, p,
                              seq.batch_index, seq.kv.begin * k * p.head_dim);
  const Element* value = Tokens(static_cast<const Element*>(p.value.data), p.value.batch, p,
                                seq.batch_index, seq.kv.begin * k * p.v_head_dim);
  Element* dquery = static_cast<Element*>(dquery_tokens) + seq.first_query * n * p.head_dim;
  Element* dkey = static_cast<Element*>(dkey_tokens);
  Element* dvalue = static_cast<Element*>(dvalue_tokens);

  const int64_t stride = seq.logits_stride, heads_at_a_time = seq.HeadsAtATime(p);
  float* const weights = item.scratch;
  float* const gradients = item.scratch + heads_at_a_time * seq.num_rows * stride;
  const auto rows = [&](auto* data, int64_t head) {
    return Rows<std::remove_reference_t<decltype(*data)>>{data + head * group * p.head_dim,
                                                          p.head_dim, item.row_offsets};
  };
  const auto v_rows = [&](auto* data, int64_t head) {
    return Rows<std::remove_reference_t<decltype(*data)>>{data + head * group * p.v_head_dim,
                                                          p.v_head_dim, item.v_row_offsets};
  };
  const auto keys = [&](auto* data, int64_t head, int64_t j) {
    return Rows<std::remove_reference_t<decltype(*data)>>{data + head * p.head_dim, p.head_dim,
                                                          item.key_offsets + j};
  };
  const auto v_keys = [&](auto* data, int64_t head, int64_t j) {
    return Rows<std::remove_reference_t<decltype(*data)>>{data + head * p.v_head_dim, p.v_head_dim,
                                                          item.v_key_offsets + j};
  };
  for (int64_t first = 0; first < k; first += heads_at_a_time) {
    const int64_t last = Min(first + heads_at_a_time, k);
    for (int64_t j = 0; j < seq.num_keys; j += 8) {
      const int64_t count = Min(8, seq.num_keys - j);
      for (int64_t head = first; head < last; ++head) {
        const int64_t offset = (head - first) * seq.num_rows * stride + j;
        MultiplyAll<S>(rows(query, head), seq.num_rows, keys(key, head, j), count, weights + offset,
                       stride);
        MultiplyAll<S>(v_rows(dout, head), seq.num_rows, v_keys(value, head, j), count,
                       gradients + offset, stride);
      }
    }
    for (int64_t head = first; head < last; ++head) {
      const int64_t offset = (head - first) * seq.num_rows * stride;
      for (int64_t r = 0, t = seq.first_query, g = 0; r < seq.num_rows; ++r) {
        const int64_t q_head = head * group + g, at = (t - seq.first_query) * n + q_head;
        const RowLogits row(p, seq, q_head, t);
        float* row_dbias =
            dbias == nullptr ? nullptr : dbias + (q_head * p.max_q_len + t) * p.max_kv_len;
        SoftmaxGradient(p, row, lse[at], dlse == nullptr ? 0.0f : dlse[at],
                        weights + offset + r * stride, gradients + offset + r * stride,
                        seq.num_keys, row_dbias);
        if (++g == group) g = 0, ++t;
      }
      SumAll<S, kDType, kAround>({gradients + offset, stride, 1}, keys(key, head, 0), seq.num_keys,
                                 rows(dquery, head), 0, seq.num_rows);
    }
    // Token by token, as memory has them: all heads of some keys.
    for (int64_t j = 0; j < seq.num_keys; j += 4) {
      const int64_t end = Min(j + 4, seq.num_keys);
      for (int64_t head = first; head < last; ++head) {
        const int64_t offset = (head - first) * seq.num_rows * stride;
        SumAll<S, kDType, kAround>({gradients + offset, 1, stride}, rows(query, head), seq.num_rows,
                                   keys(dkey, head, 0), j, end);
      }
      for (int64_t head = first; head < last; ++head) {
        const int64_t offset = (head - first) * seq.num_rows * stride;
        SumAll<S, kDType, kAround>({weights + offset, 1, stride}, v_rows(dout, head), seq.num_rows,
                                   v_keys(dvalue, head, 0), j, end);
      }
    }
  }
}

template <DType kDType, bool kAround>
void Backward(const SmallSeqBackwardParams& p, const SmallSeqItem& item) {
  using Element = typename Storage<kDType>::Element;
  const int64_t sequences = p.num_sequences();
  int64_t query_start = item.query_start, kv_start = item.kv_start;
  for (int64_t i = item.begin; i < item.end; ++i) {
    const Sequence seq(p, i, query_start, kv_start);
    const int64_t outer = p.packed() ? i / sequences : i;
    const int64_t row = (outer * p.query_tokens + seq.query.begin) * p.num_q_heads;
    const int64_t kv_row = (outer * p.kv_tokens + seq.kv.begin) * p.num_kv_heads;
    BackwardOne<kDType, kAround>(p, item, seq, static_cast<Element*>(p.dquery) + row * p.head_dim,
                                 static_cast<Element*>(p.dkey) + kv_row * p.head_dim,
                                 static_cast<Element*>(p.dvalue) + kv_row * p.v_head_dim);
    query_start = seq.query.next;
    kv_start = seq.kv.next;
  }
  FenceStores();
}

template <bool kAround>
void ForwardOf(const SmallSeqAttentionParams& p, const SmallSeqItem& item) {
  if (p.dtype == DType::kFloat32) return Forward<DType::kFloat32, kAround>(p, item);
  if (p.dtype == DType::kBFloat16) return Forward<DType::kBFloat16, kAround>(p, item);
  Forward<DType::kFloat16, kAround>(p, item);
}

template <bool kAround>
void BackwardOf(const SmallSeqBackwardParams& p, const SmallSeqItem& item) {
  if (p.dtype == DType::kFloat32) return Backward<DType::kFloat32, kAround>(p, item);
  if (p.dtype == DType::kBFloat16) return Backward<DType::kBFloat16, kAround>(p, item);
  Backward<DType::kFloat16, kAround>(p, item);
}

void ForwardKernel(const SmallSeqAttentionParams& p, const SmallSeqItem& item) {
  item.around_caches ? ForwardOf<true>(p, item) : ForwardOf<false>(p, item);
}

void BackwardKernel(const SmallSeqBackwardParams& p, const SmallSeqItem& item) {
  item.around_caches ? BackwardOf<true>(p, item) : BackwardOf<false>(p, item);
}

}  // namespace

// Not inline, and declared again where the sets are chosen among: see small_seq_attention.cc.
extern const SmallSeqKernels kSmallSeqKernels;
#define JAX_ATTN_STRING(x) #x
#define JAX_ATTN_NAME(x) JAX_ATTN_STRING(x)
const SmallSeqKernels kSmallSeqKernels = {JAX_ATTN_NAME(JAX_ATTN_TARGET), ForwardKernel,
                                          BackwardKernel};

}  // namespace jax_attn::cpu::JAX_ATTN_TARGET
