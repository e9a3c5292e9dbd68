// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// Up to 16 rows of a head in the registers of a wave, as matrix instructions take them: loaded
// once, 16 bytes a lane at a time, they are factors of products with other rows and of weighted
// sums. The order of the dimension that is summed is free, so the 16 bytes of a lane need not be
// moved.

#ifndef JAX_ATTN_CSRC_GPU_ROW_TILES_H_
#define JAX_ATTN_CSRC_GPU_ROW_TILES_H_

#include <cstdint>

#include "matrix.h"

namespace jax_attn::gpu {

inline constexpr int kMaxTileThreads = 128;  // of a block

// Whether some numbers of 16 bits, two in each word, are finite: to an exponent of only ones, 1 is
// added.
template <DType kType, int kCount>
JAX_ATTN_DEVICE bool AreFinite(const uint32_t (&words)[kCount]) {
  constexpr uint32_t kExponents = kType == DType::kBFloat16 ? 0x7f807f80 : 0x7c007c00;
  constexpr uint32_t kOnes = kType == DType::kBFloat16 ? 0x00800080 : 0x04000400;
  uint32_t carried = 0;
#pragma unroll
  for (const uint32_t word : words) carried |= (word & kExponents) + kOnes;
  return (carried & 0x80008000) == 0;
}

#if JAX_ATTN_NVIDIA

inline constexpr int kMostTileWaves = 4;  // of a head

// In what follows, `major` is lane / 4 and `minor` lane % 4. A lane has rows `major` and `major` +
// 8 of a tile; of a chunk of 32 elements it has the 8 from 8 * minor on.
inline constexpr int kTileChunk = 32;
inline constexpr int kPieceElements = 8;

JAX_ATTN_DEVICE int RowOfSlot(int half) { return Lane() / 4 + 8 * half; }
// Whether lanes whose numbers differ in this bit have rows of the same `rows` that follow each
// other.
constexpr bool ShareRows(int bit, int rows) { return bit < 4 * rows; }
JAX_ATTN_DEVICE int TileElement(int chunk) {
  return chunk * kTileChunk + Lane() % 4 * kPieceElements;
}

// 8 rows of 8 numbers of 16 bits, two of a row in each lane, transposed.
JAX_ATTN_DEVICE uint32_t TransposeNumbers(uint32_t pair) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

// `kRows`: 8 or 16; `kDim`: elements of a row, a multiple of 32.
template <DType kType, int kRows, int kDim>
struct RowTile {
  static constexpr DType kDType = kType;
  static constexpr int kSlots = kRows / 8;
  static constexpr int kChunks = kDim / kTileChunk;

  // Row i is at row(i); its elements from `dim` on, and rows from `num_rows` on, are zeros.
  template <typename Row>
  JAX_ATTN_DEVICE void Load(Row row, int num_rows, int dim) {
    LoadSlots([&](int half) { return row(RowOfSlot(half)); },
              [&](int half) { return RowOfSlot(half) < num_rows; }, dim);
  }

  // The same with rows found by the lane's slots.
  template <typename Row, typename Wanted>
  JAX_ATTN_DEVICE void LoadSlots(Row row, Wanted is_wanted, int dim) {
#pragma unroll
    for (int half = 0; half < kSlots; ++half) {
      const char* const from = row(half);
      const bool wanted = is_wanted(half);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        SetPiece(half, c, LoadIf<true>(wanted && TileElement(c) < dim, from + TileElement(c) * 2));
      }
    }
  }

  JAX_ATTN_DEVICE void SetPiece(int half, int c, const uint4& x) {
    words[half][c][0] = x.x;
    words[half][c][1] = x.y;
    words[half][c][2] = x.z;
    words[half][c][3] = x.w;
  }

  // Of the lane's part of a chunk.
  JAX_ATTN_DEVICE bool IsFinite(int c) const {
    bool finite = true;
#pragma unroll
    for (int half = 0; half < kSlots; ++half) finite &= AreFinite<kType>(words[half][c]);
    return finite;
  }

