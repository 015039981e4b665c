// The functions of the CUDA runtime that csrc/cuda's host code calls, for a "card" that is the emulator: a launch runs
// the kernel there and then. With it the whole CUDA library compiles with g++ and works on CPU tensors
// (tests/support/emulated_library.py); the host's plan is then tested together with the kernels.
#pragma once
#include <stdlib.h>

#include <map>
#include <utility>

#include "../cuda_runtime.h"

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
struct cudaDeviceProp {
  char name[256];
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    uint3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emu {
// SAIL_EMULATED_CARD="8.0 3 166912": compute capability, multiprocessors, bytes of shared memory a block may have
struct EmulatedCard {
  int major = 8, minor = 0, sm_count = 3;
  long shared_limit = 166912;
  EmulatedCard() {
    if (const char* text = getenv("SAIL_EMULATED_CARD"))
      sscanf(text, "%d.%d %d %ld", &major, &minor, &sm_count, &shared_limit);
  }
};
inline uint64_t launches = 0;  // each launch has another order of threads
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t refuse() { return last_error = cudaErrorInvalidValue; }
inline std::map<const void*, size_t> shared_granted;  // to a kernel, above the 48 KB that any may have
}  // namespace emu

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const emu::EmulatedCard card;
  *value = which == cudaDevAttrMultiProcessorCount      ? card.sm_count
           : which == cudaDevAttrComputeCapabilityMajor ? card.major
           : which == cudaDevAttrComputeCapabilityMinor ? card.minor
                                                        : static_cast<int>(card.shared_limit);
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  strcpy(properties->name, "the emulator");
  return cudaSuccess;
}
template <class F> cudaError_t cudaFuncSetAttribute(F* f, cudaFuncAttribute, int bytes) {
  if (bytes > emu::EmulatedCard().shared_limit) return emu::refuse();
  emu::shared_granted[reinterpret_cast<const void*>(f)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(emu::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : "invalid value"; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                     size_t height, cudaMemcpyKind, cudaStream_t) {
  if (to_pitch < width || from_pitch < width) return emu::refuse();
  for (size_t i = 0; i < height; i++)
    memcpy(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width);
  return cudaSuccess;
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const A&... args) {
  const size_t granted = emu::shared_granted[reinterpret_cast<const void*>(kernel)];
  const unsigned cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  if (!config->gridDim.count() || config->gridDim.x % cluster ||
      config->dynamicSmemBytes > std::max<size_t>(granted, 48 << 10))
    return emu::refuse();
  emu::Options options;
  options.seed = emu::launches++;
  options.shared_bytes = config->dynamicSmemBytes;
  options.cluster = cluster;
  emu::launch(config->gridDim, config->blockDim, options, [&] { kernel(args...); });
  return cudaSuccess;
}
