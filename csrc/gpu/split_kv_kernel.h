// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

// What host and device code of split-KV attention on GPUs agree on: how work is cut, and how much
// of it a block does at a time.

#ifndef JAX_ATTN_CSRC_GPU_SPLIT_KV_KERNEL_H_
#define JAX_ATTN_CSRC_GPU_SPLIT_KV_KERNEL_H_

#include <algorithm>
#include <cstdint>

#include "../split_kv_attention.h"

namespace jax_attn::gpu {

// An entry is a block of rows of one batch index, with the keys that they see; all kv heads of it
// are cut alike. Row r of a kv head is query r / group_size with head r % group_size of the group.
//
// A group is a block per kv head: neighbours in the grid, so that what they read of a token is
// read at about the same time.
enum class Cut : int32_t {
  kShares,  // groups have equal shares of all keys, one entry after the other
  kCount,   // each entry has up to `max_splits` groups of equal size
  kSize,    // each entry is cut at multiples of `split_size` keys
};

// In the wider of both types: divisions of 32 bits are much faster on GPUs.
template <typename A, typename B>
constexpr int CeilDiv(A a, B b) {
  return static_cast<int>((a + b - 1) / b);
}

// Divides by a number that is known before, in 4 instructions instead of 25 that wait for each
// other. Dividends are from 0 to 2^31 - 1.
class Divisor {
 public:
  constexpr Divisor() = default;
  constexpr explicit Divisor(int64_t divisor) : divisor_(static_cast<int32_t>(divisor)) {
    while ((int64_t{1} << shift_) < divisor) ++shift_;
    factor_ = static_cast<uint32_t>(
        (((uint64_t{1} << shift_) - static_cast<uint64_t>(divisor)) << 32) / divisor + 1);
  }

  constexpr int Divide(int x) const {
    const uint32_t dividend = static_cast<uint32_t>(x);
    const uint32_t high = static_cast<uint32_t>(uint64_t{dividend} * factor_ >> 32);
    return static_cast<int>((high + dividend) >> shift_);
  }
  constexpr int Remainder(int x) const { return x - Divide(x) * divisor_; }
  constexpr int divisor() const { return divisor_; }

 private:
  int32_t divisor_ = 1;
  uint32_t factor_ = 1;
  uint32_t shift_ = 0;
};
static_assert(Divisor(7).Divide(2147483647) == 306783378 && Divisor(7).Remainder(13) == 6);
static_assert(Divisor(1).Divide(2147483647) == 2147483647 && Divisor(128).Divide(127) == 0);

// How all keys are shared out, in units that are counted from the first of all entries. Late groups
// come last and have less: their blocks find no core that is free at first, and go to those that
// end before others do.
struct Shares {
  int32_t num_first = 0;  // groups before the late ones
  int32_t size = 0;
  int32_t late_size = 0;

