// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Vectors of the width that the current translation unit is compiled for, in the compilers' own
// vector types. The files that include this are compiled once per instruction set, so everything
// lives in a namespace of that set, and nothing from the standard library is instantiated here:
// the linker could otherwise pick a copy with instructions that the machine lacks.

#ifndef JAX_ATTN_CSRC_CPU_SIMD_H_
#define JAX_ATTN_CSRC_CPU_SIMD_H_

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "../dtype.h"

#ifndef JAX_ATTN_TARGET
#error "JAX_ATTN_TARGET must name the instruction set, see CMakeLists.txt"
#endif

namespace jax_attn::cpu::JAX_ATTN_TARGET {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
inline constexpr bool kManyRegisters = true;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
inline constexpr bool kManyRegisters = false;
#elif defined(JAX_ATTN_EMULATE_TILES)
inline constexpr int kLanes = 16;  // a row of a tile
inline constexpr bool kManyRegisters = false;
#else
inline constexpr int kLanes = 4;
inline constexpr bool kManyRegisters = false;
#endif
// Elements that storage is read in: two vectors.
inline constexpr int kPair = 2 * kLanes;

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));
typedef uint8_t U8 __attribute__((vector_size(kLanes)));
typedef int8_t I8 __attribute__((vector_size(kLanes)));

// Loops over registers: unrolled whole, or the compiler leaves the registers in memory.
#define JAX_ATTN_UNROLL _Pragma("GCC unroll 16")

template <typename V>
inline V LoadAs(const void* from) {
  V v;
  memcpy(&v, from, sizeof(V));
  return v;
}

inline F32 Load(const float* from) { return LoadAs<F32>(from); }
inline void Store(float* to, F32 v) { memcpy(to, &v, sizeof(v)); }
// Keeps v in a register: compilers otherwise load it again for every use as an operand.
inline void Pin(F32& v) {
#if defined(__AVX512F__) && defined(__GNUC__)
  asm("" : "+v"(v));
#elif defined(__AVX2__) && defined(__GNUC__)
  asm("" : "+x"(v));
#else
  (void)v;
#endif
}
inline F32 Broadcast(float x) { return x - F32{}; }
inline F32 Select(I32 mask, F32 a, F32 b) { return mask ? a : b; }
// NaN if either is.
inline F32 Max(F32 a, F32 b) { return Select((a > b) | (a != a), a, b); }
// Whether any lane of a comparison's result is set.
inline bool Any(I32 mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= mask[i];
  return any != 0;
#endif
}
inline F32 AsFloat(U32 bits) { return reinterpret_cast<F32>(bits); }
inline U32 AsBits(F32 v) { return reinterpret_cast<U32>(v); }

// ---- Sums across lanes

// Lanes with bit kDistance clear from x, the others from y. GCC would take one of the slower
// shuffles for some distances.
template <int kDistance, int... kLane>
inline F32 Blend(F32 x, F32 y, std::integer_sequence<int, kLane...>) {
  constexpr unsigned kFromY = ((kLane & kDistance ? 1u << kLane : 0u) | ...);
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(
      _mm512_mask_blend_ps(kFromY, reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(y)));
#elif defined(__AVX2__)
  return reinterpret_cast<F32>(
      _mm256_blend_ps(reinterpret_cast<__m256>(x), reinterpret_cast<__m256>(y), kFromY));
#else
  (void)kFromY;
  return __builtin_shufflevector(x, y, (kLane & kDistance ? kLane + kLanes : kLane)...);
#endif
}

template <int kDistance, int... kLane>
inline F32 Exchange(F32 x, F32 y, std::integer_sequence<int, kLane...> lanes) {
  // Each lane that Blend() takes has its partner, kDistance away in the same source, added.
  const F32 partner =
      __builtin_shufflevector(x, y, ((kLane & kDistance ? kLane + kLanes : kLane) ^ kDistance)...);
  return Blend<kDistance>(x, y, lanes) + partner;
}

template <int kDistance>
inline F32 Exchange(F32 x, F32 y) {
  return Exchange<kDistance>(x, y, std::make_integer_sequence<int, kLanes>());
}

