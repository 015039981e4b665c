// What every CUDA host function needs around a launch.
#pragma once
#include <cuda_runtime.h>

#include "../torch/checks.h"
#include "../torch/stable_abi_cuda.h"

namespace sail::cuda {
inline cudaStream_t current_stream(const Tensor& t) {
  void* stream;
  ok(aoti_torch_get_current_cuda_stream(t.device_index(), &stream), "current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// A launch that was refused (no device, too much shared memory, ...) throws; nothing here waits for the device.
inline void check_launch(const char* op) {
  const cudaError_t e = cudaGetLastError();
  if (e != cudaSuccess) throw std::runtime_error("sail_ops." + std::string(op) + ": CUDA: " + cudaGetErrorString(e));
}

// Elements between the rows of [..., D]: the last dimension is contiguous, the others are walked by one stride.
inline int64_t row_stride(const Check& c, const char* arg, const Tensor& t) {
  const int64_t D = t.size(-1);
  int64_t stride = 0, rows = 1;
  bool even = D == 1 || t.stride(-1) == 1;
  for (int64_t i = t.dim() - 2; i >= 0; i--) {
    if (t.size(i) == 1) continue;
    if (rows == 1) stride = t.stride(i);
    even = even && t.stride(i) == stride * rows;
    rows *= t.size(i);
  }
  c.that(even || !rows, arg, "rows of uneven distance, shape " + shape_text(t), "a contiguous tensor");
  return stride;
}
}  // namespace sail::cuda
