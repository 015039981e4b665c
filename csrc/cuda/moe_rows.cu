// Which rows belong to which expert: the launches of routing_metadata.cuh.
#include <stdlib.h>

#include <vector>

#include "kernels/routing_metadata.cuh"
#include "moe.h"

namespace sail::cuda {
namespace {
constexpr int kThreads = 256;

int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }  // 256 bytes of ints
int64_t blocks_of(int64_t n, int64_t per_block) { return (n + per_block - 1) / per_block; }

Scalar scalar_of(const Tensor& t) {
  return t.dtype() == aoti_torch_dtype_float32()    ? Scalar::f32
         : t.dtype() == aoti_torch_dtype_bfloat16() ? Scalar::bf16
                                                    : Scalar::f16;
}

void check_ends_on_host(const Call& call, const Tensor& ends, int64_t rows, int64_t E) {
  std::vector<int32_t> values(E);
  copy_to_host(values.data(), ends.data(), 4, E, ends.stride(0) * 4, call.stream);
  for (int64_t e = 0; e < E; e++) check_end(call.c, e, values[e], e ? values[e - 1] : 0, rows);
}
}  // namespace

RowMap sort_rows(const Call& call, const Tensor& ids, const Tensor& weights, int64_t E) {
  call.c.that(E <= kSortMaxExperts, "down", "E = " + std::to_string(E),
              "at most " + std::to_string(kSortMaxExperts) + " experts on a CUDA device");
  const int64_t K = ids.size(1), count = ids.size(0) * K;
  const SortPlan plan = plan_sort(count, E);
  const int64_t offsets = padded(E + 1), per_row = padded(count);
  RowMap rows{call.ints(offsets + 2 * per_row + (plan.blocks + 1) * E), call.floats(count)};
  RowSort a = {};
  a.ids = ids.data(), a.weights = weights.data();
  for (int i = 0; i < 2; i++) a.ids_stride[i] = ids.stride(i), a.weights_stride[i] = weights.stride(i);
  a.wide_ids = ids.dtype() == aoti_torch_dtype_int64(), a.weights_type = scalar_of(weights);
  a.count = count, a.K = static_cast<int32_t>(K), a.E = static_cast<int32_t>(E), a.piece = plan.piece;
  a.offsets = rows.ints.ptr<int32_t>(), a.token = a.offsets + offsets, a.row_of = a.token + per_row;
  a.block_counts = a.row_of + per_row, a.weight = rows.floats.ptr<float>();

  launch(count_experts_kernel, plan.blocks, kThreads, E * 4, call.stream, a);
  launch(scan_blocks_kernel, blocks_of(E, 32), dim3(32, kScanSegments), 0, call.stream, a, plan.blocks);
  launch(sort_rows_kernel, plan.blocks, plan.warps * 32, plan.warps * E * 4, call.stream, a);
  rows.offsets = a.offsets, rows.token = a.token, rows.row_of = a.row_of, rows.weight = a.weight;
  rows.R = count, rows.K = K;
  return rows;
}

Tensor clamped_offsets(const Call& call, const Tensor& ends, int64_t rows, int64_t E) {
  if (check_values()) check_ends_on_host(call, ends, rows, E);
  Tensor offsets = call.ints(E + 1);
  const SortedRows a = {ends.ptr<const int32_t>(), ends.stride(0), static_cast<int32_t>(E), static_cast<int32_t>(rows),
                        offsets.ptr<int32_t>()};
  launch(sorted_rows_kernel, 1, kThreads, 0, call.stream, a);
  return offsets;
}

RowMap sorted_rows(const Call& call, const Tensor& offsets, const OptTensor& weights, int64_t E) {
  const int64_t R = call.like.size(0);
  const bool as_they_are = weights && weights->dtype() == aoti_torch_dtype_float32() && weights->stride(0) == 1;
  RowMap rows{clamped_offsets(call, offsets, R, E), call.floats(weights && !as_they_are ? R : 0)};
  rows.offsets = rows.ints.ptr<int32_t>(), rows.R = R;
  if (as_they_are) {
    rows.weight = weights->ptr<const float>();
  } else if (weights) {
    if (R)
      launch(widen_weights_kernel, blocks_of(R, kThreads), kThreads, 0, call.stream, weights->data(),
             scalar_of(*weights), weights->stride(0), R, rows.floats.ptr<float>());
    rows.weight = rows.floats.ptr<float>();
  }
  return rows;
}
}  // namespace sail::cuda
