#include "kernels/attention_dispatch_sm90.cuh"
#include "launcher.h"
#include "tensor_map.h"

namespace sail::cuda::sm90 {
namespace {
struct Start {
  const Launch& with;
  bool encode(const TensorBox& b, CUtensorMap* map) const { return cuda::encode(b, with.dtype, map); }
  template <class Arguments>
  void launch(void (*kernel)(Arguments), int64_t blocks, int threads, int shared_bytes, const Arguments& a) const {
    cuda::launch(kernel, blocks, threads, shared_bytes, stream_of(with), a);
  }
};
}  // namespace

bool attention_forward(const AttentionForward& a, const Launch& launch) {
  return launch.dtype == Element::bf16 ? dispatch<__nv_bfloat16>(a, Start{launch}) : dispatch<__half>(a, Start{launch});
}
}  // namespace sail::cuda::sm90
