// A second opinion on grouped_mm: CUTLASS 4.2's grouped GEMM for sm_90a, for weights contiguous along k. Built with
// SAIL_OPS_CUTLASS=ON, taken with SAIL_OPS_CUDA_KERNELS=cutlass.
#ifndef NDEBUG
#error "build with -DNDEBUG: CUTLASS's device asserts serialize wgmma"
#endif
#include "grouped_mm.h"

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

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
};

// What CUTLASS reads of each expert, in device memory.
template <class T> struct Groups {
  using Kernel = typename Config<T>::Kernel;
  ProblemShape::UnderlyingProblemShape* shape;
  const T **a, **b;
  T** d;
  typename Kernel::InternalStrideA* a_stride;
  typename Kernel::InternalStrideB* b_stride;
  typename Kernel::InternalStrideD* d_stride;

  // Lays the arrays out from `at` (null: only counts); returns the bytes.
  int64_t place(char* at, int64_t E) {
    int64_t used = 0;
    const auto next = [&](auto*& p) {
      p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(at + used);
      used += (E * static_cast<int64_t>(sizeof *p) + 255) / 256 * 256;
    };
    next(shape), next(a), next(b), next(d), next(a_stride), next(b_stride), next(d_stride);
    return used;
  }
};

template <class T> __global__ void describe_groups_kernel(RowsProblem p, StoreRows out, Groups<T> g) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e >= p.E) return;
  const int32_t begin = p.offsets[e];
  g.shape[e] = cute::make_shape(p.offsets[e + 1] - begin, static_cast<int>(p.N), static_cast<int>(p.K));
  g.a[e] = static_cast<const T*>(p.a.data) + begin * p.a.stride;
  g.b[e] = static_cast<const T*>(p.b.first) + e * p.b.expert_stride;
  g.d[e] = static_cast<T*>(out.out) + begin * out.out_stride;
  cute::get<0>(g.a_stride[e]) = p.a.stride;
  cute::get<0>(g.b_stride[e]) = p.b.row_stride;
  cute::get<0>(g.d_stride[e]) = out.out_stride;
}

__global__ void zero_tail_kernel(uint4* out, const int32_t* first, int64_t rows, int64_t row_vectors) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, end = rows * row_vectors;
  for (int64_t i = *first * row_vectors + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < end;
       i += step)
    out[i] = uint4{};
}

template <class T> typename Config<T>::Gemm::Arguments arguments(const RowsProblem& p, const Groups<T>& g,
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
  Groups<T> g;
  const int64_t described = g.place(nullptr, p.E);
  const auto bytes = Config<T>::Gemm::get_workspace_size(arguments<T>(p, g, launch.sm_count));
  return described + static_cast<int64_t>(bytes);
}

template <class T> bool run(const RowsProblem& p, const StoreRows& out, const Launch& launch, char* memory) {
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  Groups<T> g;
  char* rest = memory + g.place(memory, p.E);
  describe_groups_kernel<T><<<static_cast<unsigned>((p.E + 127) / 128), 128, 0, stream>>>(p, out, g);
  if (p.zero_tail)
    zero_tail_kernel<<<4 * launch.sm_count, 256, 0, stream>>>(static_cast<uint4*>(out.out), p.offsets + p.E, p.R,
                                                              p.N / 8);
  typename Config<T>::Gemm gemm;
  const auto a = arguments<T>(p, g, launch.sm_count);
  return gemm.can_implement(a) == cutlass::Status::kSuccess &&
         gemm.initialize(a, rest, stream) == cutlass::Status::kSuccess && gemm.run(stream) == cutlass::Status::kSuccess;
}
}  // namespace

bool cutlass_takes(const RowsProblem& p, const StoreRows& out) {
  const auto aligned = [](const void* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
  };
  return p.layout == Layout::nk && !p.a.index && !p.b.second && !out.bias && !out.weight && out.out_stride == p.N &&
         aligned(p.a.data, p.a.stride) && aligned(p.b.first, p.b.row_stride) && p.b.expert_stride % 8 == 0 &&
         aligned(out.out, p.N) && p.K % 8 == 0;
}

int64_t cutlass_workspace(const RowsProblem& p, const Launch& launch) {
  return launch.dtype == Element::bf16 ? workspace<cutlass::bfloat16_t>(p, launch)
                                       : workspace<cutlass::half_t>(p, launch);
}

bool cutlass_grouped_gemm(const RowsProblem& p, const StoreRows& out, const Launch& launch, void* memory) {
  char* at = static_cast<char*>(memory);
  return launch.dtype == Element::bf16 ? run<cutlass::bfloat16_t>(p, out, launch, at)
                                       : run<cutlass::half_t>(p, out, launch, at);
}
}  // namespace sail::cuda