// Returns a vector whose lane i * kLanes / kCount is the sum of the lanes of v[i].
template <int kCount, int kDistance = kLanes / 2>
__attribute__((always_inline)) inline F32 SumLanes(const F32* v) {
  if constexpr (kDistance == 0) {
    return v[0];
  } else if constexpr (kCount == 1) {
    const F32 folded[1] = {Exchange<kDistance>(v[0], v[0])};
    return SumLanes<1, kDistance / 2>(folded);
  } else {
    F32 half[kCount / 2];
    JAX_ATTN_UNROLL
    for (int i = 0; i < kCount / 2; ++i) half[i] = Exchange<kDistance>(v[i], v[i + kCount / 2]);
    return SumLanes<kCount / 2, kDistance / 2>(half);
  }
}

inline float Sum(F32 v) { return SumLanes<1>(&v)[0]; }

template <int kDistance, int... kLane>
inline F32 Partners(F32 v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kDistance)...);
}

template <int kDistance = kLanes / 2>
inline float MaxLane(F32 v) {
  if constexpr (kDistance == 0) {
    return v[0];
  } else {
    const F32 partners = Partners<kDistance>(v, std::make_integer_sequence<int, kLanes>());
    return MaxLane<kDistance / 2>(Max(v, partners));
  }
}

// ---- Functions

// 2^x for x <= 0, at most 2 units in the last place off; 0 below the normal range (x < -126) and
// for -inf; NaN for NaN. 2^f on [-0.5, 0.5] is a polynomial of degree 6 fitted to it (the Taylor
// terms of exp, economised), relative error 3e-9 before rounding.
inline F32 Exp2(F32 x) {
  const F32 shifter = Broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F32 in_range = Select(x < -126.0f, Broadcast(-126.0f), x);
  const F32 shifted = in_range + shifter;
  const F32 f = in_range - (shifted - shifter);
  F32 p = Broadcast(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  // The integer sits in the low bits of `shifted`; as an exponent it scales p. Multiplying,
  // rather than adding exponents, keeps NaN.
  const U32 exponent = (AsBits(shifted) - AsBits(shifter) + 127u) << 23;
  return Select(x < -126.0f, F32{}, p * AsFloat(exponent));
}

inline float Exp2(float x) { return Exp2(Broadcast(x))[0]; }

// tanh, relative error below 3e-7. The exponential form cancels near 0, so a polynomial in x^2
// takes over there.
inline F32 Tanh(F32 x) {
  const F32 magnitude = AsFloat(AsBits(x) & 0x7fffffffu);
  const F32 e = Exp2(magnitude * -2.885390081777927f);  // e^(-2|x|)
  const F32 large = (1.0f - e) / (1.0f + e);
  const F32 z = magnitude * magnitude;
  F32 p = Broadcast(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const F32 small = magnitude + magnitude * z * p;
  const F32 result = Select(magnitude < 0.625f, small, large);
  return AsFloat(AsBits(result) | (AsBits(x) & 0x80000000u));
}

// ---- Storage: how elements become pairs of float vectors

// A binary format of less than 16 bits below the sign, decoded with integer arithmetic so that
// flushed denormals of the host do not matter. kInfinities: the top exponent holds inf and NaN,
// as in IEEE; otherwise kNan is the one NaN (sign included only for the fnuz formats).
template <int kExponentBits, int kMantissaBits, int kBias>
inline F32 DecodeFinite(U32 bits) {
  const U32 sign = (bits >> (kExponentBits + kMantissaBits)) << 31;
  const U32 magnitude = bits & ((1u << (kExponentBits + kMantissaBits)) - 1);
  const F32 normal = AsFloat((magnitude << (23 - kMantissaBits)) + ((127u - kBias) << 23));
  constexpr int kSmallest = 1 - kBias - kMantissaBits;  // exponent of the least subnormal
  const F32 smallest = AsFloat(U32{} + (static_cast<uint32_t>(127 + kSmallest) << 23));
  const F32 subnormal = __builtin_convertvector(reinterpret_cast<I32>(magnitude), F32) * smallest;
  const I32 is_subnormal = reinterpret_cast<I32>(magnitude) < (1 << kMantissaBits);
  return AsFloat(AsBits(Select(is_subnormal, subnormal, normal)) | sign);
}

template <int kExponentBits, int kMantissaBits, int kBias>
inline F32 DecodeIeee(U32 bits) {
  const U32 magnitude = bits & ((1u << (kExponentBits + kMantissaBits)) - 1);
  const I32 special =
      reinterpret_cast<I32>(magnitude) >= (((1 << kExponentBits) - 1) << kMantissaBits);
  const U32 sign = (bits >> (kExponentBits + kMantissaBits)) << 31;
  const F32 inf_or_nan = AsFloat((magnitude << (23 - kMantissaBits)) | 0x7f800000u | sign);
  return Select(special, inf_or_nan, DecodeFinite<kExponentBits, kMantissaBits, kBias>(bits));
}

inline F32 QuietNan() { return AsFloat(U32{} + 0x7fc00000u); }

// Replaces every NaN by one that stays a NaN when it is rounded to fewer bits, as do those that
// operations with it result in, and those of 16-bit formats.
inline F32 Quiet(F32 v) { return Select(v != v, QuietNan(), v); }

// Each Storage reads kPair elements into two vectors. `kInterleaved`: the vectors hold the even
// and the odd elements, else the first and the second half.
template <DType kDType>
struct Storage;

template <>
struct Storage<DType::kFloat32> {
  using Element = float;
  static constexpr bool kInterleaved = false;
  static void LoadPair(const Element* from, F32& a, F32& b) {
    a = Load(from);
    b = Load(from + kLanes);
  }
};

// A bfloat16 is the upper half of a float32, so a 32-bit word holds an even and an odd element
// that one operation each turns into floats.
template <>
struct Storage<DType::kBFloat16> {
  using Element = uint16_t;
  static constexpr bool kInterleaved = true;
  static void LoadPair(const Element* from, F32& a, F32& b) {
    const U32 words = LoadAs<U32>(from);
    a = AsFloat(words << 16);
    b = AsFloat(words & 0xffff0000u);
  }
};

// kLanes small integers, widened. Compilers do it one by one without being told.
inline U32 Widen(const uint8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<U32>(_mm512_maskz_cvtepu8_epi32(0xffff, LoadAs<__m128i>(from)));
#elif defined(__AVX2__)
  return reinterpret_cast<U32>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(LoadAs<int64_t>(from))));
#else
  return __builtin_convertvector(LoadAs<U8>(from), U32);
#endif
}
inline I32 Widen(const int8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<I32>(_mm512_maskz_cvtepi8_epi32(0xffff, LoadAs<__m128i>(from)));
#elif defined(__AVX2__)
  return reinterpret_cast<I32>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(LoadAs<int64_t>(from))));
