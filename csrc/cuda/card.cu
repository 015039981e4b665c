#include "card.h"

#include <stdlib.h>

#include <atomic>

#include "cutlass/grouped_mm.h"
#include "launch.h"

namespace sail::cuda {
const CutlassGemm* cutlass_gemm = nullptr;

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

// The values of SAIL_OPS_CUDA_KERNELS
enum class Kernels { best, sm80, cluster, cutlass };
Kernels kernels_named(const std::string& name) {
  if (name.empty()) return Kernels::best;
  if (name == "sm80") return Kernels::sm80;
  if (name == "cluster") return Kernels::cluster;
  if (name == "cutlass" && cutlass_gemm) return Kernels::cutlass;
  throw std::invalid_argument(
      "sail_ops: SAIL_OPS_CUDA_KERNELS: got '" + name + "', expected sm80" +
      (cutlass_gemm ? ", cluster or cutlass" : " or cluster; cutlass needs a library built with SAIL_OPS_CUTLASS=ON"));
}
std::atomic<Kernels>& kernels_wanted() {
  static std::atomic<Kernels> wanted = [] {
    const char* text = getenv("SAIL_OPS_CUDA_KERNELS");
    return kernels_named(text ? text : "");
  }();
  return wanted;
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
  thread_local Card card;  // of `known`: a thread mostly stays on one card
  thread_local std::optional<int> known;
  const int device = t.device_index();
  if (known == device) return card;
  card = {attribute(cudaDevAttrComputeCapabilityMajor, device), attribute(cudaDevAttrComputeCapabilityMinor, device),
          attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
  known.reset();
  if (card.major < 8 || !has_code(SAIL_CUDA_ARCHS, card.major, card.minor))
    fail_unsupported(c, device, card.major, card.minor);
  kernels_wanted();  // a name that is none is said by every operator
  known = device;
  return card;
}

Stream current_stream(const Check& c, const Tensor& t) {
  card_of(c, t);
  void* stream;
  ok(aoti_torch_get_current_cuda_stream(t.device_index(), &stream), "current CUDA stream");
  return {c.op(), static_cast<cudaStream_t>(stream)};
}

bool prefers_sm90(const Card& card) { return card.major == 9 && card.minor == 0 && kernels_wanted() != Kernels::sm80; }

bool prefers_clusters(const Card& card) {
  return card.major == 9 && card.minor == 0 && kernels_wanted() == Kernels::cluster;
}

bool prefers_cutlass(const Card& card) {
  return card.major == 9 && card.minor == 0 && kernels_wanted() == Kernels::cutlass;
}
}  // namespace sail::cuda

// For `python -m sail_ops` (ctypes): what this library was compiled for.
extern "C" __attribute__((visibility("default"))) const char* sail_cuda_archs() { return SAIL_CUDA_ARCHS; }
extern "C" __attribute__((visibility("default"))) bool sail_cuda_has_cutlass() { return sail::cuda::cutlass_gemm; }
// For benchmarks: takes the place of SAIL_OPS_CUDA_KERNELS from now on, in the whole process. "", or "error: ..."
extern "C" __attribute__((visibility("default"))) const char* sail_cuda_set_kernels(const char* name) {
  static thread_local std::string text;
  text.clear();
  try {
    sail::cuda::kernels_wanted() = sail::cuda::kernels_named(name);
  } catch (const std::exception& e) { text = std::string("error: ") + e.what(); }
  return text.c_str();
}
