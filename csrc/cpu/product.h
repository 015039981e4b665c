// Dense products on the expert layer's kernels, where torch's are slow: its fp16 runs at 1 to 40 GFLOP/s on any CPU
// without AVX512-FP16, its bf16 at 1 to 70 without AVX512-BF16 (linear-cpu-rule). Sums are fp32, rounded once.
#pragma once
#include "../torch/checks.h"

namespace sail::cpu {
// Whether torch's own products are to be taken: those of fp32, and of bf16 where the instruction set has it.
bool torch_multiplies(DType dtype);

// Row-major, rows `stride` elements apart.
struct Matrix {
  const void* data;
  int64_t stride;
};

// out[M, N] = a[M, K] . b[N, K]^T + bias[N], which may be null
void product_nt(DType dtype, Matrix a, Matrix b, const void* bias, int64_t M, int64_t N, int64_t K, void* out);
// out[M, N] = a[M, K] . b[K, N], added to what is there where `accumulate`
void product_nn(DType dtype, Matrix a, Matrix b, int64_t M, int64_t N, int64_t K, void* out, bool accumulate);
// out[M, N] = a[K, M]^T . b[K, N]
void product_tn(DType dtype, Matrix a, Matrix b, int64_t M, int64_t N, int64_t K, void* out);
}  // namespace sail::cpu