  // Past all units for the groups that are left without any.
  constexpr uint32_t Begin(int group) const {
    const int first = group < num_first ? group : num_first;
    return static_cast<uint32_t>(first) * static_cast<uint32_t>(size) +
           static_cast<uint32_t>(group - first) * static_cast<uint32_t>(late_size);
  }
  // The group that has a unit.
  constexpr int GroupOf(int unit) const {
    const uint32_t late = Begin(num_first), place = static_cast<uint32_t>(unit);
    return place < late ? unit / size : num_first + static_cast<int>(place - late) / late_size;
  }
};

struct SplitWork {
  Cut cut = Cut::kShares;
  bool uniform = true;    // all entries have the same keys
  bool sees_all = false;  // queries see all keys of their context
  bool merged = false;    // a merge kernel follows
  // What comes after the last kernel may start before that one ends. Where cores are busy its
  // blocks would come to the first ones that are free, and less evenly than if they had to wait.
  bool allows_next = false;
  Divisor kv_heads;  // block index: group, kv head
  Divisor units;     // of each entry of full length
  Shares shares;     // if all entries have it
  int32_t num_groups = 0;
  // Blocks of one kv head that follow each other in the grid, have one entry together and merge
  // what they find. 1, or in stream kernels kMaxCluster, or up to kMaxEntryCluster.
  int32_t cluster = 1;
  int32_t num_entries = 0;
  int32_t rows_per_block = 0;
  int32_t num_row_blocks = 0;
  int32_t max_splits = 1;  // of an entry, if not kShares
  int32_t unit_keys = 0;   // what the waves of a block read at a time; kShares cuts there
  int64_t split_size = 0;  // kSize
  int64_t token_rows = 0;  // strides of keys and values in rows
  int64_t page_rows = 0;
  int64_t partial_stride = 0;  // floats of a partial result, one kv head
  float* partials = nullptr;   // [slot][kv head]; values [rows][v_head_dim], tops, totals
  Divisor unit;                // unit_keys
  Divisor row_blocks;          // num_row_blocks
  Divisor first_groups;        // groups before the late ones
  Divisor late;                // of all units, a late share has this part
  Divisor splits;              // max_splits
  Divisor split;               // split_size
  int32_t merge_rows = 1;      // of a block of the merge kernel
  Divisor merge_chunks;        // of merge_rows; its block index: what is merged, kv head, chunk
  int32_t num_rows = 0;        // of a kv head
  int32_t wave_bytes = 0;      // shared memory of a wave
  int32_t query_bytes = 0;     // shared memory of the queries
  // If there are no more than one batch dimension: strides of operands, in the order of
  // BatchOffsets. Side by side, since at first each line of the parameters is a wait.
  bool one_batch_dim = false;
  int64_t batch_strides[11] = {};

  // Slots of partial results. With shares, a group has one for the entry that it begins in and one
  // for that where it ends.
  constexpr int64_t num_slots() const {
    return cut == Cut::kShares ? 2 * static_cast<int64_t>(num_groups) : num_groups;
  }

  // The shares of so many units.
  constexpr Shares SharesOf(int total) const {
    Shares result;
    result.num_first = first_groups.divisor();
    const int num_late = num_groups - result.num_first;
    if (num_late != 0) result.late_size = late.Divide(total + late.divisor() - 1);
    const int rest = total - num_late * result.late_size;
    result.size = rest <= 0 ? 1 : first_groups.Divide(rest + result.num_first - 1);
    return result;
  }