  // One chunk, zeros in lanes that do not want it.
  JAX_ATTN_DEVICE RowTile<kType, kRows, kTileChunk> Chunk(int c, bool wanted) const {
    RowTile<kType, kRows, kTileChunk> tile;
#pragma unroll
    for (int half = 0; half < kSlots; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) tile.words[half][0][i] = wanted ? words[half][c][i] : 0;
    }
    return tile;
  }

  uint32_t words[kSlots][kChunks][4];
};

// One number for each query row and key. A lane has rows RowOfSlot(slot), and of each keys Key(i).
template <int kRows, int kKeys>
struct Scores {
  static constexpr int kSlots = kRows / 8;
  static constexpr int kOwnKeys = kKeys / 4;
  static constexpr int kGroups = kKeys / 8;

  JAX_ATTN_DEVICE static int Key(int i) { return i / 2 * 8 + Lane() % 4 * 2 + i % 2; }
  JAX_ATTN_DEVICE float& At(int slot, int i) { return x[i / 2][slot * 2 + i % 2]; }
  JAX_ATTN_DEVICE float At(int slot, int i) const { return x[i / 2][slot * 2 + i % 2]; }

  // Over the keys of a row, of which each lane has found the largest, or the sum, of its own.
  JAX_ATTN_DEVICE static float MaxOverKeys(float y) {
    y = Max(y, ShuffleXor(y, 1));
    return Max(y, ShuffleXor(y, 2));
  }
  JAX_ATTN_DEVICE static float SumOverKeys(float y) {
    y += ShuffleXor(y, 1);
    return y + ShuffleXor(y, 2);
  }

  // Dot products of the rows of both tiles.
  template <DType kType, int kDim>
  JAX_ATTN_DEVICE void Multiply(const RowTile<kType, kRows, kDim>& rows,
                                const RowTile<kType, kKeys, kDim>& keys) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] = 0;
    }
#pragma unroll
    for (int c = 0; c < kDim / kTileChunk; ++c) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t (&low)[4] = rows.words[0][c];
        const uint32_t (&high)[4] = rows.words[kSlots - 1][c];
        const Fragments::A a = {
            {low[i], kSlots > 1 ? high[i] : 0, low[i + 1], kSlots > 1 ? high[i + 1] : 0}};
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          const Fragments::B b = {{keys.words[n][c][i], keys.words[n][c][i + 1]}};
          Fragments::MultiplyAdd<kType>(a, b, x[n]);
        }
      }
    }
  }

  float x[kKeys / 8][4] = {};
};

// Weights of kFrom rows in the sums for kTo rows, rounded to 16 bits.
template <DType kType, int kTo, int kFrom>
struct TileWeights {
  // From scores times `factor`: weights of keys in sums for query rows.
  JAX_ATTN_DEVICE static TileWeights OfKeys(const Scores<kTo, kFrom>& s, float factor) {
    TileWeights w;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        w.a.words[2 * n + half] = 0;
        if (n < kFrom / 8 && half < kTo / 8) {
          const float (&x)[4] = s.x[n < kFrom / 8 ? n : 0];
          w.a.words[2 * n + half] = Pack<kType>(factor * x[2 * half], factor * x[2 * half + 1]);
        }
      }
    }
    return w;
  }

  // The same numbers, as weights of query rows in sums for keys.
  JAX_ATTN_DEVICE TileWeights<kType, kFrom, kTo> Transposed() const {
    TileWeights<kType, kFrom, kTo> w;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        w.a.words[2 * n + half] =
            n < kTo / 8 && half < kFrom / 8 ? TransposeNumbers(a.words[2 * half + n]) : 0;
      }
    }
    return w;
  }

  // Adds up rows of a tile: the lane's elements of chunk `c`, of rows RowOfSlot(half).
  template <int kDim>
  JAX_ATTN_DEVICE void Sum(const RowTile<kType, kFrom, kDim>& tile, int c,
                           float (&sums)[kTo / 8][kPieceElements]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Fragments::B b;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        b.words[n] = n < kFrom / 8 ? TransposeNumbers(tile.words[n < kFrom / 8 ? n : 0][c][i]) : 0;
      }
      float x[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          x[2 * half + e] = half < kTo / 8 ? sums[half < kTo / 8 ? half : 0][2 * i + e] : 0;
        }
      }
      Fragments::MultiplyAdd<kType>(a, b, x);
