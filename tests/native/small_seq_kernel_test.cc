// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The kernels of short sequences against attention in double precision, without JAX: for processors
// that are at hand only in an emulator. See .ci/aarch64.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/instruction_sets.h"
#include "../../csrc/cpu/small_seq_attention.h"
#include "../../csrc/math/convert.h"

namespace {

using namespace jax_attn;       // NOLINT
using namespace jax_attn::cpu;  // NOLINT

class ThisThread final : public Executor {
 public:
  int64_t num_threads() const override { return 1; }
  void Schedule(std::function<void()>) override {}
};

// An array in its dtype, in memory aligned to cache lines.
class Array {
 public:
  Array(DType dtype, int64_t size)
      : dtype_(dtype), size_(size), bytes_((size + 16) * 4 + 64, char(0xff)) {}
  void* data() {
    const auto address = reinterpret_cast<uintptr_t>(bytes_.data());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }
  double Get(int64_t i) {
    if (dtype_ == DType::kFloat32) return static_cast<float*>(data())[i];
    const uint16_t bits = static_cast<uint16_t*>(data())[i];
    return dtype_ == DType::kBFloat16 ? FromBFloat16(bits) : FromFloat16(bits);
  }
  void Set(int64_t i, float value) {
    if (dtype_ == DType::kFloat32) {
      static_cast<float*>(data())[i] = value;
    } else {
      static_cast<uint16_t*>(data())[i] =
          dtype_ == DType::kBFloat16 ? ToBFloat16(value) : ToFloat16(value);
    }
  }
  void FillNormal(std::mt19937& rng) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < size_; ++i) Set(i, normal(rng));
  }
  int64_t size() const { return size_; }

 private:
  DType dtype_;
  int64_t size_;
  std::vector<char> bytes_;
};

struct Case {
  DType dtype;
  int64_t b, t, s, n, k, h, hv;
  Causal causal = Causal::kNone;
  float cap = 0;
  bool bias = false;
  bool lengths = false;
};

// A number and the sum of the absolute values that it is made of.
struct Sum {
  double value = 0, size = 0;
  void Add(double x, double magnitude) {
    value += x;
    size += std::abs(magnitude);
  }
};

int failures = 0;

void Compare(const char* what, const std::string& variant, Array& actual,
             const std::vector<Sum>& expected, DType dtype) {
  const double relative = dtype == DType::kFloat32    ? 2e-5
                          : dtype == DType::kBFloat16 ? 1.0 / 128
                                                      : 1.0 / 1024;
  const double absolute = dtype == DType::kFloat16 ? 6e-8 : 1e-7;
  for (int64_t i = 0; i < actual.size(); ++i) {
    const double bound = expected[i].size == 0 ? 0 : absolute + relative * expected[i].size;
    if (std::abs(actual.Get(i) - expected[i].value) <= bound) continue;
    std::printf("%s, %s, element %ld: got %g, expected %g within %g\n", variant.c_str(), what,
                static_cast<long>(i), actual.Get(i), expected[i].value, bound);
    ++failures;
    return;
  }
}

