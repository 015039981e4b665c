// For tests/cuda/test_cuda_build.py: the launcher's encode() over a driver that refuses tensor maps.
#include "tensor_map.h"

#include <cstdio>

static CUresult refuse(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                       const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_ERROR_INVALID_VALUE;
}
extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                        cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(refuse), *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
extern "C" const char* cudaGetErrorString(cudaError_t) { return ""; }

int main() {
  using namespace sail::cuda;
  alignas(16) static char data[64];
  CUtensorMap map;
  std::printf("%d\n", encode(tensor_box(data + 2, 64, 5, 64, 2, 320, 128), Element::bf16, &map));  // not for TMA
  try {
    encode(tensor_box(data, 64, 5, 64, 2, 320, 128), Element::bf16, &map);
  } catch (const std::runtime_error& e) { std::printf("%s\n", e.what()); }
}
