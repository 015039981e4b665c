// The three matrix products of an expert layer, for one thread on one block; tables indexed by DType.
//   dot_gemm    C[M, N]  = A[M, K] . B[N, K]^T   both operands contiguous along K: forward, B is read once, never packed
//   outer_gemm  C[M, N]  = A[M, K] . B[K, N]     B contiguous along N: gradients of activations
//   wgrad_gemm  O[M, N] (+)= A[R, M]^T . B[R, N] few rows, many outputs: gradients of weights
// A rows (and wgrad's B rows) come as pointers, so that a gather costs nothing. C is fp32, O is T or fp32.
#pragma once
#include "../isa.h"

namespace sail::cpu {
enum class Output { overwrite, accumulate };

struct GemmBlock {
  const void* const* a_rows;  // M pointers to K elements (wgrad: R pointers to M elements, already offset)
  const void* b;              // dot: row n at b + n * ldb; outer: row k at b + k * ldb (elements)
  int64_t ldb, M, N, K;
  float* c;
  int64_t ldc;
  bool accumulate;  // outer_gemm: C += A . B
  void* scratch;    // outer_gemm: kOuterScratch bytes, 64-byte aligned
};

struct WgradBlock {
  const void* const* a_rows;  // R pointers; columns m0 .. m0 + M are used
  const void* const* b_rows;  // R pointers to N elements
  int64_t R, m0, M, N;
  void* out;  // row m at out + m * ldo (elements), m counted from 0
  int64_t ldo;
  Output mode;
  void* scratch;  // scratch_bytes, 64-byte aligned, at least wgrad_scratch(R, M)
  int64_t scratch_bytes;
};

// Bounds that hold for every instruction set.
constexpr int64_t kOuterRows = 128;  // largest M of outer_gemm: its packed A stays below 48 KB
constexpr int64_t kOuterScratch = kOuterRows * 80 * 4;
constexpr int64_t wgrad_scratch(int64_t R, int64_t M) { return (R + 1) * (M + 64) * 4 + (R + 1) * 128; }

struct GemmKernels {
  void (*dot_gemm[3])(const GemmBlock&);
  void (*outer_gemm[3])(const GemmBlock&);
  void (*wgrad_gemm[3])(const WgradBlock&);      // O in the operands' dtype
  void (*wgrad_gemm_f32[3])(const WgradBlock&);  // O in fp32
};
#define X(name) SAIL_DECLARE_TABLE(name, GemmKernels, kGemm)
SAIL_FOR_EACH_ISA(X)
#undef X

inline const GemmKernels& gemm_kernels() {
#define X(name) SAIL_TABLE_ADDRESS(name, kGemm)
  static const GemmKernels* const tables[] = {SAIL_FOR_EACH_ISA(X)};
#undef X
  return *tables[static_cast<int>(active_isa())];
}
}  // namespace sail::cpu