#else
  return __builtin_convertvector(LoadAs<I8>(from), I32);
#endif
}
inline U32 Widen(const uint16_t* from) { return __builtin_convertvector(LoadAs<U16>(from), U32); }

template <typename Derived>
struct SequentialStorage {
  static constexpr bool kInterleaved = false;
  template <typename Element>
  static void LoadPair(const Element* from, F32& a, F32& b) {
    a = Derived::Decode(Widen(from));
    b = Derived::Decode(Widen(from + kLanes));
  }
};

#if defined(__F16C__) || defined(__ARM_NEON)
// kLanes float16, by an instruction.
inline F32 HalfToFloat(U16 bits) {
#if defined(__AVX512F__)
  // The unmasked form trips -Wmaybe-uninitialized inside GCC's own header.
  return reinterpret_cast<F32>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return reinterpret_cast<F32>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(bits)));
#else
  return reinterpret_cast<F32>(vcvt_f32_f16(reinterpret_cast<float16x4_t>(bits)));
#endif
}

template <>
struct Storage<DType::kFloat16> {
  using Element = uint16_t;
  static constexpr bool kInterleaved = false;
  static void LoadPair(const Element* from, F32& a, F32& b) {
    a = HalfToFloat(LoadAs<U16>(from));
    b = HalfToFloat(LoadAs<U16>(from + kLanes));
  }
};

// kPair bytes, sign extended.
typedef int16_t I16Pair __attribute__((vector_size(2 * kPair)));
inline I16Pair WidenPair(const int8_t* from) {
#if defined(__AVX512BW__)
  return reinterpret_cast<I16Pair>(_mm512_maskz_cvtepi8_epi16(~0u, LoadAs<__m256i>(from)));
#elif defined(__AVX2__)
  return reinterpret_cast<I16Pair>(_mm256_cvtepi8_epi16(LoadAs<__m128i>(from)));
#else
  return reinterpret_cast<I16Pair>(vmovl_s8(vld1_s8(from)));
#endif
}

