// The grouped GEMMs of an expert layer as data, torch-free: what is multiplied, and what becomes of the products.
//   RowsProblem   C[r, n]    = sum_k A[row(r), k] * B[e][n, k]            r in [offsets[e], offsets[e + 1])
//   WgradProblem  C[e][m, n] = sum_r A[row_a(r), m] * B[row_b(r), n]      over the rows r of expert e
// bf16 or fp16 in, fp32 accumulation. Strides and offsets of matrices count elements in 64 bits. `offsets` lies in
// device memory: the host never knows how many rows an expert has, so a launch covers any split of R rows and tiles are
// handed out on the device (tile_scheduler.h). No float atomics: the same arguments give the same bits.
//
// grouped_gemm_sm80.cu and grouped_gemm_sm90.cu implement the same four functions in namespaces of their own.
// R rows sorted by expert, E experts, D hidden, F expert width, K top-k.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define SAIL_HD __host__ __device__
#else
#define SAIL_HD
#endif

namespace sail::cuda {
enum class Element { bf16 = 0, f16 = 1 };
enum class Activation { silu = 0, gelu = 1, gelu_tanh = 2 };  // as in csrc/cpu/kernels/experts.h

// Row r of a matrix lies at data + row(r) * stride, row(r) = r, or index[r] for a gather.
struct Rows {
  const void* data;      // [.., width], contiguous along the width
  int64_t stride;        // elements between rows
  const int32_t* index;  // [R] or null: r itself; for routed rows the token
  SAIL_HD int64_t row(int64_t r) const { return index ? index[r] : r; }
};

// A matrix for every expert, held in one part or in two stacked by rows: gate over up. Row i of expert e lies at
// (i < split ? first + i * row_stride : second + (i - split) * row_stride) + e * expert_stride.
template <class Pointer> struct Stacked {
  Pointer first, second;  // second == null and split >= rows: one part
  int64_t expert_stride;  // elements; the same for both
  int64_t row_stride;     // elements; contiguous along a row
  int64_t split;          // rows in the first part
  SAIL_HD int64_t at(int64_t e, int64_t i) const {
    return e * expert_stride + (i < split ? i : i - split) * row_stride;
  }
};

// Which way B lies in memory: [E, N, K], as torch.nn.Linear's weight, or [E, K, N].
enum class Layout { nk = 0, kn = 1 };

struct RowsProblem {
  Rows a;                  // [.., K]
  Stacked<const void*> b;  // rows are N (nk) or K (kn). GatedForward: nk, first = gate, second = up, split = N
  Layout layout;
  const int32_t* offsets;  // [E + 1], from 0, never falling, at most R
  int64_t R, E, N, K;      // R: most rows there can be. GatedForward: N = F pairs of columns
  bool zero_tail;          // StoreRows: rows [offsets[E], R) of C become exact zeros
};

struct WgradProblem {
  Rows a, b;               // [.., M] and [.., N]
  const int32_t* offsets;  // [E + 1], as above
  int64_t R, E, M, N;
};

// ---- what becomes of the products. [n, m] names row n, column m of a contiguous matrix; pointers may be null as noted.

// out[r, n] = (C[r, n] + bias[e, n]) * weight[r]
struct StoreRows {
  void* out;            // [R, N]
  int64_t out_stride;   // elements between rows
  const void* bias;     // [E, N] or null
  const float* weight;  // [R] or null: 1
};

// h = C + bias, a = act(min(h_gate, clamp)) * min(max(h_up, -clamp), clamp)
struct GatedForward {
  const void* bias;  // [E, 2F] or null
  void* h;           // [R, 2F] or null: gate, then up
  void* a;           // [R, F] or null
  Activation activation;
  float clamp;  // infinity: none
};

// C = dA, the gradient of a before weighting: dh = weight * dA * d(act(gate) * up), a_weighted = weight * a,
// dot[j, r] = sum of dA * a over the columns [64 j, 64 (j + 1)): the routing weight's gradient, to be added over j.
constexpr int64_t kDotColumns = 64;
struct GatedBackward {
  const void* h;        // [R, 2F], the saved pre-activation
  const float* weight;  // [R] or null: 1
  void* dh;             // [R, 2F] or null
  void* a_weighted;     // [R, F] or null
  float* dot;           // [ceil(F / kDotColumns), R] or null
  Activation activation;
  float clamp;
};

// out[e][m, n] = C[e][m, n], or += it. An expert without rows gets exact zeros, or keeps what is there.
struct StoreGrad {
  Stacked<void*> out;  // rows are M
  bool fp32;           // otherwise the operands' dtype
  bool accumulate;
};

// ---- launches; nothing synchronizes, everything may be captured into a graph
struct Launch {
  Element dtype;
  int sm_count;
  int64_t shared_limit;   // bytes of shared memory a block may have: cudaDevAttrMaxSharedMemoryPerBlockOptin
  void* stream;           // cudaStream_t
  const char* op;         // for errors: the operator that launches
  bool clusters = false;  // sm90: pairs of blocks share B where choose_pairs agrees
};

namespace sm80 {
void grouped_gemm(const RowsProblem& p, const StoreRows& out, const Launch& launch);
void grouped_gemm(const RowsProblem& p, const GatedForward& out, const Launch& launch);
void grouped_gemm(const RowsProblem& p, const GatedBackward& out, const Launch& launch);
void grouped_gemm(const WgradProblem& p, const StoreGrad& out, const Launch& launch);
}  // namespace sm80

// Like sm80's, on cards of compute capability 9.0; false: this problem is not for TMA (its alignment), nothing was
// launched, and sm80's function takes it.
namespace sm90 {
bool grouped_gemm(const RowsProblem& p, const StoreRows& out, const Launch& launch);
bool grouped_gemm(const RowsProblem& p, const GatedForward& out, const Launch& launch);
bool grouped_gemm(const RowsProblem& p, const GatedBackward& out, const Launch& launch);
bool grouped_gemm(const WgradProblem& p, const StoreGrad& out, const Launch& launch);
}  // namespace sm90
}  // namespace sail::cuda
