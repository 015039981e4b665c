#include "product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/experts.h"
#include "kernels/gemm.h"
#include "rows.h"
#include "tasks.h"

namespace sail::cpu {
namespace {
constexpr int64_t kColumns = 512;  // of fp32 results a task keeps in the second-level cache
constexpr int64_t kNarrow = 256;   // the same of product_tn, whose sums stay there over all of K
constexpr int64_t kFewest = 64;    // columns of a task: what a few rows' weights are read in
constexpr int64_t kDepth = 512;    // rows of a sum over K that product_tn packs at a time

struct Block {
  int64_t m0, m1, n0, n1;
};

// Blocks of [M, N], at least two a thread where N allows: a few rows are all columns' work.
std::vector<Block> blocks(int64_t M, int64_t N, int64_t columns) {
  const int64_t row_blocks = (M + kOuterRows - 1) / kOuterRows, wanted = 2 * num_threads();
  if (row_blocks < wanted) {
    const int64_t each = (N * row_blocks + wanted - 1) / wanted;
    columns = std::clamp<int64_t>((each + kFewest - 1) / kFewest * kFewest, kFewest, columns);
  }
  std::vector<Block> found;
  for_pieces(0, M, kOuterRows, [&](int64_t m0, int64_t m1) {
    for (int64_t n0 = 0; n0 < N; n0 += columns) found.push_back({m0, m1, n0, std::min(N, n0 + columns)});
  });
  return found;
}

const char* at(DType dtype, const void* p, int64_t i) { return static_cast<const char*>(p) + i * element_size(dtype); }
const char* at(DType dtype, Matrix m, int64_t row, int64_t column) {
  return at(dtype, m.data, row * m.stride + column);
}

// rows[i] = row r0 + i of m, from `column` on
void point(DType dtype, Matrix m, int64_t r0, int64_t r1, int64_t column, const void** rows) {
  for (int64_t r = r0; r < r1; r++) rows[r - r0] = at(dtype, m, r, column);
}

constexpr int64_t kSumsBytes = kOuterRows * kColumns * 4, kProductScratch = kSumsBytes + kOuterScratch;

// One task's fp32 sums, rows t.n1 - t.n0 apart; b: its columns' part of the other operand
const float* multiply(void (*gemm)(const GemmBlock&), DType dtype, Matrix a, const void* b, int64_t ldb, int64_t K,
                      const Block& t, char* scratch) {
  const void* rows[kOuterRows];
  point(dtype, a, t.m0, t.m1, 0, rows);
  float* c = reinterpret_cast<float*>(scratch);
  gemm({.a_rows = rows,
        .b = b,
        .ldb = ldb,
        .M = t.m1 - t.m0,
        .N = t.n1 - t.n0,
        .K = K,
        .c = c,
        .ldc = t.n1 - t.n0,
        .accumulate = false,
        .scratch = scratch + kSumsBytes});
  return c;
}

// out[M, n] of one task, from `products` of fp32 rows n apart
void store(DType dtype, const float* products, const void* bias, const Block& t, void* out, int64_t N) {
  const int64_t n = t.n1 - t.n0;
  const void* b = bias ? at(dtype, bias, t.n0) : nullptr;
  expert_kernels().store_rows[static_cast<int>(dtype)](
      {products, n, t.m1 - t.m0, n, b, nullptr, const_cast<char*>(at(dtype, out, t.m0 * N + t.n0)), N});
}

void clear(DType dtype, void* out, int64_t count) {
  if (count) std::memset(out, 0, count * element_size(dtype));
}
}  // namespace

bool torch_multiplies(DType dtype) {
#if defined(__x86_64__)
  if (dtype == DType::bf16) return active_isa() == Isa::avx512_bf16;
#endif
  return dtype == DType::f32;
}

void product_nt(DType dtype, Matrix a, Matrix b, const void* bias, int64_t M, int64_t N, int64_t K, void* out) {
  const auto gemm = gemm_kernels().dot_gemm[static_cast<int>(dtype)];
  run_tasks(blocks(M, N, kColumns), num_threads(), kProductScratch, [&](const Block& t, char* scratch) {
    const float* c = multiply(gemm, dtype, a, at(dtype, b, t.n0, 0), b.stride, K, t, scratch);
    store(dtype, c, bias, t, out, N);
  });
}

void product_nn(DType dtype, Matrix a, Matrix b, int64_t M, int64_t N, int64_t K, void* out, bool accumulate) {
  if (!K) {
    if (!accumulate) clear(dtype, out, M * N);
    return;
  }
  const auto gemm = gemm_kernels().outer_gemm[static_cast<int>(dtype)];
  run_tasks(blocks(M, N, kColumns), num_threads(), kProductScratch, [&](const Block& t, char* scratch) {
    const float* c = multiply(gemm, dtype, a, at(dtype, b, 0, t.n0), b.stride, K, t, scratch);
    if (!accumulate) return store(dtype, c, nullptr, t, out, N);
    for (int64_t m = t.m0; m < t.m1; m++)  // what is there is this row's bias
      store(dtype, c + (m - t.m0) * (t.n1 - t.n0), at(dtype, out, m * N), {m, m + 1, t.n0, t.n1}, out, N);
  });
}

void product_tn(DType dtype, Matrix a, Matrix b, int64_t M, int64_t N, int64_t K, void* out) {
  if (!K) return clear(dtype, out, M * N);
  constexpr int64_t table_bytes = 2 * kDepth * static_cast<int64_t>(sizeof(void*));
  constexpr int64_t sums_bytes = kOuterRows * kNarrow * 4;
  const int64_t packed_bytes = wgrad_scratch(kDepth, kOuterRows) + kDepth * (kOuterRows + kNarrow) * 4;
  const auto gemm = gemm_kernels().wgrad_gemm_f32[static_cast<int>(dtype)];
  run_tasks(blocks(M, N, kNarrow), num_threads(), table_bytes + sums_bytes + packed_bytes,
            [&](const Block& t, char* scratch) {
              const void** a_rows = reinterpret_cast<const void**>(scratch);
              const void** b_rows = a_rows + kDepth;
              float* sums = reinterpret_cast<float*>(scratch + table_bytes);
              const int64_t n = t.n1 - t.n0;
              for (int64_t k0 = 0; k0 < K; k0 += kDepth) {
                const int64_t k1 = std::min(k0 + kDepth, K);
                point(dtype, a, k0, k1, 0, a_rows), point(dtype, b, k0, k1, t.n0, b_rows);
                gemm({.a_rows = a_rows,
                      .b_rows = b_rows,
                      .R = k1 - k0,
                      .m0 = t.m0,
                      .M = t.m1 - t.m0,
                      .N = n,
                      .out = sums,
                      .ldo = n,
                      .mode = k0 ? Output::accumulate : Output::overwrite,
                      .scratch = scratch + table_bytes + sums_bytes,
                      .scratch_bytes = packed_bytes});
              }
              store(dtype, sums, nullptr, t, out, N);
            });
}
}  // namespace sail::cpu
