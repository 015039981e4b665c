// A second opinion on grouped_mm: CUTLASS 4.2's grouped GEMM for sm_90a, for weights contiguous along k. Built with
// SAIL_OPS_CUTLASS=ON, taken with SAIL_OPS_CUDA_KERNELS=cutlass.
#ifndef NDEBUG
#error "build with -DNDEBUG: CUTLASS's device asserts serialize wgmma"
#endif
#include "../kernels/cutlass_groups.cuh"
#include "../launcher.h"
#include "grouped_mm.h"

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <stdexcept>
#include <string>

namespace sail::cuda {
namespace {
using cute::_1, cute::_128, cute::_2, cute::_256, cute::_64;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using ProblemShape = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;

// Cooperative, 128 x 256 x 64, clusters of two: CUTLASS's own choice for large groups; not tuned here
template <class T> struct Config {
  using Tile = cute::Shape<_128, _256, _64>;
  using Cluster = cute::Shape<_2, _1, _1>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor*, 8, T, RowMajor*, 8,
      cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative,
      cutlass::epilogue::fusion::LinearCombination<T, float>>::CollectiveOp;
  static constexpr int kEpilogueBytes = static_cast<int>(sizeof(typename Epilogue::SharedStorage));
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, RowMajor*, 8, T, ColumnMajor*, 8, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<kEpilogueBytes>,
      cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  static_assert(Kernel::SharedStorageSize <= 227 << 10);
};

template <class T> struct Described {
  using Kernel = typename Config<T>::Kernel;
  using Stride = typename Kernel::InternalStrideA;
  static_assert(std::is_same_v<Stride, typename Kernel::InternalStrideB> &&
                std::is_same_v<Stride, typename Kernel::InternalStrideD>);
  using Type = Groups<T, ProblemShape::UnderlyingProblemShape, Stride>;
};

template <class T>
typename Config<T>::Gemm::Arguments arguments(const RowsProblem& p, const typename Described<T>::Type& g,
                                              int sm_count) {
  cutlass::KernelHardwareInfo hardware;
  hardware.sm_count = sm_count;
  return {cutlass::gemm::GemmUniversalMode::kGrouped,
          {static_cast<int>(p.E), g.shape, nullptr},
          {g.a, g.a_stride, g.b, g.b_stride},
          {{1.f, 0.f}, nullptr, nullptr, g.d, g.d_stride},
          hardware};
}

template <class T> int64_t workspace(const RowsProblem& p, const Launch& launch) {
  typename Described<T>::Type g;
  const int64_t described = g.place(nullptr, p.E);
  return described + static_cast<int64_t>(Config<T>::Gemm::get_workspace_size(arguments<T>(p, g, launch.sm_count)));
}

void check(cutlass::Status s) {
  if (s != cutlass::Status::kSuccess)
    throw std::runtime_error(std::string("sail_ops: grouped GEMM: CUTLASS: ") + cutlassGetStatusString(s));
}

template <class T> void run(const RowsProblem& p, const StoreRows& out, const Launch& launch, char* memory) {
  const Stream stream = stream_of(launch);
  typename Described<T>::Type g;
  char* rest = memory + g.place(memory, p.E);
  cuda::launch(describe_groups_kernel<T, ProblemShape::UnderlyingProblemShape, typename Described<T>::Stride>,
               (p.E + 127) / 128, 128, 0, stream, p, out, g);
  if (p.zero_tail)
    cuda::launch(zero_tail_kernel, 4 * launch.sm_count, 256, 0, stream, static_cast<uint4*>(out.out), p.offsets + p.E,
                 p.R, p.N / 8);
  typename Config<T>::Gemm gemm;
  const auto a = arguments<T>(p, g, launch.sm_count);
  check(gemm.can_implement(a));
  check(gemm.initialize(a, rest, stream.handle));
  check(gemm.run(stream.handle));
}

int64_t workspace_of(const RowsProblem& p, const Launch& launch) {
  return launch.dtype == Element::bf16 ? workspace<cutlass::bfloat16_t>(p, launch)
                                       : workspace<cutlass::half_t>(p, launch);
}
void run_on(const RowsProblem& p, const StoreRows& out, const Launch& launch, void* memory) {
  char* at = static_cast<char*>(memory);
  launch.dtype == Element::bf16 ? run<cutlass::bfloat16_t>(p, out, launch, at)
                                : run<cutlass::half_t>(p, out, launch, at);
}
const CutlassGemm gemm = {cutlass_takes, workspace_of, run_on};
[[maybe_unused]] const bool linked = (cutlass_gemm = &gemm) != nullptr;
}  // namespace
}  // namespace sail::cuda