// 8-bit floats become float16 of other exponents by shifts, subnormals included, and then floats.
template <typename Derived>
struct Float8Storage {
  using Element = uint8_t;
  static constexpr bool kInterleaved = false;
  static void LoadPair(const Element* from, F32& a, F32& b) {
    const I16Pair bits = Derived::Half(WidenPair(reinterpret_cast<const int8_t*>(from)));
    U16 halves[2];
    memcpy(halves, &bits, sizeof(bits));
    a = HalfToFloat(halves[0]) * Derived::kUnit;
    b = HalfToFloat(halves[1]) * Derived::kUnit;
  }
};

template <>
struct Storage<DType::kFloat8E5M2> : Float8Storage<Storage<DType::kFloat8E5M2>> {
  static constexpr float kUnit = 1;
  static I16Pair Half(I16Pair code) { return code << 8; }
};

// No infinities; 0x7f and 0xff are NaN.
template <>
struct Storage<DType::kFloat8E4M3FN> : Float8Storage<Storage<DType::kFloat8E4M3FN>> {
  static constexpr float kUnit = 256;  // exponents are biased by 7, those of float16 by 15
  static I16Pair Half(I16Pair code) {
    const I16Pair is_nan = (code & 0x7f) == 0x7f;
    return (((code << 7) & static_cast<int16_t>(0xbfff))) | is_nan;
  }
};

// No infinities and no negative zero, whose code 0x80 is the only NaN.
template <>
struct Storage<DType::kFloat8E4M3FNUZ> : Float8Storage<Storage<DType::kFloat8E4M3FNUZ>> {
  static constexpr float kUnit = 128;
  static I16Pair Half(I16Pair code) {
    const I16Pair is_nan = code == -128;
    return ((code << 7) & static_cast<int16_t>(0xbfff)) | is_nan;
  }
};
#else
template <>
struct Storage<DType::kFloat16> : SequentialStorage<Storage<DType::kFloat16>> {
  using Element = uint16_t;
  static F32 Decode(U32 bits) { return DecodeIeee<5, 10, 15>(bits); }
};

template <>
struct Storage<DType::kFloat8E5M2> : SequentialStorage<Storage<DType::kFloat8E5M2>> {
  using Element = uint8_t;
  static F32 Decode(U32 bits) { return DecodeIeee<5, 2, 15>(bits); }
};

// No infinities; 0x7f and 0xff are NaN.
template <>
struct Storage<DType::kFloat8E4M3FN> : SequentialStorage<Storage<DType::kFloat8E4M3FN>> {
  using Element = uint8_t;
  static F32 Decode(U32 bits) {
    return Select(reinterpret_cast<I32>((bits & 0x7fu) == 0x7fu), QuietNan(),
                  DecodeFinite<4, 3, 7>(bits));
  }
};

// No infinities and no negative zero, whose code 0x80 is the only NaN.
template <>
struct Storage<DType::kFloat8E4M3FNUZ> : SequentialStorage<Storage<DType::kFloat8E4M3FNUZ>> {
  using Element = uint8_t;
  static F32 Decode(U32 bits) {
    return Select(reinterpret_cast<I32>(bits == 0x80u), QuietNan(), DecodeFinite<4, 3, 8>(bits));
  }
};
#endif

template <>
struct Storage<DType::kInt8> : SequentialStorage<Storage<DType::kInt8>> {
  using Element = int8_t;
  static F32 Decode(I32 v) { return __builtin_convertvector(v, F32); }
};

// The last, partial pair of a row: elements past its end read as 0.
template <typename S>
inline void LoadPartialPair(const typename S::Element* from, int count, F32& a, F32& b) {
  typename S::Element padded[kPair] = {};
  memcpy(padded, from, count * sizeof(padded[0]));
  S::LoadPair(padded, a, b);
}

// ---- Results: how pairs of float vectors become elements

// Writes a whole vector past the caches, if the set can; `to` is aligned to the vector. Worth it
// for results that are larger than the caches: an ordinary store first reads what it overwrites.
template <typename V>
inline void StoreAround(void* to, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    return _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<__m512i>(v));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<__m256i>(v));
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(to), reinterpret_cast<__m128i>(v));
  }
#endif
  memcpy(to, &v, sizeof(v));
}

// Makes what StoreAround wrote visible to a thread that is told of it by an atomic.
inline void FenceStores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <bool kAround, typename V>
inline void StoreVector(void* to, V v) {
  if constexpr (kAround) {
    StoreAround(to, v);
  } else {
    memcpy(to, &v, sizeof(v));
  }
}

