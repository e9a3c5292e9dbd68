// Copyright 2026 The jax_attn Authors
// SPDX-License-Identifier: Apache-2.0

#include "split_plan.h"

#include <algorithm>
#include <cmath>

#include "split_kv_kernels.h"

namespace jax_attn::gpu {
namespace {

// The cost model, in nanoseconds and bytes. Only ratios matter, and they hold well enough from an
// A100 to an MI300X.
constexpr double kBytesPerCore = 34;  // per nanosecond; no more if other cores are idle
constexpr double kLatency = 2200;     // from the beginning of a copy until its place is free again
constexpr double kStart = 6000;       // until the first copies of a block are under way
constexpr double kNextEntry = 3000;   // queries in, outputs out
constexpr double kMerge = 4500;       // a merge kernel
constexpr double kColdMerge = 8500;   // if keys have thrown its instructions out of the L2 cache
constexpr double kCacheBytes = 32e6;
constexpr double kMergePerSplit = 20;

// The same of stream kernels. Half of the cores read nearly as fast as all.
constexpr double kStreamPerCore = 63;
constexpr double kStreamNarrowPerCore = 42;  // of heads of 64 bytes
constexpr double kStreamManyPerCore = 36;    // of 8-bit caches with many rows, which compute more
constexpr double kStreamStart = 2500;
constexpr double kStreamNextEntry = 200;
constexpr double kStreamMerge = 3500;
constexpr double kStreamNoMerge = 1100;  // if it finds that nothing was cut
constexpr double kStreamCluster = 2200;  // if blocks merge by themselves

// Late groups: see NumLateGroups.
constexpr int kLatePart = 16;   // they have this part of all units
constexpr int kLateRounds = 2;  // blocks of theirs for a core
constexpr int kLongShare = 48;  // units
constexpr int kParts = 16;      // of an entry, that a block of the merge kernel reads at once

constexpr int kWaveTiles = 4;  // of a wave in a cluster kernel; with many rows half of that

constexpr int64_t kMaxPages = int64_t{1} << 31;  // that a tensor map can tell apart

// What the runtime keeps for itself of a block's shared memory, and static arrays.
constexpr int64_t kReservedShared = 3 * 1024;
constexpr int64_t kMaxBlocksPerCore = 4;  // what the registers of a core hold

bool Is16Bit(DType dtype) { return SizeOf(dtype) == 2; }

bool HasExtras(const SplitKvAttentionParams& p) {
  return p.logits_soft_cap != 0 || p.bias.data != nullptr || p.mask.data != nullptr ||
         p.alibi_slopes.data != nullptr || p.k_scale.token_stride != 0 ||
         p.v_scale.token_stride != 0;
}

// The matrix kernel for a problem; without rows if there is none.
KernelShape ChooseMatrix(const SplitKvAttentionParams& p, int wave_size) {
  const int element_bytes = static_cast<int>(SizeOf(p.key.dtype));
  const bool quantized = element_bytes == 1;
  const int64_t dim = std::max(p.head_dim, p.v_head_dim);
  const int64_t rows = p.query_len * p.group_size();
  if (!Is16Bit(p.query_dtype)) return {};
  if (quantized ? p.query_dtype != DType::kBFloat16 : p.key.dtype != p.query_dtype) return {};
  if (quantized && dim > 256) return {};
  // A weight times the scale of a token may leave the range of float16.
  if (p.query_dtype == DType::kFloat16 && p.v_scale.token_stride != 0) return {};
  const int max_dim = dim <= 64 && !quantized ? 64 : dim <= 128 ? 128 : dim <= 256 ? 256 : 512;
  const auto fits = [&](int block_rows) {
    return HoldsOutputs(max_dim, block_rows, wave_size, kCopiesThroughRegisters);
  };
  if (!fits(kMatrixRows[0])) return {};
  const bool many = rows > kMatrixRows[0] && fits(kMatrixRows[1]);
  return MatrixShape(max_dim, kMatrixRows[many], quantized || HasExtras(p), element_bytes,
                     kCopiesThroughRegisters);
}

// Whether stream kernels have the types of a problem.
bool HasStreamTypes(const SplitKvAttentionParams& p) {
  if (!Is16Bit(p.query_dtype)) return false;
  switch (p.key.dtype) {
    case DType::kInt8:
    case DType::kFloat8E4M3FN:
    case DType::kFloat8E5M2:
      return true;
    default:
      return p.key.dtype == p.query_dtype && p.k_scale.data == nullptr && p.v_scale.data == nullptr;
  }
}

// The stream kernel for a problem; without rows if there is none.
KernelShape ChooseStream(const SplitKvAttentionParams& p, const Device& device) {
  if (!device.tensor_maps || !HasStreamTypes(p) || HasExtras(p) || p.batch.num_dims > 1) return {};
  if (p.kv_len == 0 || p.num_pages * std::max<int64_t>(1, p.num_layers) >= kMaxPages) return {};
  const int64_t dim = p.head_dim;
  if (dim != p.v_head_dim || (dim != 64 && dim != 128 && dim != 256)) return {};
  const bool many = p.query_len * p.group_size() > kMatrixRows[0];
  // There are no registers for so many accumulators.
  if (dim == 256 && many) return {};
  const KernelShape shape =
      StreamShape(static_cast<int>(dim), kMatrixRows[many], static_cast<int>(SizeOf(p.key.dtype)));
  // A copy has keys of one page.
  if (p.page_size % kStreamMinKeys != 0) return {};
  // Tensor maps have one stride for the batch, and none of 0.
  const int64_t k_stride = p.key.batch.strides[0], v_stride = p.value.batch.strides[0];
  if ((k_stride == 0) != (v_stride == 0)) return {};
  const auto is_aligned = [](const KvOperand& x) {
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  };
  if (!is_aligned(p.key) || !is_aligned(p.value)) return {};
  return StreamSharedBytes(shape) <= device.shared_per_block ? shape : KernelShape{};
}

KernelShape ChooseVector(const SplitKvAttentionParams& p) {
  const int64_t dim = std::max(p.head_dim, p.v_head_dim);
  const int64_t rows = p.query_len * p.group_size();
  VectorSize best;
  for (int i = 0;; ++i) {
    const VectorSize size = VectorSizeAt(p.key.dtype, i);
    if (size.rows == 0) break;
    if (size.max_dim < dim) continue;
    if (best.rows == 0 || (size.max_dim == best.max_dim && best.rows < rows)) best = size;
  }
  if (best.rows == 0) return {};
  return VectorShape(best.max_dim, best.rows, static_cast<int>(SizeOf(p.key.dtype)),
                     kCopiesThroughRegisters);
}

// Keys that a context of full length makes an entry read.
int64_t KeysPerEntry(const SplitKvAttentionParams& p) {
  int64_t keys = p.kv_len;
  if (p.causal == Causal::kTopLeft && p.query_offset.data == nullptr) {
    keys = std::min(keys, p.query_len);
  }
  if (p.sliding_window != 0) keys = std::min(keys, p.sliding_window + p.query_len - 1);
  return keys;
}

int64_t UnitsPerEntry(const SplitKvAttentionParams& p, const SplitWork& w) {
  return std::max<int64_t>(1, CeilDiv(KeysPerEntry(p), w.unit_keys));
}

int64_t BlocksPerCore(const SplitPlan& plan, const Device& device) {
  return std::clamp<int64_t>(device.shared_per_core / (plan.shared_bytes + kReservedShared), 1,
                             kMaxBlocksPerCore);
}

// Whether the blocks that have an entry merge what they find by themselves.
bool FormsClusters(const SplitPlan& plan, int64_t units, int64_t share) {
  // Blocks that share lines of memory, since their heads have half of one, are to be neighbours.
  const bool share_lines = kStreamRowBytes * plan.shape.max_dim < 128 * plan.shape.tile_keys;
  return plan.shape.stream && plan.shape.rows == kMatrixRows[0] && plan.work.uniform &&
         units == share * kMaxCluster && !share_lines;
}

// Tiles that an entry has at most.
int64_t TilesPerEntry(const SplitKvAttentionParams& p, const KernelShape& shape) {
  const int64_t keys = KeysPerEntry(p), all = CeilDiv(p.kv_len, shape.tile_keys);
  // A window begins in the middle of a tile.
  return std::min<int64_t>(all, CeilDiv(keys - 1, shape.tile_keys) + 1);
}

// Blocks of a cluster that has an entry and kv head to itself; 0 where that does not pay. A block
// for every second core is fastest. More blocks pay where lengths are given, since what comes
// instead merges then. Entries are so small that waiting for the longest costs less than a merge.
int ClusterSize(const SplitKvAttentionParams& p, const SplitPlan& plan, const Device& device) {
  const KernelShape& shape = plan.shape;
  const int64_t clusters = int64_t{plan.work.num_entries} * p.num_kv_heads;
  const int64_t pairs = device.num_cores / 2;
  if (clusters > pairs) return 0;
  const int64_t most = std::max<int64_t>(plan.work.uniform ? 1 : 2, pairs / clusters);
  const int64_t tiles = TilesPerEntry(p, shape);
  // Half of the waves of a block may be without a tile.
  const int64_t size = std::min<int64_t>({most, CeilDiv(tiles, shape.waves / 2), kMaxEntryCluster});
  const int max_tiles = shape.waves * (shape.rows == kMatrixRows[0] ? kWaveTiles : kWaveTiles / 2);
  return size < 2 || CeilDiv(tiles, size) > max_tiles ? 0 : static_cast<int>(size);
}

// Makes the plan one of a cluster kernel, which needs less shared memory.
void FormEntryClusters(int size, SplitPlan& plan) {
  SplitWork& w = plan.work;
  plan.shape.clusters = true;
  plan.shared_bytes = ClusterSharedBytes(plan.shape);
  w.cut = Cut::kCount;
  w.max_splits = w.cluster = size;
  w.num_groups = w.num_entries * size;
  w.splits = Divisor(size);
  plan.num_splits = size;
}

double StreamRate(const SplitKvAttentionParams& p, const KernelShape& shape) {
  if (Is16Bit(p.key.dtype)) return kStreamPerCore;
  if (shape.rows > kMatrixRows[0]) return kStreamManyPerCore;
  return p.head_dim == 64 ? kStreamNarrowPerCore : kStreamPerCore;
}

int64_t PlanGroups(const SplitKvAttentionParams& p, const SplitPlan& plan, const Device& device) {
  const int64_t total = UnitsPerEntry(p, plan.work) * plan.work.num_entries;
  const int64_t at_once =
      std::max<int64_t>(1, BlocksPerCore(plan, device) * device.num_cores / p.num_kv_heads);
  int64_t best = 1;
  double best_time = EstimateTime(p, plan, device, 1);
  const auto consider = [&](int64_t groups) {
    const double time = EstimateTime(p, plan, device, groups);
    if (time < best_time) best = groups, best_time = time;
  };
  for (int64_t groups = 2; groups <= std::min(total, at_once); ++groups) consider(groups);
  consider(plan.work.num_entries);
  return best;
}

// Cuts each entry by itself, into up to `max_splits`.
void CutEntries(const SplitKvAttentionParams& p, Cut cut, int64_t max_splits, SplitPlan& plan) {
  SplitWork& w = plan.work;
  w.cut = cut;
  w.max_splits = static_cast<int32_t>(std::max<int64_t>(1, max_splits));
  w.num_groups = w.num_entries * w.max_splits;
  w.splits = Divisor(w.max_splits);
  plan.num_splits = w.max_splits;
  plan.merges = w.max_splits > 1;
  if (plan.merges) {
    plan.workspace_size = w.num_slots() * p.num_kv_heads * w.partial_stride;
  }
}

// Late groups for a plan that has none. Cores read at different rates, and the fewer groups there
// are, of more blocks each, the further the last blocks fall behind: 2 % with 32 kv heads. With 8
// there are so many groups that more parts would cost more than even ends gain.
int64_t NumLateGroups(const SplitKvAttentionParams& p, const SplitPlan& plan,
                      const Device& device) {
  const SplitWork& w = plan.work;
  const bool cuts = plan.merges || w.cluster > 1;
  if (!plan.shape.stream || !cuts || w.shares.size < kLongShare) return 0;
  const int64_t groups =
      std::min<int64_t>(kLateRounds * device.num_cores / p.num_kv_heads, kParts - w.num_groups);
  // Late groups are to have much less than others.
  return 2 * groups < w.num_groups ? 0 : groups;
}

// Whether balancing contexts of different lengths gains nothing, where a group would have one of
// full length: at best it saves all but an equal share of the longest, and then it merges.
bool BalancingIsIdle(const SplitKvAttentionParams& p, const SplitPlan& plan, const Device& device,
                     int64_t groups) {
  const SplitWork& w = plan.work;
  if (w.uniform || groups != w.num_entries || groups * p.num_kv_heads > device.num_cores) {
    return false;
  }
  SplitPlan whole = plan;
  whole.work.uniform = true;
  const double start = plan.shape.stream ? kStreamStart : kStart;
  const double read = EstimateTime(p, whole, device, groups) - start;
  const double merge = plan.shape.stream ? kStreamMerge : kMerge;
  return read * (1 - 1.0 / static_cast<double>(groups)) <= merge;
}

}  // namespace

void CutIntoShares(const SplitKvAttentionParams& p, int64_t num_groups, int64_t num_late,
                   SplitPlan& plan) {
  SplitWork& w = plan.work;
  const int64_t units = UnitsPerEntry(p, w), total = units * w.num_entries;
  const int64_t share = (total + num_groups - 1) / num_groups;
  w.cut = Cut::kShares;
  w.num_groups = CeilDiv(total, share);
  w.first_groups = Divisor(w.num_groups);
  w.late = Divisor(std::max<int64_t>(1, kLatePart * num_late));
  w.num_groups += static_cast<int32_t>(num_late);
  w.units = Divisor(units);
  w.shares = w.SharesOf(static_cast<int>(total));
  // Of the first or of the last entry, which has late groups.
  plan.num_splits = std::max(w.shares.GroupOf(static_cast<int>(units - 1)) + 1,
                             w.shares.GroupOf(static_cast<int>(total - 1)) -
                                 w.shares.GroupOf(static_cast<int>(total - units)) + 1);
  w.cluster = num_late == 0 && FormsClusters(plan, units, share) ? kMaxCluster : 1;
  // Where lengths differ from what is planned for, shares end anywhere.
  plan.merges =
      w.num_groups > 1 && w.cluster == 1 && !(w.uniform && num_late == 0 && share % units == 0);
  plan.workspace_size = plan.merges ? w.num_slots() * p.num_kv_heads * w.partial_stride : 0;
}

double EstimateTime(const SplitKvAttentionParams& p, const SplitPlan& plan, const Device& device,
                    int64_t num_groups) {
  const SplitWork& w = plan.work;
  const double units = static_cast<double>(UnitsPerEntry(p, w)), total = units * w.num_entries;
  const int64_t share = CeilDiv(static_cast<int64_t>(total), num_groups);
  const double unit_bytes =
      static_cast<double>(int64_t{w.unit_keys} * (p.head_dim + p.v_head_dim) * SizeOf(p.key.dtype));
  const double blocks = static_cast<double>(CeilDiv(static_cast<int64_t>(total), share)) *
                        static_cast<double>(p.num_kv_heads);
  const double cores = device.num_cores;
  const bool cuts = share % static_cast<int64_t>(units) != 0;
  const bool merges = num_groups > 1 && (cuts || !w.uniform);
  const double splits = static_cast<double>(CeilDiv(static_cast<int64_t>(units), share));
  const double entries_per_share = static_cast<double>(share) / units;
  if (plan.shape.stream) {
    // Blocks come in rounds, one a core; few of them do not reach the rate of all.
    const double rounds = std::ceil(blocks / cores);
    const double busy = std::min(blocks, cores);
    const double rate = std::min(StreamRate(p, plan.shape) * busy,
                                 kBytesPerCore * cores * (0.84 + 0.15 * busy / cores));
    const double bytes = busy * static_cast<double>(share) * unit_bytes;
    const double merge = FormsClusters(plan, static_cast<int64_t>(units), share) ? kStreamCluster
                         : cuts ? kStreamMerge + kMergePerSplit * splits
                                : kStreamNoMerge;
    return rounds * (kStreamStart + bytes / rate) +
           kStreamNextEntry * std::max(0.0, entries_per_share - 1) + (merges ? merge : 0);
  }
  const double per_core = static_cast<double>(BlocksPerCore(plan, device));
  // One wave of blocks after the other; in the last, cores have fewer.
  const int64_t at_once = static_cast<int64_t>(cores * per_core);
  const int64_t waves = CeilDiv(static_cast<int64_t>(blocks), at_once);
  const double last = blocks - static_cast<double>((waves - 1) * at_once);
  const double in_flight = static_cast<double>(plan.shared_bytes) *
                           (plan.shape.stages > 1 ? 1.0 - 1.0 / plan.shape.stages : 1.0);
  const auto wave_time = [&](double number) {
    // What the busiest core has at a time, and the rate at which it reads.
    const double busiest = std::min(
        per_core, static_cast<double>(CeilDiv(static_cast<int64_t>(number), device.num_cores)));
    const double rate = std::min(busiest * in_flight / kLatency, kBytesPerCore);
    return busiest * static_cast<double>(share) * unit_bytes / rate;
  };
  double time = kStart +
                (static_cast<double>(waves - 1)) * wave_time(static_cast<double>(at_once)) +
                wave_time(last) + kNextEntry * std::max(0.0, entries_per_share - 1) / per_core;
  if (merges) {
    time += (total * unit_bytes * static_cast<double>(p.num_kv_heads) > kCacheBytes ? kColdMerge
                                                                                    : kMerge) +
            kMergePerSplit * splits;
  }
  return time;
}

SplitPlan PlanSplits(const SplitKvAttentionParams& p, std::string_view variant,
                     const Device& device, int64_t workspace_limit) {
  SplitPlan plan;
  if (variant.empty() || variant == "stream") plan.shape = ChooseStream(p, device);
  if (plan.shape.rows == 0 && (variant.empty() || variant == "matrix")) {
    plan.shape = ChooseMatrix(p, device.wave_size);
  }
  if (plan.shape.rows == 0 && (variant.empty() || variant == "vector")) {
    plan.shape = ChooseVector(p);
  }
  const KernelShape& shape = plan.shape;
  if (shape.rows == 0) return plan;
  plan.possible = true;

  SplitWork& w = plan.work;
  const int64_t rows = p.query_len * p.group_size();
  if (p.batch.count == 0 || rows == 0) return plan;
  w.num_row_blocks = CeilDiv(rows, shape.rows);
  w.rows_per_block = CeilDiv(rows, w.num_row_blocks);
  w.num_row_blocks = CeilDiv(rows, w.rows_per_block);
  w.num_entries = static_cast<int32_t>(p.batch.count * w.num_row_blocks);
  w.num_rows = static_cast<int32_t>(rows);
  w.kv_heads = Divisor(p.num_kv_heads);
  w.row_blocks = Divisor(w.num_row_blocks);
  w.unit_keys = shape.waves * shape.tile_keys;
  w.unit = Divisor(w.unit_keys);
  w.token_rows = p.head_dim == 0 ? 0 : p.key.token_stride / p.head_dim;
  w.page_rows = p.head_dim == 0 ? 0 : p.key.page_stride / p.head_dim;
  w.partial_stride = (w.rows_per_block * (p.v_head_dim + 2) + 3) / 4 * 4;
  const int64_t element_bytes = SizeOf(p.key.dtype);
  w.wave_bytes = static_cast<int32_t>(WaveBytes(shape, p.head_dim, p.v_head_dim, element_bytes));
  w.query_bytes = static_cast<int32_t>(QueryBytes(shape, p.head_dim));
  if (p.batch.num_dims <= 1) {
    const BatchStrides* const batches[] = {
        &p.query_batch, &p.key.batch,        &p.value.batch,  &p.bias.batch,
        &p.mask.batch,  &p.page_table.batch, &p.layer.batch,  &p.alibi_slopes.batch,
        &p.sinks.batch, &p.k_scale.batch,    &p.v_scale.batch};
    w.one_batch_dim = true;
    for (int i = 0; i < 11; ++i) w.batch_strides[i] = batches[i]->strides[0];
  }
  w.sees_all =
      p.sliding_window == 0 && p.query_offset.data == nullptr &&
      (p.causal == Causal::kNone || (p.causal == Causal::kBottomRight && p.query_len == 1));
  w.uniform =
      p.kv_lengths.data == nullptr && p.query_offset.data == nullptr && w.num_row_blocks == 1;
  plan.shared_bytes = shape.stream ? StreamSharedBytes(shape)
                                   : SharedBytes(shape, p.head_dim, p.v_head_dim, element_bytes);

  if (p.split_size != 0) {
    w.split_size = std::min<int64_t>(p.split_size, int64_t{1} << 29);
    w.split = Divisor(w.split_size);
    CutEntries(p, Cut::kSize, (p.kv_len + p.split_size - 1) / p.split_size, plan);
    return plan;
  }
  if (p.num_splits != 0) {
    CutEntries(p, Cut::kCount, std::min(p.num_splits, (p.kv_len + 15) / 16), plan);
    return plan;
  }
  if (shape.stream) {
    if (const int size = ClusterSize(p, plan, device); size != 0) {
      FormEntryClusters(size, plan);
      return plan;
    }
  }
  int64_t groups = PlanGroups(p, plan, device);
  if (BalancingIsIdle(p, plan, device, groups)) {
    CutEntries(p, Cut::kCount, 1, plan);
    return plan;
  }
  const auto fits = [&] { return plan.workspace_size <= workspace_limit; };
  CutIntoShares(p, groups, 0, plan);
  const int64_t num_late = NumLateGroups(p, plan, device);
  if (num_late != 0) CutIntoShares(p, groups, num_late, plan);
  if (num_late != 0 && !fits()) CutIntoShares(p, groups, 0, plan);
  while (!fits() && groups > 1) CutIntoShares(p, --groups, 0, plan);
  return plan;
}

}  // namespace jax_attn::gpu
