// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Matrix instructions, in the one shape that attention over a cache needs: 16 keys (or 16 elements
// of values) by kRows query rows. Scores are K Q^T and outputs V^T P^T, so that few query rows
// waste little, and so that a row's numbers stay in the lanes that hold its maximum and its sum.
//
// `T` is the 16-bit type that is multiplied, `Stored` the type in shared memory: T or 8 bits wide.

#ifndef JAX_ATTN_CSRC_GPU_MATRIX_H_
#define JAX_ATTN_CSRC_GPU_MATRIX_H_

#include <cstdint>

#include "elements.h"
#include "wave.h"

namespace jax_attn::gpu {

inline constexpr int kFragmentKeys = 16;

#if JAX_ATTN_NVIDIA

// mma.m16n8k16. In what follows, `major` is lane / 4 and `minor` lane % 4.
struct Fragments {
  static constexpr int kRows = 8;      // query rows of a fragment
  static constexpr int kElements = 4;  // accumulators of a lane
  static constexpr int kSlots = 2;     // query rows that a lane has accumulators of

  struct A {
    uint32_t words[4];
  };
  struct B {
    uint32_t words[2];
  };

  static JAX_ATTN_DEVICE int SlotOf(int i) { return i % 2; }
  static JAX_ATTN_DEVICE int Row(int lane, int slot) { return lane % 4 * 2 + slot; }
  static JAX_ATTN_DEVICE int Key(int lane, int i) { return lane / 4 + i / 2 * 8; }
  // Which of 16 elements of the values accumulator `i` belongs to.
  template <DType Stored>
  static JAX_ATTN_DEVICE int Element(int lane, int i) {
    // 8-bit values are transposed in pairs: see LoadValues.
    return SizeOf(Stored) == 1 ? lane / 4 * 2 + i / 2 : lane / 4 + i / 2 * 8;
  }
  // Where element `d` of a query goes among 16: next to what LoadKeys puts beside it.
  template <DType Stored>
  static constexpr JAX_ATTN_DEVICE int QueryPosition(int d) {
    return SizeOf(Stored) == 1 ? d % 4 / 2 * 8 + d / 4 * 2 + d % 2 : d;
  }

  template <DType T>
  static JAX_ATTN_DEVICE void MultiplyAdd(const A& a, const B& b, float (&c)[kElements]) {
    if constexpr (T == DType::kBFloat16) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
          "{%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b.words[0]),
            "r"(b.words[1]));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
          "{%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b.words[0]),
            "r"(b.words[1]));
    }
  }

  // Elements 16 * c and on of 16 keys; rows of `tile` are `stride` bytes apart.
  template <DType T, DType Stored>
  static JAX_ATTN_DEVICE A LoadKeys(const char* tile, int stride, int c, int lane) {
    A a;
    const uint32_t row = Address(tile) + (lane % 16) * stride;
    if constexpr (SizeOf(Stored) == 2) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(a.words[0]), "=r"(a.words[1]), "=r"(a.words[2]), "=r"(a.words[3])
                   : "r"(row + c * 32 + lane / 16 * 16)
                   : "memory");
    } else {
      // A lane gets elements 4 * minor to 4 * minor + 3 of keys `major` and `major` + 8.
      uint32_t bytes[2];
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                   : "=r"(bytes[0]), "=r"(bytes[1])
                   : "r"(row + c * 16)
                   : "memory");
      Widen<Stored, T>(bytes[0], a.words[0], a.words[2]);
      Widen<Stored, T>(bytes[1], a.words[1], a.words[3]);
    }
    return a;
  }

  template <DType T>
  static JAX_ATTN_DEVICE B LoadQuery(const char* rows, int stride, int c, int lane) {
    B b;
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(b.words[0]), "=r"(b.words[1])
                 : "r"(Address(rows) + (lane % 8) * stride + c * 32 + lane / 8 % 2 * 16)
                 : "memory");
    return b;
  }

  // Elements 16 * h and on of 16 values, transposed.
  template <DType T, DType Stored>
  static JAX_ATTN_DEVICE A LoadValues(const char* tile, int stride, int h, int lane) {
    A a;
    if constexpr (SizeOf(Stored) == 2) {
      const int key = lane % 8 + lane / 16 * 8;
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(a.words[0]), "=r"(a.words[1]), "=r"(a.words[2]), "=r"(a.words[3])
                   : "r"(Address(tile) + key * stride + h * 32 + lane / 8 % 2 * 16)
                   : "memory");
    } else {
      // Pairs of elements are transposed as one: a lane gets elements 2 * major and the next of
      // keys 2 * minor and the next. The first elements are rows 0 to 7, the second the others.
      uint32_t bytes[2];
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                   : "=r"(bytes[0]), "=r"(bytes[1])
                   : "r"(Address(tile) + (lane % 16) * stride + h * 16)
                   : "memory");
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        WidenAcross<Stored, T>(bytes[i], a.words[2 * i], a.words[2 * i + 1]);
      }
    }
    return a;
  }

  // Weights as they come out of the scores, rounded to T, as a factor.
  template <DType T>
  static JAX_ATTN_DEVICE B FromScores(const float (&weights)[kElements]) {
    B b;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;"
          : "=r"(b.words[i])
          : "r"(Pack<T>(weights[2 * i], weights[2 * i + 1])));
    }
    return b;
  }

  // Over all lanes that have keys of the same row.
  static JAX_ATTN_DEVICE float MaxOverKeys(float x) {
    x = Max(x, ShuffleXor(x, 4));
    x = Max(x, ShuffleXor(x, 8));
    return Max(x, ShuffleXor(x, 16));
  }
  static JAX_ATTN_DEVICE float SumOverKeys(float x) {
    x += ShuffleXor(x, 4);
    x += ShuffleXor(x, 8);
    return x + ShuffleXor(x, 16);
  }

 private:
  static JAX_ATTN_DEVICE uint32_t Address(const char* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  }
};

