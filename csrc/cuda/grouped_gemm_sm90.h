// How the grouped GEMM for Hopper is launched. The kernels of each dtype have a file of their own: they compile side by
// side, for sm_90a alone, as no other target has wgmma.
#pragma once
#include "kernels/dispatch_sm90.cuh"
#include "launcher.h"
#include "tensor_map.h"

namespace sail::cuda::sm90 {
template <class T, class Problem, class Arguments>
bool run(const Problem& p, const Arguments& out, const Launch& launch);

struct Start {
  const Launch& with;

  bool encode(const TensorBox& b, CUtensorMap* map) const { return cuda::encode(b, with.dtype, map); }

  int paired(const RowsProblem& p) const { return with.clusters && with.sm_count > 1 && choose_pairs(p.R, p.E); }

  // paired: clusters of two blocks
  template <class Arguments>
  void launch(void (*kernel)(Arguments), int64_t tiles, const Arguments& arguments, int paired = 0) const {
    const int64_t each = 1 + paired, most = with.sm_count / each * each, all = ceil_div(tiles, each) * each;
    const Grid grid(all < most ? all : most, 1, static_cast<unsigned>(each));
    cuda::launch(kernel, grid, kThreads, kSharedBytes, stream_of(with), arguments);
  }
};
}  // namespace sail::cuda::sm90
