// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The CPU kernels against attention in double precision, without JAX: for processors that are at
// hand only in an emulator. See .ci/aarch64.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/split_kv_attention.h"
#include "../../csrc/cpu/split_plan.h"
#include "../../csrc/math/convert.h"

namespace {

using namespace jax_attn;       // NOLINT
using namespace jax_attn::cpu;  // NOLINT

class ThisThread final : public Executor {
 public:
  int64_t num_threads() const override { return 1; }
  void Schedule(std::function<void()>) override {}
};

// A value in 2^exponent, or what its code means in a format without infinities.
double Decode(DType dtype, uint32_t code) {
  const auto finite = [&](int mantissa_bits, int bias, int sign_bit) {
    const uint32_t magnitude = code & ((1u << sign_bit) - 1);
    const int exponent = static_cast<int>(magnitude >> mantissa_bits);
    const double mantissa = magnitude & ((1u << mantissa_bits) - 1);
    const double scale = std::ldexp(1.0, -mantissa_bits);
    const double value = exponent == 0 ? std::ldexp(mantissa * scale, 1 - bias)
                                       : std::ldexp(1 + mantissa * scale, exponent - bias);
    return (code >> sign_bit) & 1 ? -value : value;
  };
  switch (dtype) {
    case DType::kFloat32:
      return BitsFloat(code);
    case DType::kBFloat16:
      return BitsFloat(code << 16);
    case DType::kFloat16:
      return finite(10, 15, 15);
    case DType::kInt8:
      return static_cast<int8_t>(code);
    case DType::kFloat8E4M3FN:
      return finite(3, 7, 7);
    case DType::kFloat8E4M3FNUZ:
      return finite(3, 8, 7);
    case DType::kFloat8E5M2:
      return finite(2, 15, 7);
  }
  return 0;
}

struct Random {
  std::mt19937 bits{0};
  double Uniform() { return std::uniform_real_distribution<double>(-1, 1)(bits); }
  int64_t Below(int64_t n) { return static_cast<int64_t>(bits() % n); }
};

// Random elements of moderate size, as bytes and as numbers.
struct Array {
  std::vector<uint8_t> bytes;
  std::vector<double> values;