// The bits of bfloat16 in the upper half of each word, rounded to nearest even; the lower half is
// rubbish. Makes a number of a NaN with all upper bits set and some lower ones: see Quiet.
inline U32 RoundToBFloat16(F32 v) {
  const U32 bits = AsBits(v);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

#if !defined(__F16C__)
// The bits of float16, rounded to nearest even: ToFloat16 of math/convert.h.
inline U32 RoundToFloat16(F32 v) {
  const U32 bits = AsBits(v);
  const U32 sign = (bits >> 16) & 0x8000u;
  const F32 magnitude = AsFloat(bits & 0x7fffffffu);
  const U32 m = AsBits(magnitude);
  // Below 2^-14 a float16 counts in steps of 2^-24: adding 0.5 puts that step in the last bit.
  const U32 small = AsBits(magnitude + 0.5f) - 0x3f000000u;
  const U32 normal = (m + 0xfffu + ((m >> 13) & 1u) - (112u << 23)) >> 13;
  F32 result = Select(magnitude < 6.103515625e-5f, AsFloat(small), AsFloat(normal));
  result = Select(magnitude >= 65520.0f, AsFloat(U32{} + 0x7c00u), result);
  result = Select(v != v, AsFloat(U32{} + 0x7e00u), result);
  return AsBits(result) | sign;
}
#endif

// Writes kPair elements from two vectors as LoadPair orders them.
template <DType kDType, bool kAround>
inline void StorePair(void* to, F32 a, F32 b) {
  static_assert(kDType == DType::kFloat32 || kDType == DType::kBFloat16 ||
                kDType == DType::kFloat16);
  if constexpr (kDType == DType::kFloat32) {
    StoreVector<kAround>(to, a);
    StoreVector<kAround>(static_cast<float*>(to) + kLanes, b);
  } else if constexpr (kDType == DType::kBFloat16) {
    StoreVector<kAround>(to, (RoundToBFloat16(a) >> 16) | (RoundToBFloat16(b) & 0xffff0000u));
  } else {
    uint16_t* second = static_cast<uint16_t*>(to) + kLanes;
#if defined(__AVX512F__)
    StoreVector<kAround>(to, _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(a), 0));
    StoreVector<kAround>(second, _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(b), 0));
#elif defined(__F16C__)
    StoreVector<kAround>(to, _mm256_cvtps_ph(reinterpret_cast<__m256>(a), 0));
    StoreVector<kAround>(second, _mm256_cvtps_ph(reinterpret_cast<__m256>(b), 0));
#else
    StoreVector<kAround>(to, __builtin_convertvector(RoundToFloat16(a), U16));
    StoreVector<kAround>(second, __builtin_convertvector(RoundToFloat16(b), U16));
#endif
  }
}

// Writes the first `count` of kPair elements.
template <DType kDType>
inline void StorePartialPair(void* to, int count, F32 a, F32 b) {
  char elements[kPair * sizeof(float)];
  StorePair<kDType, false>(elements, a, b);
  memcpy(to, elements, count * SizeOf(kDType));
}

template <int... kElement>
inline void Interleave(F32& a, F32& b, std::integer_sequence<int, kElement...>) {
  const F32 x = a, y = b;
  a = __builtin_shufflevector(x, y, (kElement / 2 + kElement % 2 * kLanes)...);
  b = __builtin_shufflevector(x, y, ((kElement + kLanes) / 2 + kElement % 2 * kLanes)...);
}

template <int... kElement>
inline void Deinterleave(F32& a, F32& b, std::integer_sequence<int, kElement...>) {
  const F32 x = a, y = b;
  a = __builtin_shufflevector(x, y, (2 * kElement)...);
  b = __builtin_shufflevector(x, y, (2 * kElement + 1)...);
}

// Brings a pair of vectors from the order in which a Storage loads them to that of the elements.
template <typename S>
inline void ToElementOrder(F32& a, F32& b) {
  if (S::kInterleaved) Interleave(a, b, std::make_integer_sequence<int, kLanes>());
}

template <typename S>
inline void ToStorageOrder(F32& a, F32& b) {
  if (S::kInterleaved) Deinterleave(a, b, std::make_integer_sequence<int, kLanes>());
}

}  // namespace jax_attn::cpu::JAX_ATTN_TARGET

#endif  // JAX_ATTN_CSRC_CPU_SIMD_H_