#else

// MFMA 16x16x16 on gfx9, WMMA 16x16x16 on gfx11 and gfx12. Lane % 16 is a key, an element of the
// values or a query row; lane / 16 a part of the sums, but on gfx11 both halves have all of it.
struct Fragments {
  static constexpr int kRows = 16;
  static constexpr int kElements = 256 / kWave;
  static constexpr int kSlots = 1;
#if defined(__GFX11__)
  static constexpr int kDepth = 16;  // elements of a sum that a lane has
  static JAX_ATTN_DEVICE int First(int) { return 0; }
  static JAX_ATTN_DEVICE int Key(int lane, int i) { return 2 * i + lane / 16; }
#else
  static constexpr int kDepth = 256 / kWave;
  static JAX_ATTN_DEVICE int First(int lane) { return lane / 16 * kDepth; }
  static JAX_ATTN_DEVICE int Key(int lane, int i) { return lane / 16 * kDepth + i; }
#endif

  struct A {
    uint32_t words[kDepth / 2];
  };
  using B = A;

  static JAX_ATTN_DEVICE int SlotOf(int) { return 0; }
  static JAX_ATTN_DEVICE int Row(int lane, int) { return lane % 16; }
  template <DType Stored>
  static JAX_ATTN_DEVICE int Element(int lane, int i) {
    return Key(lane, i);
  }
  template <DType Stored>
  static constexpr JAX_ATTN_DEVICE int QueryPosition(int d) {
    return d;
  }