  // A merge kernel counts entries, or the groups in which they begin: of entries that were cut,
  // each begins as the last one of a share.
  constexpr bool merges_entries() const { return cut != Cut::kShares || num_entries < num_groups; }
  constexpr int num_merges() const { return merges_entries() ? num_entries : num_groups; }
};

// ---- What a block does at a time

struct KernelShape {
  bool matrix = false;    // matrix instructions, or multiply-adds
  bool stream = false;    // tiles come through tensor maps: takes StreamParams
  bool extras = false;    // soft cap, bias, ALiBi, mask, scales of tokens
  bool clusters = false;  // a stream kernel that merges by itself: split_kv_cluster.h
  int max_dim = 0;        // of head_dim and v_head_dim
  int rows = 0;           // query rows of a block
  int waves = 0;          // of a block
  int stages = 0;         // tiles of a wave that are in shared memory
  int tile_keys = 0;      // keys of a wave's tile
};

// Bytes between rows of shared memory: an odd number of 16 bytes, so that the rows of a tile start
// in different banks, and enough for whole matrix instructions.
constexpr int SharedStride(int64_t head_dim, int64_t element_bytes) {
  const int chunks = CeilDiv(CeilDiv(head_dim, 16) * 16 * element_bytes, 16);
  return (chunks | 1) * 16;
}

// A tile's keys and values, then the scales of its tokens, then what says which keys they are.
constexpr int TileHeaderBytes(int tile_keys) { return 2 * tile_keys * 4 + 16; }

constexpr int StageBytes(int64_t head_dim, int64_t v_head_dim, int64_t element_bytes,
                         int tile_keys) {
  return tile_keys *
             (SharedStride(head_dim, element_bytes) + SharedStride(v_head_dim, element_bytes)) +
         TileHeaderBytes(tile_keys);
}

// Floats per row between the outputs that waves of a block exchange.
constexpr int64_t WaveBytes(const KernelShape& shape, int64_t head_dim, int64_t v_head_dim,
                            int64_t element_bytes) {
  const int64_t weights = shape.matrix ? 0 : int64_t{4} * shape.rows * shape.tile_keys;
  const int64_t ring =
      int64_t{shape.stages} * StageBytes(head_dim, v_head_dim, element_bytes, shape.tile_keys);
  const int64_t outputs = int64_t{4} * shape.rows * v_head_dim;
  return std::max(ring, outputs) + weights;
}

constexpr int64_t QueryBytes(const KernelShape& shape, int64_t head_dim) {
  return shape.matrix ? int64_t{shape.rows} * SharedStride(head_dim, 2)
                      : int64_t{shape.rows} * (head_dim + 4) * 4;
}

constexpr int64_t SharedBytes(const KernelShape& shape, int64_t head_dim, int64_t v_head_dim,
                              int64_t element_bytes) {
  return QueryBytes(shape, head_dim) +
         shape.waves * WaveBytes(shape, head_dim, v_head_dim, element_bytes);
}

// Waves of a block by the bytes of a row, so that enough tiles fit shared memory.
constexpr int WavesPerBlock(int max_row_bytes, bool through_registers) {
  if (through_registers) return max_row_bytes <= 256 ? 4 : max_row_bytes <= 512 ? 2 : 1;
  return max_row_bytes <= 512 ? 4 : max_row_bytes <= 1024 ? 2 : 1;
}

// Whether a lane has registers for its part of the outputs of a matrix kernel. Waves of 32 on AMD
// GPUs have 256 for everything, tiles on their way among it; waves of 64 have 512.
constexpr bool HoldsOutputs(int max_dim, int rows, int wave_size, bool through_registers) {
  return rows * max_dim <= (through_registers && wave_size == 32 ? 64 : 128) * wave_size;
}

constexpr KernelShape MatrixShape(int max_dim, int rows, bool extras, int element_bytes,
                                  bool through_registers) {
  KernelShape shape;
  shape.matrix = true;
  shape.extras = extras;
  shape.max_dim = max_dim;
  shape.rows = rows;
  shape.waves = WavesPerBlock(max_dim * element_bytes, through_registers);
  // AMD GPUs have 64 KiB, of which outputs of the waves take half at most.
  if (through_registers) shape.waves = std::min(shape.waves, 32 * 1024 / (4 * rows * max_dim));
  shape.stages = through_registers ? 1 : 3;
  shape.tile_keys = 16;
  return shape;
}

constexpr KernelShape VectorShape(int max_dim, int rows, int element_bytes,
                                  bool through_registers) {
  KernelShape shape;
  shape.extras = true;
  shape.max_dim = max_dim;
  shape.rows = rows;
  shape.waves = WavesPerBlock(max_dim * element_bytes, through_registers);
  shape.stages = through_registers ? 1 : 3;
  shape.tile_keys = through_registers && max_dim * element_bytes > 1024 ? 8 : 16;
  return shape;
}

// ---- Stream kernels

// A device has room for half as many clusters of two blocks as it has cores, but not for a quarter
// as many clusters of four.
inline constexpr int kMaxCluster = 2;

// In cluster kernels, which leave cores idle; all devices have clusters of that many blocks.
inline constexpr int kMaxEntryCluster = 8;

// What stream kernels need of a problem: few lines of parameters, since each is a wait in a block
// that begins. Fields are called as in SplitKvAttentionParams.
struct StreamParams {
  struct NoShape {};  // there is one batch dimension at most
  template <typename T>
  struct Operand {
    const T* data;  // null: absent
    int64_t stride;

    constexpr const T* At(const NoShape&, int64_t index) const { return data + stride * index; }
  };
  struct Sinks {
    const float* data;
  };

