// How the sm_80 grouped GEMM is launched. The kernels of each dtype have a file of their own: they compile side by side.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/gemm_config.h"
#include "launcher.h"

namespace sail::cuda::sm80 {
template <class T, class Problem, class Arguments>
void run(const Problem& p, const Arguments& out, const Launch& launch);

struct Start {
  const Launch& with;
  Tiles tiles(const RowsProblem& p) const { return choose_tiles(p.R, p.E); }
  template <class Shape, class Problem, class Arguments>
  void launch(void (*kernel)(Problem, Arguments), int64_t tiles, const Problem& p, const Arguments& arguments) const {
    cuda::launch(kernel, grid_blocks(tiles, with.sm_count, Shape::kBlocks), Shape::kThreads, Shape::kSharedBytes,
                 stream_of(with), p, arguments);
  }
};
}  // namespace sail::cuda::sm80
