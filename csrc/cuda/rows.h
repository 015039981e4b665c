// Host side of kernels/rows.cuh: what the ops that work row by row, and add up gradients over rows, share.
#pragma once
#include <algorithm>

#include "../torch/checks.h"
#include "kernels/rows.cuh"
#include "launch.h"

namespace sail::cuda {
inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
inline int vector_width(DType dtype, bool vectors) { return vectors ? static_cast<int>(16 / element_size(dtype)) : 1; }

// Threads of a block whose slots' sums are added: the more slots, the fewer partial sums are written. Not tuned, as no
// card has run it yet.
constexpr int kSumBlock = kRowThreads;
// Rows that a thread adds up in fp32 before the blocks' sums are added in fp64. Writing and reading the latter then costs
// a 24th of the traffic of x, its gradient and dx in bf16, and less where a block has several slots.
constexpr int64_t kMostRows = 32;

// One block for every multiprocessor, so that the last wave is no smaller than the others, as far as kMostRows allows.
inline int64_t rows_of_block(int64_t rows, const RowPlan& plan, int sm_count) {
  const int64_t even = (rows + sm_count - 1) / sm_count, whole = (even + plan.slots - 1) / plan.slots;
  return std::clamp<int64_t>(whole, 1, kMostRows) * plan.slots;
}
// Shared memory of sum_slots
inline int64_t slots_shared(const RowPlan& plan, int64_t D) { return plan.slots > 1 ? D * 4 : 0; }

inline ColumnSum column_sum(const Tensor& partial, const Tensor& out) {
  return {partial.ptr<const float>(), partial.size(0), out.data()};
}
// Those of the two that have an out [D].
inline void launch_sum_rows(DType dtype, const ColumnSum& a, const ColumnSum& b, int64_t D, const Stream& stream) {
  if (!a.out && !b.out) return;
  const Grid grid((D + kSumColumns - 1) / kSumColumns, a.out && b.out ? 2 : 1);
  dispatch(dtype, false, [&](auto t, auto) {
    launch(sum_rows_kernel<decltype(t)>, grid, dim3(kSumColumns, kSumGroups), 0, stream, a.out ? a : b, b, D);
  });
}
}  // namespace sail::cuda