#pragma unroll
      for (int half = 0; half < kTo / 8; ++half) {
#pragma unroll
        for (int e = 0; e < 2; ++e) sums[half][2 * i + e] = x[2 * half + e];
      }
    }
  }

  Fragments::A a;
};

#else

// A lane has row lane % 16 of a tile, and of a chunk the 8 elements from 8 * (lane / 16) on.
inline constexpr int kMostTileWaves = 2;
inline constexpr int kPieceElements = 8;
inline constexpr int kTileChunk = kWave == 64 ? 32 : 16;

// The lane, from which nothing is computed in front of a loop where a wave of 32 has not the
// registers to keep it.
JAX_ATTN_DEVICE int TileLane() {
  if constexpr (kWave == 64) return Lane();
  return static_cast<int>(FreshOfLane(threadIdx.x) % kWave);
}

JAX_ATTN_DEVICE int RowOfSlot(int) { return Lane() % 16; }
constexpr bool ShareRows(int bit, int rows) { return bit < rows || bit >= 16; }
JAX_ATTN_DEVICE int TileElement(int chunk) {
  return chunk * kTileChunk + TileLane() / 16 * kPieceElements;
}

// Where a wave keeps 16 rows of up to kTileChunk numbers, to read columns of them: there is no
// instruction that transposes.
struct TileScratch {
  static constexpr int kStride = kTileChunk + 4;
  uint32_t rows[16][kStride / 2];

  JAX_ATTN_DEVICE static TileScratch& OfWave() {
    __shared__ TileScratch scratch[kMaxTileThreads / 32];
    return scratch[WaveIndex()];
  }

  // Column `column` of the lane's part of the rows.
  JAX_ATTN_DEVICE Fragments::A Column(int column) const {
    Fragments::A a;
    const int first = Fragments::First(Lane());
#pragma unroll
    for (int i = 0; i < Fragments::kDepth / 2; ++i) {
      const auto of = [&](int row) {
        return static_cast<uint32_t>(
            reinterpret_cast<const uint16_t*>(rows[first + 2 * i + row])[column]);
      };
      a.words[i] = of(0) | of(1) << 16;
    }
    return a;
  }
};

template <DType kType, int kRows, int kDim>
struct RowTile {
  static constexpr DType kDType = kType;
  static constexpr int kSlots = 1;
  static constexpr int kChunks = kDim / kTileChunk;

  template <typename Row>
  JAX_ATTN_DEVICE void Load(Row row, int num_rows, int dim) {
    LoadSlots([&](int slot) { return row(RowOfSlot(slot)); },
              [&](int slot) { return RowOfSlot(slot) < num_rows; }, dim);
  }

