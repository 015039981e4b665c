// The instructions that only Hopper has; no other file holds inline assembly for it. PTX ISA 9.0, chapters 9.7.9.27
// (tensor copies), 9.7.13.15 (mbarrier), 9.7.16 (wgmma). tests/cuda_emulation/ptx_sm90.h does the same on a CPU.
#pragma once
#include "ptx.cuh"
#ifdef SAIL_EMULATE_CUDA
#include "ptx_sm90.h"
#else
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace sail::cuda::ptx {
// ---- barriers in shared memory: a phase ends when `count` arrivals and all promised bytes have come
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// Makes initialized barriers known to the copy engine and to the cluster; a barrier of all threads, or of all blocks of
// the cluster, follows it.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Arrives once this thread's earlier cp.async have landed; it is one of the barrier's `count` arrivals.
__device__ __forceinline__ void mbarrier_arrive_cp_async(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Waits until the phase of this parity has ended: right after init, parity 1 counts as ended.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait_%=;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- clusters: blocks that run at once and reach each other's shared memory, at the same addresses as their own
// A barrier of all threads of all blocks.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}
// At the barrier that the block of this rank has in the place of ours. Released to our own block alone, as in CUTLASS:
// to the cluster it costs a MEMBAR.GPU, and what it passes on is no data but the right to overwrite what wgmma has read.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Orders ordinary accesses to shared memory before those of the copy engine and of wgmma.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- tensor copies: a box of the map, innermost coordinate first, to shared memory; zeros outside of the tensor
__device__ __forceinline__ void tma_load(void* to, const CUtensorMap* map, uint64_t* barrier, int32_t x, int32_t y,
                                         int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

__device__ __forceinline__ void tma_load(void* to, const CUtensorMap* map, uint64_t* barrier, int32_t x, int32_t y,
                                         int32_t z, int32_t w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// The same to the blocks of the cluster in this mask of ranks, each of which counts the bytes at its own barrier.
__device__ __forceinline__ void tma_load_to(uint16_t blocks, void* to, const CUtensorMap* map, uint64_t* barrier,
                                            int32_t x, int32_t y, int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "h"(blocks)
      : "memory");
}

// ---- registers of a warp group: the kernel needs a cap at entry (__launch_bounds__), and every role one branch
template <int kRegisters> __device__ __forceinline__ void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> __device__ __forceinline__ void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- wgmma
// Before the first wgmma, and whenever registers that it reads or writes were touched by other instructions.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending groups are in flight.
template <int kPending> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler takes operands for read and written when wgmma was issued: this keeps other uses of them on their side of
// the fence or wait.
template <int N> __device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N> __device__ __forceinline__ void hold(uint32_t (&a)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(a[i])::"memory");
}

// d[64, kN] = (kAdd ? d : 0) + A[64, 16] B[kN, 16]^T. B by descriptor, A by descriptor or from registers; an operand along
// MN is stored along M or N instead of K. Thread t of the warp group holds row t / 32 * 16 + t % 32 / 4 (+ 8 in d[i] with
// i & 2) and columns i / 4 * 8 + t % 4 * 2 + (i & 1): of every 8 columns what mma.m16n8 gives. A in registers is what
// mma.m16n8k16 takes.
#define SAIL_OUT8(i)                                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define SAIL_OUT32(i) SAIL_OUT8(i), SAIL_OUT8(i + 8), SAIL_OUT8(i + 16), SAIL_OUT8(i + 24)
#define SAIL_OUT40 SAIL_OUT32(0), SAIL_OUT8(32)
#define SAIL_OUT48 SAIL_OUT40, SAIL_OUT8(40)
#define SAIL_OUT64 SAIL_OUT32(0), SAIL_OUT32(32)
#define SAIL_OUT128 SAIL_OUT64, SAIL_OUT32(64), SAIL_OUT32(96)
#define SAIL_D32                                                                                        \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
  "%27,%28,%29,%30,%31"
#define SAIL_D40 SAIL_D32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define SAIL_D48 SAIL_D40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define SAIL_D64 SAIL_D48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define SAIL_D128                                                                                         \
  SAIL_D64                                                                                                \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88," \
  "%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,"   \
  "%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define SAIL_WGMMA(n, type, list) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " " list "}, "

template <class T, int kN> struct Wgmma;
#define SAIL_DEFINE_WGMMA(T, type, n, list, outputs, p0, p1, p2, p3, p4, p5, p6)                          \
  template <> struct Wgmma<T, n> {                                                                        \
    template <bool kAdd, bool kMNA, bool kMNB>                                                            \
    static __device__ __forceinline__ void run(float (&d)[n / 2], uint64_t a, uint64_t b) {               \
      asm volatile(SAIL_WGMMA(n, type, list) "%" #p0 ", %" #p1 ", %" #p2 ", 1, 1, %" #p3 ", %" #p4 ";"    \
                   : outputs                                                                              \
                   : "l"(a), "l"(b), "n"(int(kAdd)), "n"(int(kMNA)), "n"(int(kMNB)));                     \
    }                                                                                                     \
    template <bool kAdd, bool kMNB>                                                                       \
    static __device__ __forceinline__ void run(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b) {   \
      asm volatile(SAIL_WGMMA(n, type, list) "{%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 ", %" #p5  \
                                             ", 1, 1, %" #p6 ";"                                          \
                   : outputs                                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(kAdd)), "n"(int(kMNB))); \
    }                                                                                                     \
  };
#define SAIL_DEFINE_WGMMAS(T, type)                                                   \
  SAIL_DEFINE_WGMMA(T, type, 64, SAIL_D32, SAIL_OUT32(0), 32, 33, 34, 35, 36, 37, 38) \
  SAIL_DEFINE_WGMMA(T, type, 80, SAIL_D40, SAIL_OUT40, 40, 41, 42, 43, 44, 45, 46)    \
  SAIL_DEFINE_WGMMA(T, type, 96, SAIL_D48, SAIL_OUT48, 48, 49, 50, 51, 52, 53, 54)    \
  SAIL_DEFINE_WGMMA(T, type, 128, SAIL_D64, SAIL_OUT64, 64, 65, 66, 67, 68, 69, 70)   \
  SAIL_DEFINE_WGMMA(T, type, 256, SAIL_D128, SAIL_OUT128, 128, 129, 130, 131, 132, 133, 134)
SAIL_DEFINE_WGMMAS(__nv_bfloat16, "bf16")
SAIL_DEFINE_WGMMAS(__half, "f16")
#undef SAIL_DEFINE_WGMMAS
#undef SAIL_DEFINE_WGMMA
#undef SAIL_WGMMA
#undef SAIL_D128
#undef SAIL_D64
#undef SAIL_D48
#undef SAIL_D40
#undef SAIL_D32
#undef SAIL_OUT128
#undef SAIL_OUT64
#undef SAIL_OUT48
#undef SAIL_OUT40
#undef SAIL_OUT32
#undef SAIL_OUT8

template <class T, int kN, bool kAdd, bool kMNA, bool kMNB>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b) {
  Wgmma<T, kN>::template run<kAdd, kMNA, kMNB>(d, a, b);
}
template <class T, int kN, bool kAdd, bool kMNB>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
  Wgmma<T, kN>::template run<kAdd, kMNB>(d, a, b);
}
}  // namespace sail::cuda::ptx
#endif
