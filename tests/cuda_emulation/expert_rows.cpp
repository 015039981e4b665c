// The kernels around the grouped products for tests/cuda/test_cuda_routing.py: rows by expert, gather-sums, expert sums.
#include "combine.cuh"
#include "cuda_runtime.h"
#include "routing_metadata.cuh"

namespace {
using namespace sail::cuda;

emu::Options options(int64_t seed, int64_t shared_bytes) {
  emu::Options o;
  o.seed = static_cast<uint64_t>(seed), o.shared_bytes = static_cast<size_t>(shared_bytes);
  return o;
}
}  // namespace

extern "C" {
int64_t sort_blocks(int64_t count, int64_t E) { return plan_sort(count, E).blocks; }
int64_t sort_warps(int64_t count, int64_t E) { return plan_sort(count, E).warps; }
int64_t sort_piece(int64_t count, int64_t E) { return plan_sort(count, E).piece; }

// sizes: T, K, E, wide, weights' Scalar, strides of ids and weights
const char* sort_rows(int64_t seed, const void* ids, const void* weights, const int64_t* sizes, int32_t* block_counts,
                      int32_t* offsets, int32_t* token, float* weight, int32_t* row_of) {
  RowSort a = {};
  a.ids = ids, a.weights = weights, a.count = sizes[0] * sizes[1];
  a.K = static_cast<int32_t>(sizes[1]), a.E = static_cast<int32_t>(sizes[2]);
  a.wide_ids = sizes[3] != 0, a.weights_type = static_cast<Scalar>(sizes[4]);
  for (int i = 0; i < 2; i++) a.ids_stride[i] = sizes[5 + i], a.weights_stride[i] = sizes[7 + i];
  a.block_counts = block_counts, a.offsets = offsets, a.token = token, a.weight = weight, a.row_of = row_of;
  const SortPlan plan = plan_sort(a.count, a.E);
  a.piece = plan.piece;
  return emu::guard([&] {
    emu::launch(plan.blocks, 256, options(seed, a.E * 4), [&] { count_experts_kernel(a); });
    emu::launch((a.E + 31) / 32, dim3(32, kScanSegments), options(seed, 0),
                [&] { scan_blocks_kernel(a, plan.blocks); });
    emu::launch(plan.blocks, plan.warps * 32, options(seed, plan.warps * a.E * 4), [&] { sort_rows_kernel(a); });
  });
}

const char* clamp_ends(int64_t seed, const int32_t* ends, int64_t stride, int64_t E, int64_t rows, int32_t* offsets) {
  const SortedRows a = {ends, stride, static_cast<int32_t>(E), static_cast<int32_t>(rows), offsets};
  return emu::guard([&] { emu::launch(1, 256, options(seed, 0), [&] { sorted_rows_kernel(a); }); });
}

const char* combine(int64_t vectors, const void* rows, const int32_t* row_of, const float* weight, void* out, int64_t T,
                    int64_t D, int64_t K, int64_t threads) {
  const Combine a = {rows, row_of, weight, out, D, static_cast<int32_t>(K)};
  const auto kernel = vectors ? combine_kernel<__nv_bfloat16, 8> : combine_kernel<__nv_bfloat16, 1>;
  return emu::guard([&] {
    emu::launch(static_cast<unsigned>(T), static_cast<unsigned>(threads), options(0, 0), [&] { kernel(a); });
  });
}

const char* expert_sums(int64_t vectors, const void* in, const int32_t* index, const float* weight,
                        const int32_t* offsets, void* out, int64_t E, int64_t columns) {
  const ExpertSum a = {in, index, weight, offsets, out, columns, columns};
  const auto kernel = vectors ? expert_sum_kernel<__nv_bfloat16, 8> : expert_sum_kernel<__nv_bfloat16, 1>;
  const int64_t width = kExpertSumLanes * (vectors ? 8 : 1);
  const dim3 grid(static_cast<unsigned>((columns + width - 1) / width), static_cast<unsigned>(E));
  return emu::guard(
      [&] { emu::launch(grid, dim3(kExpertSumLanes, kExpertSumGroups), options(0, 0), [&] { kernel(a); }); });
}
}