  template <DType T>
  static JAX_ATTN_DEVICE void MultiplyAdd(const A& a, const B& b, float (&c)[kElements]) {
    using F = float __attribute__((ext_vector_type(kElements)));
    F sum;
#pragma unroll
    for (int i = 0; i < kElements; ++i) sum[i] = c[i];
#if defined(__GFX9__)
    using Short = short __attribute__((ext_vector_type(4)));
    using Half = _Float16 __attribute__((ext_vector_type(4)));
    if constexpr (T == DType::kBFloat16) {
      sum = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(__builtin_bit_cast(Short, a),
                                                      __builtin_bit_cast(Short, b), sum, 0, 0, 0);
    } else {
      sum = __builtin_amdgcn_mfma_f32_16x16x16f16(__builtin_bit_cast(Half, a),
                                                  __builtin_bit_cast(Half, b), sum, 0, 0, 0);
    }
#elif defined(__GFX11__)
    using Short = short __attribute__((ext_vector_type(16)));
    using Half = _Float16 __attribute__((ext_vector_type(16)));
    if constexpr (T == DType::kBFloat16) {
      sum = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(__builtin_bit_cast(Short, a),
                                                        __builtin_bit_cast(Short, b), sum);
    } else {
      sum = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(__builtin_bit_cast(Half, a),
                                                       __builtin_bit_cast(Half, b), sum);
    }
#elif defined(__GFX12__)
    using Short = short __attribute__((ext_vector_type(8)));
    using Half = _Float16 __attribute__((ext_vector_type(8)));
    if constexpr (T == DType::kBFloat16) {
      sum = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(__builtin_bit_cast(Short, a),
                                                              __builtin_bit_cast(Short, b), sum);
    } else {
      sum = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(__builtin_bit_cast(Half, a),
                                                             __builtin_bit_cast(Half, b), sum);
    }
#else  // the host's pass over device code
    (void)a;
    (void)b;
#endif
#pragma unroll
    for (int i = 0; i < kElements; ++i) c[i] = sum[i];
  }

  template <DType T, DType Stored>
  static JAX_ATTN_DEVICE A LoadKeys(const char* tile, int stride, int c, int lane) {
    const char* from =
        tile + lane % 16 * stride + (c * 16 + First(lane)) * static_cast<int>(SizeOf(Stored));
    A a;
    if constexpr (SizeOf(Stored) == 2) {
#pragma unroll
      for (int i = 0; i < kDepth / 2; ++i) {
        a.words[i] = reinterpret_cast<const uint32_t*>(from)[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kDepth / 4; ++i) {
        Widen<Stored, T>(reinterpret_cast<const uint32_t*>(from)[i], a.words[2 * i],
                         a.words[2 * i + 1]);
      }
    }
    return a;
  }

  template <DType T>
  static JAX_ATTN_DEVICE B LoadQuery(const char* rows, int stride, int c, int lane) {
    return LoadKeys<T, T>(rows, stride, c, lane);
  }

  template <DType T, DType Stored>
  static JAX_ATTN_DEVICE A LoadValues(const char* tile, int stride, int h, int lane) {
    A a;
#pragma unroll
    for (int i = 0; i < kDepth; i += 4) {
      const char* from = tile + (First(lane) + i) * stride +
                         (h * 16 + lane % 16) * static_cast<int>(SizeOf(Stored));
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (SizeOf(Stored) == 2) {
          x[j] = *reinterpret_cast<const uint16_t*>(from + j * stride);
        } else {
          x[j] = *reinterpret_cast<const uint8_t*>(from + j * stride);
        }
      }
      if constexpr (SizeOf(Stored) == 2) {
        a.words[i / 2] = x[0] | x[1] << 16;
        a.words[i / 2 + 1] = x[2] | x[3] << 16;
      } else {
        Widen<Stored, T>(x[0] | x[1] << 8 | x[2] << 16 | x[3] << 24, a.words[i / 2],
                         a.words[i / 2 + 1]);
      }
    }
    return a;
  }

  template <DType T>
  static JAX_ATTN_DEVICE B FromScores(const float (&weights)[kElements]) {
    B b;
#if defined(__GFX11__)
    // Each half of the wave has every other key; the other half has those between.
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float other = ShuffleXor(weights[i], 16);
      b.words[i] = Lane() < 16 ? Pack<T>(weights[i], other) : Pack<T>(other, weights[i]);
    }
#else
#pragma unroll
    for (int i = 0; i < kElements / 2; ++i) {
      b.words[i] = Pack<T>(weights[2 * i], weights[2 * i + 1]);
    }
#endif
    return b;
  }

  static JAX_ATTN_DEVICE float MaxOverKeys(float x) {
#pragma unroll
    for (int mask = 16; mask < kWave; mask *= 2) x = Max(x, ShuffleXor(x, mask));
    return x;
  }
  static JAX_ATTN_DEVICE float SumOverKeys(float x) {
#pragma unroll
    for (int mask = 16; mask < kWave; mask *= 2) x += ShuffleXor(x, mask);
    return x;
  }
};

#endif

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_MATRIX_H_
