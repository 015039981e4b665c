#include "card.h"

#include <stdlib.h>

#include "launch.h"

namespace sail::cuda {
namespace {
int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t e = cudaDeviceGetAttribute(&value, which, device);
  if (e != cudaSuccess) throw std::runtime_error(std::string("sail_ops: CUDA: ") + cudaGetErrorString(e));
  return value;
}

std::string arch_list() {
  std::string text = "sm_";
  for (const char* p = SAIL_CUDA_ARCHS; *p; p++) text += *p == ',' ? std::string(", sm_") : std::string(1, *p);
  return text;
}

bool kernels_wanted(const char* which) {
  const char* kernels = getenv("SAIL_OPS_CUDA_KERNELS");
  return kernels && !strcmp(kernels, which);
}

[[noreturn]] void fail_unsupported(const Check& c, int device, int major, int minor) {
  cudaDeviceProp properties = {};
  cudaGetDeviceProperties(&properties, device);
  const std::string arch = std::to_string(major * 10 + minor);
  const std::string card = std::string(properties.name) + " (sm_" + arch + ")";
  const std::string advice =
      major < 8 ? "; cards before compute capability 8.0 have no bf16 and are not supported"
                : "; build for it with SAIL_OPS_CUDA_ARCHS=\"" + arch + "\" pip install -e . in the source folder";
  throw std::runtime_error("sail_ops." + std::string(c.op()) + ": no CUDA kernel for " + card +
                           ": this library was built for " + arch_list() + advice);
}
}  // namespace

Card card_of(const Check& c, const Tensor& t) {
  const int device = t.device_index();
  const Card card = {
      attribute(cudaDevAttrComputeCapabilityMajor, device), attribute(cudaDevAttrComputeCapabilityMinor, device),
      attribute(cudaDevAttrMultiProcessorCount, device), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
  if (card.major < 8 || !has_code(SAIL_CUDA_ARCHS, card.major, card.minor))
    fail_unsupported(c, device, card.major, card.minor);
  return card;
}

bool prefers_sm90(const Card& card) {
  static const bool forced = kernels_wanted("sm80");
  return card.major == 9 && card.minor == 0 && !forced;
}

bool prefers_cutlass(const Card& card) {
  static const bool wanted = kernels_wanted("cutlass");
  return card.major == 9 && card.minor == 0 && wanted;
}
}  // namespace sail::cuda

// For `python -m sail_ops` (ctypes): what this library was compiled for.
extern "C" __attribute__((visibility("default"))) const char* sail_cuda_archs() { return SAIL_CUDA_ARCHS; }