  template <typename Row, typename Wanted>
  JAX_ATTN_DEVICE void LoadSlots(Row row, Wanted is_wanted, int dim) {
    const int first = TileElement(0);
    const char* const from = static_cast<const char*>(row(0)) + first * 2;
    const bool wanted = is_wanted(0);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int before = c * kTileChunk;
      const uint4 x = LoadIf(wanted && first < dim - before, from + before * 2);
      words[c][0] = x.x;
      words[c][1] = x.y;
      words[c][2] = x.z;
      words[c][3] = x.w;
    }
  }

  // What matrix instruction `i` takes of a chunk.
  JAX_ATTN_DEVICE Fragments::A Factor(int c, int i) const {
    constexpr int kWords = Fragments::kDepth / 2;
    Fragments::A a;
    if constexpr (kWords == 8) {  // both halves of the wave take all 16 elements
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t other = ShuffleXor(words[c][j], 16);
        a.words[j] = Lane() < 16 ? words[c][j] : other;
        a.words[4 + j] = Lane() < 16 ? other : words[c][j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kWords; ++j) a.words[j] = words[c][i * kWords + j];
    }
    return a;
  }

  JAX_ATTN_DEVICE bool IsFinite(int c) const { return AreFinite<kType>(words[c]); }

  JAX_ATTN_DEVICE RowTile<kType, kRows, kTileChunk> Chunk(int c, bool wanted) const {
    RowTile<kType, kRows, kTileChunk> tile;
#pragma unroll
    for (int i = 0; i < 4; ++i) tile.words[0][i] = wanted ? words[c][i] : 0;
    return tile;
  }

  uint32_t words[kChunks][4];
};

template <int kRows, int kKeys>
struct Scores {
  static constexpr int kSlots = 1;
  static constexpr int kOwnKeys = Fragments::kElements;
  static constexpr int kGroups = kOwnKeys / 4;

  JAX_ATTN_DEVICE static int Key(int i) { return Fragments::Key(Lane(), i); }
  JAX_ATTN_DEVICE float& At(int, int i) { return x[i / 4][i % 4]; }
  JAX_ATTN_DEVICE float At(int, int i) const { return x[i / 4][i % 4]; }
  JAX_ATTN_DEVICE static float MaxOverKeys(float y) { return Fragments::MaxOverKeys(y); }
  JAX_ATTN_DEVICE static float SumOverKeys(float y) { return Fragments::SumOverKeys(y); }

  template <DType kType, int kDim>
  JAX_ATTN_DEVICE void Multiply(const RowTile<kType, kRows, kDim>& rows,
                                const RowTile<kType, kKeys, kDim>& keys) {
    float sums[kOwnKeys] = {};
#pragma unroll
    for (int c = 0; c < kDim / kTileChunk; ++c) {
#pragma unroll
      for (int i = 0; i < (kWave == 64 ? 2 : 1); ++i) {
        Fragments::MultiplyAdd<kType>(keys.Factor(c, i), rows.Factor(c, i), sums);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwnKeys; ++i) At(0, i) = FreshOfLane(sums[i]);  // here, not at its use
  }

  float x[kGroups][4] = {};
};

template <DType kType, int kTo, int kFrom>
struct TileWeights {
  JAX_ATTN_DEVICE static TileWeights OfKeys(const Scores<kTo, kFrom>& s, float factor) {
    float x[Fragments::kElements];
#pragma unroll
    for (int i = 0; i < Fragments::kElements; ++i) x[i] = factor * s.At(0, i);
    return {Fragments::FromScores<kType>(x)};
  }

  JAX_ATTN_DEVICE TileWeights<kType, kFrom, kTo> Transposed() const {
    TileScratch& scratch = TileScratch::OfWave();
    WaveFence();
#pragma unroll
    for (int i = 0; i < Fragments::kDepth / 2; ++i) {
      scratch.rows[Lane() % 16][Fragments::First(Lane()) / 2 + i] = b.words[i];
    }
    WaveFence();
    return {scratch.Column(Lane() % 16)};
  }

