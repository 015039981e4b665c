// Compiled, never linked: torch's own declarations of the stable C shim beside ours. Two declarations of one extern "C"
// function with different parameters or results do not compile (test_build.py also checks that they do not).
#define USE_CUDA  // torch declares the CUDA half only then; no CUDA header is needed for it
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/c/shim.h>

#include "../../csrc/torch/stable_abi.h"
#include "../../csrc/torch/stable_abi_cuda.h"

#ifdef SAIL_WRONG_SIGNATURE
extern "C" AOTITorchError aoti_torch_get_dim(AtenTensorHandle, int32_t*);
#endif

// one type, not two of one size
static_assert(std::is_same_v<decltype(sail::Conv<int64_t>::from(0)), StableIValue>);
