// The kernels around the grouped products for tests/cuda/test_cuda_routing.py: rows by expert, gather-sums, expert sums.
#include "calls.h"

namespace {
using namespace sail::cuda;

emu::Options options(int64_t seed, int64_t shared_bytes) {
  emu::Options o;
  o.seed = static_cast<uint64_t>(seed), o.shared_bytes = static_cast<size_t>(shared_bytes);
  return o;
}
}  // namespace

const char* sort_rows(int64_t seed, const RowSort& unplanned) {
  RowSort a = unplanned;
  const SortPlan plan = plan_sort(a.count, a.E);
  a.piece = plan.piece;
  return emu::guard([&] {
    emu::launch(plan.blocks, 256, options(seed, a.E * 4), [&] { count_experts_kernel(a); });
    emu::launch((a.E + 31) / 32, dim3(32, kScanSegments), options(seed, 0),
                [&] { scan_blocks_kernel(a, plan.blocks); });
    emu::launch(plan.blocks, plan.warps * 32, options(seed, plan.warps * a.E * 4), [&] { sort_rows_kernel(a); });
  });
}

const char* clamp_ends(int64_t seed, const SortedRows& a) {
  return emu::guard([&] { emu::launch(1, 256, options(seed, 0), [&] { sorted_rows_kernel(a); }); });
}

const char* combine(bool vectors, const Combine& a, int64_t T, int64_t threads) {
  const auto kernel = vectors ? combine_kernel<__nv_bfloat16, 8> : combine_kernel<__nv_bfloat16, 1>;
  return emu::guard([&] {
    emu::launch(static_cast<unsigned>(T), static_cast<unsigned>(threads), options(0, 0), [&] { kernel(a); });
  });
}

const char* expert_sums(bool vectors, const ExpertSum& a, int64_t E) {
  const auto kernel = vectors ? expert_sum_kernel<__nv_bfloat16, 8> : expert_sum_kernel<__nv_bfloat16, 1>;
  const int64_t width = kExpertSumLanes * (vectors ? 8 : 1);
  const dim3 grid(static_cast<unsigned>((a.columns + width - 1) / width), static_cast<unsigned>(E));
  return emu::guard(
      [&] { emu::launch(grid, dim3(kExpertSumLanes, kExpertSumGroups), options(0, 0), [&] { kernel(a); }); });
}