void Run(const Case& c, const std::string& variant) {
  std::mt19937 rng(c.b * 31 + c.h);
  const int64_t rows = c.b * c.t * c.n, keys = c.b * c.s * c.k, group = c.n / c.k;
  Array q(c.dtype, rows * c.h), k(c.dtype, keys * c.h), v(c.dtype, keys * c.hv);
  Array bias(c.dtype, c.n * c.s), out(c.dtype, rows * c.hv), dout(c.dtype, rows * c.hv);
  Array lse(DType::kFloat32, rows), dlse(DType::kFloat32, rows);
  Array dq(c.dtype, q.size()), dk(c.dtype, k.size()), dv(c.dtype, v.size());
  Array dbias(DType::kFloat32, rows * c.s);
  for (Array* x : {&q, &k, &v, &bias, &dout, &dlse}) x->FillNormal(rng);
  std::vector<int32_t> q_lengths(c.b), kv_lengths(c.b);
  for (int64_t b = 0; b < c.b; ++b) {
    q_lengths[b] = c.lengths ? static_cast<int32_t>(rng() % (c.t + 1)) : c.t;
    kv_lengths[b] = c.lengths ? static_cast<int32_t>(rng() % (c.s + 1)) : c.s;
  }

  SmallSeqProblem p;
  p.batch.num_dims = 1;
  p.batch.sizes[0] = p.batch.count = c.b;
  p.max_q_len = p.query_tokens = c.t;
  p.max_kv_len = p.kv_tokens = c.s;
  p.num_q_heads = c.n;
  p.num_kv_heads = c.k;
  p.head_dim = c.h;
  p.v_head_dim = c.hv;
  p.dtype = c.dtype;
  const auto tokens = [&](Array& x) {
    TokenOperand operand;
    operand.data = x.data();
    operand.batch.strides[0] = x.size() / c.b;
    return operand;
  };
  p.query = tokens(q);
  p.key = tokens(k);
  p.value = tokens(v);
  if (c.bias) {
    p.bias.data = bias.data();
    p.bias.dtype = c.dtype;
    p.bias.head_stride = c.s;
  }
  p.query_lengths.data = q_lengths.data();
  p.kv_lengths.data = kv_lengths.data();
  p.query_lengths.batch.strides[0] = p.kv_lengths.batch.strides[0] = 1;
  p.scale = 0.3f;
  p.causal = c.causal;
  p.logits_soft_cap = c.cap;
  SmallSeqAttentionParams forward;
  static_cast<SmallSeqProblem&>(forward) = p;
  forward.out = out.data();
  forward.lse = static_cast<float*>(lse.data());
  SmallSeqBackwardParams backward;
  static_cast<SmallSeqProblem&>(backward) = p;
  backward.lse.data = forward.lse;
  backward.dlse.data = static_cast<float*>(dlse.data());
  backward.lse.batch.strides[0] = backward.dlse.batch.strides[0] = c.t * c.n;
  backward.dout = tokens(dout);
  backward.dquery = dq.data();
  backward.dkey = dk.data();
  backward.dvalue = dv.data();
  if (c.bias) backward.dbias = static_cast<float*>(dbias.data());
  ThisThread executor;
  std::string error = LaunchSmallSeqAttention(forward, variant, executor);
  if (error.empty()) error = LaunchSmallSeqBackward(backward, variant, executor);
  if (!error.empty()) {
    std::printf("%s: %s\n", variant.c_str(), error.c_str());
    ++failures;
    return;
  }

  std::vector<Sum> e_out(out.size()), e_dq(q.size()), e_dk(k.size()), e_dv(v.size());
  std::vector<Sum> e_dbias(rows * c.s);
  for (int64_t b = 0; b < c.b; ++b) {
    for (int64_t t = 0; t < q_lengths[b]; ++t) {
      for (int64_t n = 0; n < c.n; ++n) {
        const int64_t row = (b * c.t + t) * c.n + n;
        const int64_t end = VisibleEnd(p, q_lengths[b], kv_lengths[b], t);
        const auto key = [&](int64_t j) { return (b * c.s + j) * c.k + n / group; };
        std::vector<double> weight(end), slope(end, 1), dp(end), dp_size(end);
        double total = 0, mean = 0, mean_size = 0;
        for (int64_t j = 0; j < end; ++j) {
          double s = 0;
          for (int64_t i = 0; i < c.h; ++i) s += q.Get(row * c.h + i) * k.Get(key(j) * c.h + i);
          s *= p.scale;
          if (c.cap != 0) {
            slope[j] = 1 - std::pow(std::tanh(s / c.cap), 2);
            s = c.cap * std::tanh(s / c.cap);
          }
          if (c.bias) s += bias.Get(n * c.s + j);
          total += weight[j] = std::exp(s);
        }
        for (int64_t j = 0; j < end; ++j) {
          weight[j] /= total;
          for (int64_t i = 0; i < c.hv; ++i) {
            const double value = v.Get(key(j) * c.hv + i), d = dout.Get(row * c.hv + i);
            e_out[row * c.hv + i].Add(weight[j] * value, weight[j] * value);
            e_dv[key(j) * c.hv + i].Add(weight[j] * d, weight[j] * d);
            dp[j] += value * d;
            dp_size[j] += std::abs(value * d);
          }
          mean += weight[j] * dp[j];
          mean_size += weight[j] * dp_size[j];
        }
        for (int64_t j = 0; j < end; ++j) {
          const double ds = weight[j] * (dp[j] - mean + dlse.Get(row));
          const double size = weight[j] * (dp_size[j] + mean_size + std::abs(dlse.Get(row)));
          e_dbias[((b * c.n + n) * c.t + t) * c.s + j].Add(ds, size);
          for (int64_t i = 0; i < c.h; ++i) {
            const double scale = slope[j] * p.scale;
            const double key_i = k.Get(key(j) * c.h + i), query_i = q.Get(row * c.h + i);
            e_dq[row * c.h + i].Add(ds * scale * key_i, size * p.scale * key_i);
            e_dk[key(j) * c.h + i].Add(ds * scale * query_i, size * p.scale * query_i);
          }
        }
        if (end != 0 && !(std::abs(lse.Get(row) - std::log(total)) < 1e-4)) {
          std::printf("%s, lse: got %g, expected %g\n", variant.c_str(), lse.Get(row),
                      std::log(total));
          ++failures;
        }
      }
    }
  }
  Compare("out", variant, out, e_out, c.dtype);
  Compare("dquery", variant, dq, e_dq, c.dtype);
  Compare("dkey", variant, dk, e_dk, c.dtype);
  Compare("dvalue", variant, dv, e_dv, c.dtype);
  if (c.bias) Compare("dbias", variant, dbias, e_dbias, DType::kFloat32);
}

}  // namespace

int main() {
  std::vector<std::string> variants;
#define JAX_ATTN_ADD(set) \
  if (CanRun(#set)) variants.push_back(#set);
  JAX_ATTN_FOR_EACH_SET(JAX_ATTN_ADD)
  int count = 0;
  for (const std::string& variant : variants) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const Case& c : {
               Case{dtype, 3, 1, 8, 4, 4, 128, 128},
               Case{dtype, 3, 1, 7, 4, 4, 24, 40},
               Case{dtype, 2, 3, 16, 6, 2, 72, 64, Causal::kBottomRight},
               Case{dtype, 2, 5, 33, 5, 1, 8, 8, Causal::kTopLeft, 2.0f, true},
               Case{dtype, 9, 4, 6, 4, 2, 64, 64, Causal::kBottomRight, 0, true, true},
               Case{dtype, 2, 16, 16, 3, 3, 32, 512, Causal::kNone, 0, false, true},
               // Enough results to go around the caches, in rows of whole cache lines.
               Case{dtype, 80, 1, 16, 16, 16, 128, 128},
               Case{dtype, 80, 2, 16, 16, 16, 128, 128},
           }) {
        Run(c, variant);
        ++count;
      }
    }
    std::printf("%s: done\n", variant.c_str());
  }
  std::printf("%d cases, %d failures\n", count, failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
