// What libtorch_cuda would give: a stream that nothing looks at, a guard for a device that is the CPU, its products.
#include "csrc/torch/stable_abi_cuda.h"

extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b) {
  return aoti_torch_cpu_mm_out(out, a, b);
}
AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle c, AtenTensorHandle a,
                                         AtenTensorHandle b, double beta, double alpha) {
  return aoti_torch_cpu_addmm_out(out, c, a, b, beta, alpha);
}
}
