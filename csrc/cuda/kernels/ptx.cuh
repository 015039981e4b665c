// The instructions from sm_80 on that C++ has no name for; with ptx_sm90.cuh the only inline assembly. PTX ISA 9.0:
// 9.7.13.1 (bar), 9.7.9.25.3 (cp.async), 9.7.14.5 (ldmatrix, mma). tests/cuda_emulation/ptx.h does the same on a CPU.
// Shared memory is named by 32-bit addresses: they cost one register.
#pragma once
#ifdef SAIL_EMULATE_CUDA
#include "ptx.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace sail::cuda::ptx {
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- a barrier of `threads` threads of the block, whole warps; id 0 is that of __syncthreads
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Counts as one that meets there, but goes on.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same value, but nothing that follows from it is computed ahead of the loop this stands in: addresses that are one
// instruction away would each hold a register all the time.
__device__ __forceinline__ uint32_t fresh(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- 2^x, two units in the last place off at most; subnormal results are 0, -inf gives 0
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- cp.async: 16 bytes to shared memory, the first `bytes` of them from global memory and zeros after; past L1.
// Both addresses are multiples of 16; with no bytes nothing is read. Or 8 bytes, through L1, with multiples of 8.
__device__ __forceinline__ void cp_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_8(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kPending` of this thread's groups are under way; the others see the data after a barrier.
template <int kPending> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- ldmatrix: four 8 x 8 matrices of 16-bit elements; lanes 8 j .. 8 j + 7 give the rows of matrix j. Lane l receives
// elements (l / 4, 2 (l % 4)) and the one right of it; transposed: elements (2 (l % 4), l / 4) and the one below.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// ---- mma, which the compiler may move: C[16, 8] += A[16, 16] . B[16, 8] in fp32. With g = lane / 4 and q = 2 (lane % 4):
//   a  (g, q) (g + 8, q) (g, q + 8) (g + 8, q + 8), each with the element right of it
//   b  (q, g) (q + 8, g), each with the element below;  c  (g, q) (g, q + 1) (g + 8, q) (g + 8, q + 1)
template <class T> __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
}  // namespace sail::cuda::ptx
#endif