  NoShape batch;
  Causal causal;
  int32_t query_len;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t kv_len;
  Divisor group;      // query heads of a kv head
  int32_t page_size;  // 0: dense
  Divisor pages;      // by page_size
  int32_t sliding_window;
  float scale;
  Operand<int32_t> kv_lengths;
  Operand<int32_t> query_offset;
  Operand<int32_t> page_table;
  const int32_t* layer;  // null: there is one
  int32_t num_pages;
  int32_t num_layers;
  int32_t kv_batch;  // 1 if each batch index has keys of its own, or 0
  int32_t head_dim;
  const void* query;
  int64_t query_stride;
  int32_t v_head_dim;
  DType query_dtype;
  Sinks sinks;
  void* out;
  float* lse;
  bool lse_includes_sinks;
};

// The same of 8-bit caches. Their scales are those of heads, or one for all.
struct ScaledStreamParams : StreamParams {
  struct Scale {
    const float* data;  // null: 1
    int64_t batch_stride, layer_stride, head_stride;
  };
  Scale k_scale, v_scale;
};

// Tiles have this many bytes of keys, and of values, for each element of a head: those of 16 keys
// of 16 bits, or of 32 keys of 8.
inline constexpr int kStreamRowBytes = 32;
inline constexpr int kStreamMinKeys = 16;  // that a page has a multiple of

constexpr int StreamTileKeys(int element_bytes) { return kStreamRowBytes / element_bytes; }

// Keys that a copy takes: of one page, and in shared memory as if all tiles were copied so.
constexpr int StreamBoxKeys(int tile_keys, int dim, int64_t page_size) {
  return dim <= 128 && page_size % tile_keys == 0 ? tile_keys : kStreamMinKeys;
}

// Bytes between outputs that waves exchange; rows start in different banks.
constexpr int StreamOutputStride(int dim) { return dim * 4 + 16; }

// Shared memory of a stream kernel: rings, then what waves exchange at the end of an entry, then
// barriers.
constexpr int StreamStageBytes(const KernelShape& shape) {
  return 2 * kStreamRowBytes * shape.max_dim;
}
constexpr int StreamRingBytes(const KernelShape& shape) {
  return shape.waves * shape.stages * StreamStageBytes(shape);
}
constexpr int StreamOutputBytes(const KernelShape& shape) {
  return shape.waves * shape.rows * StreamOutputStride(shape.max_dim);
}
constexpr int StreamSharedBytes(const KernelShape& shape) {
  return StreamRingBytes(shape) + StreamOutputBytes(shape) + 2 * 4 * shape.waves * shape.rows +
         8 * shape.waves * shape.stages;
}

// One block fills a core; its rings hold what a core must have under way.
constexpr KernelShape StreamShape(int dim, int rows, int element_bytes) {
  KernelShape shape;
  shape.matrix = true;
  shape.stream = true;
  shape.max_dim = dim;
  shape.rows = rows;
  shape.waves = dim > 128 ? 4 : 8;
  shape.stages = dim > 64 ? (rows > 8 ? 2 : 3) : (rows > 8 ? 4 : 6);
  shape.tile_keys = StreamTileKeys(element_bytes);
  return shape;
}

// ---- Cluster kernels: stream kernels of small calls

constexpr KernelShape ClusterShape(int dim, int rows, int element_bytes) {
  KernelShape shape = StreamShape(dim, rows, element_bytes);
  shape.clusters = true;
  return shape;
}

// What blocks of a cluster send each other are fours of values of a row, with its top and total.
inline constexpr int kClusterItemBytes = 32;

// Room for what a block is sent, whatever the size of the cluster.
constexpr int ClusterInboxBytes(const KernelShape& shape) {
  return kClusterItemBytes * (shape.rows * shape.max_dim / 4 + kMaxEntryCluster);
}

// Shared memory of a cluster kernel: rings, in which waves leave outputs later, then what blocks
// are sent, then tops and totals of waves, then barriers.
constexpr int ClusterSharedBytes(const KernelShape& shape) {
  return StreamRingBytes(shape) + ClusterInboxBytes(shape) + 2 * 4 * shape.waves * shape.rows +
         8 * (shape.waves * shape.stages + 1);
}
static_assert(ClusterSharedBytes(ClusterShape(256, 16, 2)) <=
              StreamSharedBytes(StreamShape(256, 16, 2)));
static_assert(ClusterSharedBytes(ClusterShape(64, 8, 1)) <=
              StreamSharedBytes(StreamShape(64, 8, 1)));

}  // namespace jax_attn::gpu

#endif  // JAX_ATTN_CSRC_GPU_SPLIT_KV_KERNEL_H_