  template <int kDim>
  JAX_ATTN_DEVICE void Sum(const RowTile<kType, kFrom, kDim>& tile, int c,
                           float (&sums)[1][kPieceElements]) const {
    TileScratch& scratch = TileScratch::OfWave();
    WaveFence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scratch.rows[Lane() % 16][Lane() / 16 * 4 + i] = tile.words[c][i];
    }
    WaveFence();
    const int m = Lane() % 16;
    constexpr int kResults = Fragments::kElements;
#pragma unroll
    for (int i = 0; i < kPieceElements / kResults; ++i) {
      // The columns whose sums come out as 8 that follow each other in each lane.
      const int column = kWave == 64               ? m / 4 * 8 + i * 4 + m % 4
                         : Fragments::kDepth == 16 ? m % 2 * 8 + m / 2
                                                   : m;
      float x[kResults];
#pragma unroll
      for (int e = 0; e < kResults; ++e) x[e] = sums[0][i * kResults + e];
      Fragments::MultiplyAdd<kType>(scratch.Column(column), b, x);
#pragma unroll
      for (int e = 0; e < kResults; ++e) sums[0][i * kResults + e] = x[e];
    }
  }

  Fragments::B b;
};

#endif

// Tiles that follow each other: the next one is on its way while a wave does one, each lane's part
// to shared memory of its own. AMD's have no such copies: there tiles are loaded when they are
// wanted.
template <typename Tile, int kRoom>
class TileStream {
 public:
  static constexpr int kPieces = Tile::kChunks * Tile::kSlots;
  static constexpr int kThreads = kCopiesThroughRegisters ? 1 : kMaxTileThreads;
  struct Shared {
    uint4 pieces[kCopiesThroughRegisters ? 1 : kRoom][kPieces][kThreads];
  };

  JAX_ATTN_DEVICE explicit TileStream(Shared& shared) : shared_(shared) {}

  // Asks for tile `i`, of which the lane's rows are as in RowTile::LoadSlots. It takes the room of
  // tile i - kRoom.
  template <typename Row, typename Wanted>
  JAX_ATTN_DEVICE void Begin(int i, Row row, Wanted is_wanted, int dim) const {
    if constexpr (!kCopiesThroughRegisters) {
      Copies<16, 1> copies;
#pragma unroll
      for (int half = 0; half < Tile::kSlots; ++half) {
        const char* const from = row(half);
        const bool wanted = is_wanted(half);
#pragma unroll
        for (int c = 0; c < Tile::kChunks; ++c) {
          copies.Begin(0, &Piece(i, half, c), from + TileElement(c) * 2,
                       wanted && TileElement(c) < dim);
        }
      }
    }
  }

  // Tile `i`, when its batch has come; the other arguments are as they were for Begin.
  template <typename Row, typename Wanted>
  JAX_ATTN_DEVICE void Get(int i, Row row, Wanted is_wanted, int dim, Tile& tile) const {
    if constexpr (kCopiesThroughRegisters) {
      tile.LoadSlots(row, is_wanted, dim);
    } else {
      GetAgain(i, tile);
    }
  }

  // Once more, so that a tile need not stay in registers. Where it did not come through shared
  // memory, it is in `tile` already.
  JAX_ATTN_DEVICE void GetAgain(int i, Tile& tile) const {
    if constexpr (!kCopiesThroughRegisters) {
#pragma unroll
      for (int half = 0; half < Tile::kSlots; ++half) {
#pragma unroll
        for (int c = 0; c < Tile::kChunks; ++c) tile.SetPiece(half, c, Piece(i, half, c));
      }
    }
  }

 private:
  JAX_ATTN_DEVICE uint4& Piece(int i, int half, int c) const {
    return shared_.pieces[i % kRoom][half * Tile::kChunks + c][threadIdx.x];
  }

  Shared& shared_;
};

// Stores `factor` times the lane's elements of chunk `c` of a row that begins at `row`, rounded
// once.
template <DType kType>
JAX_ATTN_DEVICE void StoreTilePiece(char* row, int dim, int c, bool wanted, float factor,
                                    const float (&x)[kPieceElements]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = Pack<kType>(factor * x[2 * i], factor * x[2 * i + 1]);
  if (wanted && TileElement(c) < dim) {
    *reinterpret_cast<uint4*>(row + TileElement(c) * 2) = {words[0], words[1], words[2], words[3]};
  }
}

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_ROW_TILES_H_
