// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// The fused QKV kernels against the same in double precision, without JAX: for processors that are
// at hand only in an emulator, or only without Python.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/fused_qkv_rope_cache.h"
#include "../../csrc/cpu/split_kv_attention.h"
#include "../../csrc/math/convert.h"

namespace {

using namespace jax_attn;       // NOLINT
using namespace jax_attn::cpu;  // NOLINT

class ThisThread final : public Executor {
 public:
  int64_t num_threads() const override { return 1; }
  void Schedule(std::function<void()>) override {}
};

struct Random {
  std::mt19937 bits{0};
  float Uniform() { return std::uniform_real_distribution<float>(-1, 1)(bits); }
  int64_t Below(int64_t n) { return static_cast<int64_t>(bits() % n); }
};

// Exponent bits, mantissa bits, bias and largest number of the formats of 8 bits.
struct Float8 {
  int mantissa_bits, bias;
  double largest;
};
const std::map<DType, Float8> kFloat8 = {{DType::kFloat8E4M3FN, {3, 7, 448}},
                                         {DType::kFloat8E4M3FNUZ, {3, 8, 240}},
                                         {DType::kFloat8E5M2, {2, 15, 57344}}};

double Load(DType dtype, const void* data, int64_t i) {
  const auto* bytes = static_cast<const uint8_t*>(data) + i * SizeOf(dtype);
  uint32_t code = 0;
  std::memcpy(&code, bytes, SizeOf(dtype));
  if (dtype == DType::kFloat32) return BitsFloat(code);
  if (dtype == DType::kBFloat16) return FromBFloat16(static_cast<uint16_t>(code));
  if (dtype == DType::kFloat16) return FromFloat16(static_cast<uint16_t>(code));
  if (dtype == DType::kInt8) return static_cast<int8_t>(code);
  const Float8 format = kFloat8.at(dtype);
  const int exponent = static_cast<int>((code & 0x7f) >> format.mantissa_bits);
  const double mantissa =
      std::ldexp(code & ((1u << format.mantissa_bits) - 1), -format.mantissa_bits);
  const double value = exponent == 0 ? std::ldexp(mantissa, 1 - format.bias)
                                     : std::ldexp(1 + mantissa, exponent - format.bias);
  return code & 0x80 ? -value : value;
}

// The number of `dtype` nearest to x; quantised formats saturate.
double Round(DType dtype, double x) {
  if (dtype == DType::kFloat32) return static_cast<float>(x);
  if (dtype == DType::kBFloat16) return FromBFloat16(ToBFloat16(static_cast<float>(x)));
  if (dtype == DType::kFloat16) return FromFloat16(ToFloat16(static_cast<float>(x)));
  if (dtype == DType::kInt8) return std::fmax(-128, std::fmin(127, std::nearbyint(x)));
  const Float8 format = kFloat8.at(dtype);
  x = std::fmax(-format.largest, std::fmin(format.largest, x));
  int exponent;
  std::frexp(x, &exponent);
  exponent = std::max(exponent - 1, 1 - format.bias) - format.mantissa_bits;
  return std::ldexp(std::nearbyint(std::ldexp(x, -exponent)), exponent);
}

// How far got is from a number that float32 arithmetic takes for x, in steps of `dtype` there.
double Steps(DType dtype, double got, double x) {
  const double float32_error = 4e-6 * std::fmax(std::fabs(x), 1);
  for (double y : {x, x - float32_error, x + float32_error}) {
    if (got == Round(dtype, y)) return 0;
  }
  const double low = Round(dtype, x - float32_error), high = Round(dtype, x + float32_error);
  return got >= low && got <= high ? 0 : std::fabs(got - Round(dtype, x)) / (std::fabs(x) + 1e-3);
}

void Norm(std::vector<double>& x, int64_t over, const std::vector<float>& weight, double epsilon) {
  for (size_t begin = 0; begin < x.size(); begin += over) {
    double sum = 0;
    for (int64_t i = 0; i < over; ++i) sum += x[begin + i] * x[begin + i];
    const double inverse = 1 / std::sqrt(sum / over + epsilon);
    for (int64_t i = 0; i < over; ++i) {
      x[begin + i] *= inverse * weight[(begin + i) % weight.size()];
    }
  }
}

// Solves a random problem; the largest error in steps of the formats.
double Check(const char* variant, DType dtype, DType cache_dtype, Random& random) {
  const int64_t head_dims[] = {8, 16, 40, 64, 96, 128, 256};
  FusedQkvRopeCacheParams p;
  p.dtype = dtype;
  p.num_tokens = 1 + random.Below(9);
  p.num_kv_heads = 1 + random.Below(3);
  p.num_q_heads = p.num_kv_heads * (1 + random.Below(6));
  p.head_dim = head_dims[random.Below(7)];
  p.v_head_dim = head_dims[random.Below(7)];
  p.page_size = 1 + random.Below(5);
  p.num_pages = 4;
  p.gate = static_cast<GateLayout>(random.Below(3));
  p.norm_scope = static_cast<NormScope>(random.Below(3));
  p.epsilon = 1e-3f;
  p.rotary_dim = random.Below(2) * (random.Below(2) ? p.head_dim : p.head_dim / 4 * 2);
  p.interleaved = random.Below(2);
  p.nope_first = random.Below(2);
  p.full_width_table = random.Below(2);
  p.max_positions = 7;
  p.table_width = p.full_width_table ? p.rotary_dim : p.rotary_dim / 2;
  const bool head_major = random.Below(2);
  const int64_t tokens = p.num_tokens, n = p.num_q_heads, k = p.num_kv_heads, h = p.head_dim;
  const int64_t hv = p.v_head_dim, columns = p.columns(), slots_size = p.num_pages * p.page_size;

  std::vector<uint8_t> qkv(tokens * columns * SizeOf(dtype));
  std::vector<double> x(tokens * columns);
  for (int64_t i = 0; i < tokens * columns; ++i) {
    const float value = static_cast<float>(Round(dtype, random.Uniform()));
    const uint32_t code = dtype == DType::kFloat32    ? FloatBits(value)
                          : dtype == DType::kBFloat16 ? ToBFloat16(value)
                                                      : ToFloat16(value);
    std::memcpy(qkv.data() + i * SizeOf(dtype), &code, SizeOf(dtype));
    x[i] = value;
  }
  const auto floats = [&](int64_t size) {
    std::vector<float> values(size);
    for (float& value : values) value = random.Uniform();
    return values;
  };
  const bool all_heads = p.norm_scope == NormScope::kAllHeads;
  const auto cos = floats(7 * p.table_width), sin = floats(7 * p.table_width);
  const auto q_weight = floats(all_heads ? n * h : h), k_weight = floats(all_heads ? k * h : h);
  std::vector<float> scale = {cache_dtype == DType::kInt8 ? 0.01f : 0.3f};
  std::vector<int32_t> slots, positions;
  for (int64_t t = 0; t < tokens; ++t) {
    slots.push_back(static_cast<int32_t>(random.Below(slots_size + 4)) - 2);
    positions.push_back(static_cast<int32_t>(random.Below(9)) - 1);
  }
  p.qkv = qkv.data();
  p.slots_32.data = slots.data();
  p.positions.data = positions.data();
  p.cos.data = cos.data();
  p.sin.data = sin.data();
  if (p.norm_scope != NormScope::kNone) {
    p.q_weight.data = q_weight.data();
    p.k_weight.data = k_weight.data();
  }
  p.k_scale.data = p.v_scale.data = scale.data();
  std::vector<uint8_t> results[4], pages[2], untouched[2];
  int i = 0;
  for (int64_t size : {n * h, n * h, k * h, k * hv})
    results[i++].resize(tokens * size * SizeOf(dtype));
  p.query = results[0].data();
  p.gate_out = p.gate == GateLayout::kNone ? nullptr : results[1].data();
  p.key = results[2].data();
  p.value = results[3].data();
  i = 0;
  for (PagesOperand* operand : {&p.k_pages, &p.v_pages}) {
    const int64_t d = i == 0 ? h : hv;
    pages[i].assign(slots_size * k * d * SizeOf(cache_dtype), 0x11);
    operand->data = pages[i].data();
    operand->source = pages[i].data();
    operand->dtype = cache_dtype;
    operand->batch_stride = slots_size * k * d;
    operand->page_stride = p.page_size * k * d;
    operand->token_stride = head_major ? d : k * d;
    operand->head_stride = head_major ? p.page_size * d : d;
    untouched[i] = pages[i];
    ++i;
  }
  ThisThread executor;
  const std::string error = LaunchFusedQkvRopeCache(p, variant, executor);
  if (!error.empty()) {
    std::printf("%s\n", error.c_str());
    return INFINITY;
  }

  double worst = 0;
  const auto compare = [&](double got, double expected, DType type) {
    const double steps = Steps(type, got, expected);
    worst = steps == steps ? std::fmax(worst, steps) : INFINITY;
  };
  std::map<int64_t, int64_t> last;
  for (int64_t t = 0; t < tokens; ++t) last[slots[t]] = t;
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> part[4];  // query, gate, key, value
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t key_column = c - p.query_columns(), value_column = key_column - k * h;
      const bool in_gate = p.gate == GateLayout::kInterleaved ? c / h % 2 == 1 : c >= n * h;
      const int which = value_column >= 0 ? 3 : key_column >= 0 ? 2 : in_gate ? 1 : 0;
      part[which].push_back(x[t * columns + c]);
    }
    if (p.norm_scope != NormScope::kNone) {
      Norm(part[0], all_heads ? n * h : h, q_weight, p.epsilon);
      Norm(part[2], all_heads ? k * h : h, k_weight, p.epsilon);
    }
    const int64_t row = std::min<int64_t>(std::max(positions[t], 0), 6) * p.table_width;
    const int64_t start = p.nope_first ? h - p.rotary_dim : 0, pairs = p.rotary_dim / 2;
    for (int which : {0, 2}) {
      for (size_t head = 0; head < part[which].size(); head += h) {
        double* const span = part[which].data() + head + start;
        for (int64_t pair = 0; pair < pairs; ++pair) {
          const int64_t a = p.interleaved ? 2 * pair : pair;
          const int64_t b = p.interleaved ? 2 * pair + 1 : pair + pairs;
          const int64_t at_a = row + (p.full_width_table ? a : pair);
          const int64_t at_b = row + (p.full_width_table ? b : pair);
          const double first = span[a], second = span[b];
          span[a] = first * cos[at_a] - second * sin[at_a];
          span[b] = second * cos[at_b] + first * sin[at_b];
        }
      }
    }
    for (int which = 0; which < 4; ++which) {
      const int64_t size = part[which].size();
      for (int64_t c = 0; c < size; ++c) {
        compare(Load(dtype, results[which].data(), t * size + c), part[which][c], dtype);
      }
    }
    if (slots[t] < 0 || slots[t] >= slots_size || last[slots[t]] != t) continue;
    for (int which : {2, 3}) {
      const int64_t d = which == 2 ? h : hv;
      const PagesOperand& operand = which == 2 ? p.k_pages : p.v_pages;
      for (int64_t c = 0; c < k * d; ++c) {
        const int64_t at = slots[t] / p.page_size * operand.page_stride +
                           slots[t] % p.page_size * operand.token_stride +
                           c / d * operand.head_stride + c % d;
        const double returned = Load(dtype, results[which].data(), t * k * d + c);
        const double stored = Load(cache_dtype, pages[which - 2].data(), at);
        const double quotient = static_cast<float>(returned) / scale[0];
        worst = std::fmax(worst, std::fabs(stored - Round(cache_dtype, quotient)));
        std::memset(pages[which - 2].data() + at * SizeOf(cache_dtype), 0x11, SizeOf(cache_dtype));
      }
    }
  }
  return pages[0] == untouched[0] && pages[1] == untouched[1] ? worst : INFINITY;
}

}  // namespace

int main() {
  Random random;
  int failures = 0;
  for (const SplitKvKernels* kernels : AvailableSplitKvKernels()) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (DType cache_dtype : kDTypes) {
        double worst = 0;
        for (int i = 0; i < 60; ++i) {
          worst = std::fmax(worst, Check(kernels->name, dtype, cache_dtype, random));
        }
        failures += worst != 0;
        std::printf("%s %s %s: %s (%.1e)\n", kernels->name, Name(dtype), Name(cache_dtype),
                    worst == 0 ? "right" : "FAILED", worst);
      }
    }
  }
  return failures != 0;
}
