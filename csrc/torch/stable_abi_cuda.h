// The part of the stable C shim that libtorch_cuda exports; only the CUDA library may use it.
#pragma once
#include "stable_abi.h"

extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle);
AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double,
                                         double);
}
