// Rows sorted by expert from the ids [T, K], and the way back: a stable counting sort in three launches.
//   1  count_experts_kernel   a block counts the experts of its piece of the T * K flat positions
//   2  scan_blocks_kernel     for every expert: how many rows the blocks before each block hold, and the total
//   3  sort_rows_kernel       a block recounts by warp, knows where each warp's rows of each expert start, and places them
// Every sum is of integers and every place follows from the flat position alone, so the result is the same every time;
// nothing is read back by the host. An id outside [0, E) is dropped: it owns no row.
#pragma once
#include "elements.cuh"

namespace sail::cuda {
constexpr int kSortMaxBlocks = 512;  // rows of block_counts that pass 2 walks: 1 MB at E = 512
constexpr int64_t kSortPiece = 512;  // fewest positions of a block: 64k positions then fill 128 of an H100's 132 SMs
constexpr int kSortMaxWarps = 8;
constexpr int64_t kSortShared = 47 * 1024;  // dynamic: of 48 KB without asking, block_scan has one, as alignment pads
constexpr int64_t kSortMaxExperts = kSortShared / 4;

struct RowSort {
  const void *ids, *weights;                 // [T, K], any strides
  int64_t ids_stride[2], weights_stride[2];  // in elements
  bool wide_ids;                             // int64, otherwise int32
  Scalar weights_type;
  int64_t count;  // T * K
  int32_t K, E;
  int64_t piece;          // positions of a block, a multiple of 32 * warps
  int32_t* block_counts;  // [blocks + 1, E]: counts, after pass 2 those of the blocks before; the last row: totals
  int32_t* offsets;       // [E + 1]
  int32_t* token;         // [R]
  float* weight;          // [R]
  int32_t* row_of;        // [T * K]: -1 where dropped
};

// How the positions are cut: on the host, before the launch.
struct SortPlan {
  int blocks, warps;
  int64_t piece;
};
constexpr SortPlan plan_sort(int64_t count, int64_t E) {
  int warps = kSortMaxWarps;
  while (warps > 1 && warps * E * 4 > kSortShared) warps /= 2;
  const int64_t even = (count + kSortMaxBlocks - 1) / kSortMaxBlocks, unit = kSortMaxWarps * 32;
  const int64_t piece = even <= kSortPiece ? kSortPiece : (even + unit - 1) / unit * unit;
  const int64_t blocks = count ? (count + piece - 1) / piece : 1;  // one of them writes the offsets of no rows
  return {static_cast<int>(blocks), warps, piece};
}

// Where a flat position lies in a matrix [T, K] of these strides.
__device__ inline int64_t place(const RowSort& a, int32_t flat, const int64_t (&stride)[2]) {
  const int32_t t = flat / a.K;
  return t * stride[0] + (flat - t * a.K) * stride[1];
}

// The expert of a flat position, -1 if it has none.
__device__ inline int32_t expert_at(const RowSort& a, int64_t flat) {
  const int64_t at = place(a, static_cast<int32_t>(flat), a.ids_stride);
  const int64_t id = a.wide_ids ? static_cast<const int64_t*>(a.ids)[at] : static_cast<const int32_t*>(a.ids)[at];
  return id >= 0 && id < a.E ? static_cast<int32_t>(id) : -1;
}

__global__ void count_experts_kernel(RowSort a) {
  int32_t* counts = dynamic_shared<int32_t>();  // [E]
  for (int e = threadIdx.x; e < a.E; e += blockDim.x) counts[e] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * a.piece, end = min(begin + a.piece, a.count);
  for (int64_t flat = begin + threadIdx.x; flat < end; flat += blockDim.x)
    if (const int32_t e = expert_at(a, flat); e >= 0) atomicAdd(&counts[e], 1);
  __syncthreads();
  for (int e = threadIdx.x; e < a.E; e += blockDim.x)
    a.block_counts[static_cast<int64_t>(blockIdx.x) * a.E + e] = counts[e];
}

// A block takes 32 experts; its 32 rows of threads take a segment of the sort's blocks each.
constexpr int kScanSegments = 32;
__global__ void scan_blocks_kernel(RowSort a, int blocks) {
  __shared__ int32_t sums[kScanSegments][33];
  const int e = blockIdx.x * 32 + threadIdx.x, segment = threadIdx.y;
  const int each = (blocks + kScanSegments - 1) / kScanSegments;
  const int begin = min(segment * each, blocks), end = min(begin + each, blocks);
  int32_t mine = 0;
  if (e < a.E)
    for (int b = begin; b < end; b++) mine += a.block_counts[static_cast<int64_t>(b) * a.E + e];
  sums[segment][threadIdx.x] = mine;
  __syncthreads();
  if (e >= a.E) return;
  int32_t before = 0;
  for (int s = 0; s < segment; s++) before += sums[s][threadIdx.x];
  for (int b = begin; b < end; b++) {
    int32_t* count = a.block_counts + static_cast<int64_t>(b) * a.E + e;
    const int32_t here = *count;
    *count = before;
    before += here;
  }
  if (segment == kScanSegments - 1) a.block_counts[static_cast<int64_t>(blocks) * a.E + e] = before;
}

// The sum of `value` over the threads before this one, and over all of them.
struct Scan {
  int32_t before, all;
};
__device__ inline Scan block_scan(int32_t value) {
  __shared__ int32_t warp_sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t sum = value;
  for (int o = 1; o < 32; o *= 2) {
    const int32_t lower = __shfl_up_sync(~0u, sum, o);
    if (lane >= o) sum += lower;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  Scan s = {sum - value, 0};
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; w++) {
    if (w < warp) s.before += warp_sums[w];
    s.all += warp_sums[w];
  }
  return s;
}

// The largest `value` of the threads before this one, at least 0.
__device__ inline int32_t block_max_before(int32_t value) {
  __shared__ int32_t warp_max[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t most = value;
  for (int o = 1; o < 32; o *= 2) {
    const int32_t lower = __shfl_up_sync(~0u, most, o);
    if (lane >= o) most = max(most, lower);
  }
  if (lane == 31) warp_max[warp] = most;
  const int32_t below = __shfl_up_sync(~0u, most, 1);
  __syncthreads();
  int32_t before = lane ? max(below, 0) : 0;
  for (int w = 0; w < warp; w++) before = max(before, warp_max[w]);
  return before;
}

// next[w][e]: the first row of warp w's positions with expert e. Block 0 writes the offsets.
__device__ inline void first_rows(const RowSort& a, int32_t* next, int warps) {
  const int each = (a.E + blockDim.x - 1) / blockDim.x;
  const int begin = min(static_cast<int>(threadIdx.x) * each, a.E), end = min(begin + each, a.E);
  const int32_t* totals = a.block_counts + static_cast<int64_t>(gridDim.x) * a.E;
  const int32_t* earlier_blocks = a.block_counts + static_cast<int64_t>(blockIdx.x) * a.E;
  int32_t mine = 0;
  for (int e = begin; e < end; e++) mine += totals[e];
  const Scan scan = block_scan(mine);
  int32_t start = scan.before;
  for (int e = begin; e < end; e++) {
    if (blockIdx.x == 0) a.offsets[e] = start;
    int32_t row = start + earlier_blocks[e];
    for (int w = 0; w < warps; w++) {
      const int32_t here = next[w * a.E + e];
      next[w * a.E + e] = row;
      row += here;
    }
    start += totals[e];
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) a.offsets[a.E] = scan.all;
}

__global__ void sort_rows_kernel(RowSort a) {
  int32_t* all_next = dynamic_shared<int32_t>();  // [warps, E]
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t* next = all_next + warp * a.E;
  const int64_t each = a.piece / warps;
  const int64_t begin = blockIdx.x * a.piece + warp * each, end = min(begin + each, a.count);
  for (int e = lane; e < a.E; e += 32) next[e] = 0;
  __syncwarp();
  for (int64_t flat = begin + lane; flat < end; flat += 32)
    if (const int32_t e = expert_at(a, flat); e >= 0) atomicAdd(&next[e], 1);
  __syncthreads();
  first_rows(a, all_next, warps);
  __syncthreads();
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t flat = first + lane;
    const int32_t e = flat < end ? expert_at(a, flat) : -1;
    const unsigned same = __match_any_sync(~0u, e);
    const int32_t row = e < 0 ? -1 : next[e] + __popc(same & ((1u << lane) - 1));
    __syncwarp();
    if (e >= 0 && lane == 31 - __clz(same)) next[e] = row + 1;  // the last of its kind
    __syncwarp();
    if (flat < end) a.row_of[flat] = row;
    if (row >= 0) {
      a.token[row] = static_cast<int32_t>(flat) / a.K;
      a.weight[row] = load_scalar(a.weights, a.weights_type, place(a, static_cast<int32_t>(flat), a.weights_stride));
    }
  }
}

// Rows that come sorted: offsets from cumulative ends. Ends that fall or pass the rows are moved to the nearest that do
// not, so that no later kernel leaves its tensors whatever the values. One block.
struct SortedRows {
  const int32_t* ends;  // [E]
  int64_t stride;
  int32_t E, rows;
  int32_t* offsets;  // [E + 1]
};
__global__ void sorted_rows_kernel(SortedRows a) {
  const int each = (a.E + blockDim.x - 1) / blockDim.x;
  const int begin = min(static_cast<int>(threadIdx.x) * each, a.E), end = min(begin + each, a.E);
  int32_t most = 0;
  for (int e = begin; e < end; e++) most = max(most, a.ends[e * a.stride]);
  most = block_max_before(most);
  if (threadIdx.x == 0) a.offsets[0] = 0;
  for (int e = begin; e < end; e++) {
    most = max(most, a.ends[e * a.stride]);
    a.offsets[e + 1] = min(most, a.rows);
  }
}

// out[i] = the i-th of n routing weights as fp32
__global__ void widen_weights_kernel(const void* weights, Scalar type, int64_t stride, int64_t n, float* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = load_scalar(weights, type, i * stride);
}
}  // namespace sail::cuda