  Array(DType dtype, int64_t count, Random& random) : bytes(count * SizeOf(dtype)) {
    for (int64_t i = 0; i < count; ++i) {
      uint32_t code = 0;
      switch (dtype) {
        case DType::kFloat32:
          code = FloatBits(static_cast<float>(random.Uniform()));
          break;
        case DType::kBFloat16:
          code = ToBFloat16(static_cast<float>(random.Uniform()));
          break;
        case DType::kFloat16:
          code = ToFloat16(static_cast<float>(random.Uniform()));
          break;
        case DType::kInt8:
          code = static_cast<uint8_t>(random.Below(5) - 2);
          break;
        default:  // codes up to about 2 in each fp8 format, subnormals included
          code = static_cast<uint32_t>(random.Below(dtype == DType::kFloat8E5M2 ? 0x40 : 0x3f)) |
                 (random.Below(2) << 7);
          if (code == 0x80) code = 0;
      }
      std::memcpy(bytes.data() + i * SizeOf(dtype), &code, SizeOf(dtype));
      values.push_back(Decode(dtype, code));
    }
  }
  void SetInfinite(int64_t i) {
    const uint16_t code = 0x7f80;  // of bfloat16
    std::memcpy(bytes.data() + i * sizeof(code), &code, sizeof(code));
    values[i] = INFINITY;
  }
};

// The largest error of a random problem. `infinite`: some values are, which need bfloat16 caches.
double Check(const SplitKvKernels& kernels, DType query_dtype, DType cache_dtype, bool infinite,
             Random& random) {
  // Matrix instructions are for multiples of 32.
  const int64_t head_dims[2][6] = {{8, 16, 40, 64, 72, 128}, {32, 64, 96, 128, 160, 192}};
  const int64_t* const dims = head_dims[random.Below(2)];
  SplitKvAttentionParams p;
  p.batch.num_dims = 1;
  p.batch.sizes[0] = p.batch.count = 1 + random.Below(2);
  p.query_len = 1 + random.Below(4);
  p.num_kv_heads = 1 + random.Below(3);
  p.num_q_heads = p.num_kv_heads * (1 + random.Below(9));
  p.head_dim = dims[random.Below(6)];
  p.v_head_dim = dims[random.Below(6)];
  p.kv_len = 1 + random.Below(150);
  p.scale = 1 / std::sqrt(static_cast<float>(p.head_dim));
  if (!infinite) p.causal = static_cast<Causal>(random.Below(3));
  if (!infinite) p.sliding_window = random.Below(2) * (1 + random.Below(60));
  p.logits_soft_cap = random.Below(2) * 1.5f;
  p.num_splits = random.Below(4);

  const int64_t b_size = p.batch.count, t_size = p.query_len, n_size = p.num_q_heads;
  const int64_t k_size = p.num_kv_heads, s_size = p.kv_len, h = p.head_dim, hv = p.v_head_dim;
  const Array query(query_dtype, b_size * t_size * n_size * h, random);
  const Array key(cache_dtype, b_size * s_size * k_size * h, random);
  Array value(cache_dtype, b_size * s_size * k_size * hv, random);
  if (infinite) value.SetInfinite(random.Below(b_size * s_size * k_size * hv));
  std::vector<int32_t> lengths;
  for (int64_t b = 0; b < b_size; ++b) lengths.push_back(random.Below(s_size + 1));
  std::vector<float> sinks(n_size);
  for (float& sink : sinks) sink = random.Uniform();

  p.query = query.bytes.data();
  p.query_dtype = query_dtype;
  p.query_batch.strides[0] = t_size * n_size * h;
  p.key = {key.bytes.data(), cache_dtype, {}, 0, 0, k_size * h, h};
  p.value = {value.bytes.data(), cache_dtype, {}, 0, 0, k_size * hv, hv};
  p.key.batch.strides[0] = s_size * k_size * h;
  p.value.batch.strides[0] = s_size * k_size * hv;
  p.kv_lengths.data = lengths.data();
  p.kv_lengths.batch.strides[0] = 1;
  p.sinks.data = sinks.data();
  std::vector<uint8_t> out(b_size * t_size * n_size * hv * SizeOf(query_dtype));
  std::vector<float> lse(b_size * t_size * n_size);
  p.out = out.data();
  p.lse = lse.data();
  std::vector<float> workspace(MakeSplitLayout(p, 1).workspace_size());
  p.workspace = workspace.data();
  p.workspace_size = workspace.size();
  ThisThread executor;
  const std::string error = LaunchSplitKvAttention(p, kernels.name, executor);
  if (!error.empty()) {
    std::printf("%s\n", error.c_str());
    return INFINITY;
  }

  double worst = 0;
  for (int64_t b = 0; b < b_size; ++b) {
    for (int64_t t = 0; t < t_size; ++t) {
      const KeyRange keys = VisibleKeys(p, ContextOf(p, b), t);
      for (int64_t n = 0; n < n_size; ++n) {
        const int64_t kv_head = n / p.group_size(), row = (b * t_size + t) * n_size + n;
        std::vector<double> expected(hv);
        double total = std::exp(static_cast<double>(sinks[n]));
        for (int64_t s = keys.begin; s < keys.end; ++s) {
          double logit = 0;
          const int64_t at = (b * s_size + s) * k_size + kv_head;
          for (int64_t i = 0; i < h; ++i)
            logit += query.values[row * h + i] * key.values[at * h + i];
          logit *= p.scale;
          if (p.logits_soft_cap != 0) {
            logit = p.logits_soft_cap * std::tanh(logit / p.logits_soft_cap);
          }
          const double weight = std::exp(logit);
          total += weight;
          for (int64_t i = 0; i < hv; ++i) expected[i] += weight * value.values[at * hv + i];
        }
        worst = std::fmax(worst, std::fabs(lse[row] - std::log(total)));
        for (int64_t i = 0; i < hv; ++i) {
          uint32_t code = 0;
          std::memcpy(&code, out.data() + (row * hv + i) * SizeOf(query_dtype),
                      SizeOf(query_dtype));
          // Errors in units of what the output's dtype rounds to, about 2 for values near 1.
          const double step = query_dtype == DType::kFloat32    ? 1
                              : query_dtype == DType::kBFloat16 ? std::ldexp(1, 14)
                                                                : std::ldexp(1, 11);
          const double found = Decode(query_dtype, code);
          if (std::isinf(expected[i])) {
            if (found != expected[i]) return INFINITY;
            continue;
          }
          worst = std::fmax(worst, std::fabs(found - expected[i] / total) / step);
          if (std::isnan(found)) return INFINITY;
        }
      }
    }
  }
  return worst;
}

}  // namespace

// Usage: split_kv_kernel_test [VARIANT], which tests one variant, with bfloat16 only.
int main(int argc, char** argv) {
  Random random;
  int failures = 0, tested = 0;
  const std::string only = argc > 1 ? argv[1] : "";
  for (const SplitKvKernels* kernels : AvailableSplitKvKernels()) {
    if (!only.empty() && only != kernels->name) continue;
    for (DType query_dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (DType cache_dtype : kDTypes) {
        const bool bfloat16 = query_dtype == DType::kBFloat16 && cache_dtype == DType::kBFloat16;
        if (!only.empty() && !bfloat16) continue;
        double worst = 0;
        for (int i = 0; i < (bfloat16 ? 80 : 20); ++i) {
          const bool infinite = bfloat16 && i % 8 == 0;
          worst = std::fmax(worst, Check(*kernels, query_dtype, cache_dtype, infinite, random));
        }
        const bool passed = worst < 5e-6;  // some float32 roundings of numbers near 1
        ++tested;
        failures += !passed;
        std::printf("%s %s %s: %.1e%s\n", kernels->name, Name(query_dtype), Name(cache_dtype),
                    worst, passed ? "" : " FAILED");
      }
    }
  }
  return failures != 0 || tested == 0;
}
