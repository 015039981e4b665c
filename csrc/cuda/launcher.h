// The one way to start a kernel, for every operator. What CUDA refuses (no device, too much shared memory, a grid without
// blocks) throws at once, so that no later kernel reads what was never written; nothing here waits for the device.
#pragma once
#include <cuda_runtime.h>
#include <string.h>

#include <stdexcept>
#include <string>

#include "kernels/grouped_gemm.h"

namespace sail::cuda {
// Where an operator's kernels run, and its name for errors.
struct Stream {
  const char* op;
  cudaStream_t handle;
};
inline Stream stream_of(const Launch& launch) { return {launch.op, static_cast<cudaStream_t>(launch.stream)}; }

// An error is taken from cudaGetLastError too, where torch's next check would find it.
inline void check_cuda(const char* op, cudaError_t e) {
  if (e == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error("sail_ops." + std::string(op) + ": CUDA: " + cudaGetErrorString(e));
}

// A grid; `cluster` of its blocks along x are one cluster.
struct Grid {
  int64_t x;
  unsigned y = 1, cluster = 1;
  Grid(int64_t blocks, unsigned rows = 1, unsigned of_cluster = 1) : x(blocks), y(rows), cluster(of_cluster) {}
};

// Blocks get 48 KB of shared memory unasked; a kernel's static arrays are among them, and the host does not know those.
constexpr int64_t kSharedUnasked = 32 * 1024;

template <class... P, class... A>
void launch(void (*kernel)(P...), const Grid& grid, dim3 threads, int64_t shared_bytes, const Stream& stream,
            const A&... args) {
  if (grid.x > INT32_MAX)
    throw std::runtime_error("sail_ops." + std::string(stream.op) + ": more than 2^31 - 1 blocks");
  if (shared_bytes > kSharedUnasked)
    check_cuda(stream.op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(shared_bytes)));
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = grid.cluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), grid.y), config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes), config.stream = stream.handle;
  config.attrs = &cluster, config.numAttrs = grid.cluster > 1;
  check_cuda(stream.op, cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...));
}

// `count` elements, `stride` bytes apart on the device (0: one for all); waits for what is in the stream.
inline void copy_to_host(void* to, const void* from, int64_t element_bytes, int64_t count, int64_t stride,
                         const Stream& stream) {
  const bool whole = stride == element_bytes;
  const auto bytes = static_cast<size_t>(element_bytes), n = static_cast<size_t>(count);
  const size_t width = whole ? n * bytes : bytes, height = whole || !stride ? 1 : n;
  if (!n) return;
  check_cuda(stream.op, cudaMemcpy2DAsync(to, width, from, height > 1 ? static_cast<size_t>(stride) : width, width,
                                          height, cudaMemcpyDeviceToHost, stream.handle));
  check_cuda(stream.op, cudaStreamSynchronize(stream.handle));
  if (!stride)
    for (size_t i = 1; i < n; i++) memcpy(static_cast<char*>(to) + i * bytes, to, bytes);
}
}  // namespace sail::cuda
