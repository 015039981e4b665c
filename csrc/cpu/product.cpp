#include "product.h"

#include <vector>

#include "kernels/experts.h"
#include "kernels/gemm.h"
#include "rows.h"
#include "tasks.h"

namespace sail::cpu {
namespace {
constexpr int64_t kColumns = 512;  // of fp32 results a task keeps in the second-level cache
constexpr int64_t kNarrow = 256;   // the same of product_tn, whose sums stay there over all of K
constexpr int64_t kDepth = 512;    // rows of a sum over K that product_tn packs at a time

struct Block {
  int64_t m0, m1, n0, n1;
};

std::vector<Block> blocks(int64_t M, int64_t N, int64_t rows, int64_t columns) {
  std::vector<Block> found;
  for_pieces(0, M, rows, [&](int64_t m0, int64_t m1) {
    for_pieces(0, N, columns, [&](int64_t n0, int64_t n1) { found.push_back({m0, m1, n0, n1}); });
  });
  return found;
}

const char* at(const void* p, DType dtype, int64_t i) { return static_cast<const char*>(p) + i * element_size(dtype); }

// out[M, n] of one task, from `products` of fp32 rows n apart
void store(DType dtype, const float* products, const Block& t, void* out, int64_t N) {
  const int64_t n = t.n1 - t.n0;
  expert_kernels().store_rows[static_cast<int>(dtype)](
      {products, n, t.m1 - t.m0, n, nullptr, nullptr, const_cast<char*>(at(out, dtype, t.m0 * N + t.n0)), N});
}
}  // namespace

bool torch_multiplies(DType dtype) {
#if defined(__x86_64__)
  if (dtype == DType::bf16) return active_isa() == Isa::avx512_bf16;
#endif
  return dtype == DType::f32;
}

void product_nt(DType dtype, const void* a, const void* b, int64_t M, int64_t N, int64_t K, void* out) {
  run_tasks(blocks(M, N, kOuterRows, kColumns), num_threads(), kOuterRows * kColumns * 4,
            [&](const Block& t, char* scratch) {
              const void* rows[kOuterRows];
              for (int64_t m = t.m0; m < t.m1; m++) rows[m - t.m0] = at(a, dtype, m * K);
              float* c = reinterpret_cast<float*>(scratch);
              const int64_t n = t.n1 - t.n0;
              gemm_kernels().dot_gemm[static_cast<int>(dtype)](
                  {rows, at(b, dtype, t.n0 * K), K, t.m1 - t.m0, n, K, c, n, false, nullptr});
              store(dtype, c, t, out, N);
            });
}

void product_nn(DType dtype, const void* a, const void* b, int64_t M, int64_t N, int64_t K, void* out,
                bool accumulate) {
  const auto store_rows = expert_kernels().store_rows[static_cast<int>(dtype)];
  run_tasks(blocks(M, N, kOuterRows, kColumns), num_threads(), kOuterRows * kColumns * 4 + kOuterScratch,
            [&](const Block& t, char* scratch) {
              const void* rows[kOuterRows];
              for (int64_t m = t.m0; m < t.m1; m++) rows[m - t.m0] = at(a, dtype, m * K);
              float* c = reinterpret_cast<float*>(scratch);
              const int64_t n = t.n1 - t.n0;
              gemm_kernels().outer_gemm[static_cast<int>(dtype)](
                  {rows, at(b, dtype, t.n0), N, t.m1 - t.m0, n, K, c, n, false, scratch + kOuterRows * kColumns * 4});
              if (!accumulate) return store(dtype, c, t, out, N);
              for (int64_t m = t.m0; m < t.m1; m++) {  // what is there is this row's bias
                char* row = const_cast<char*>(at(out, dtype, m * N + t.n0));
                store_rows({c + (m - t.m0) * n, n, 1, n, row, nullptr, row, N});
              }
            });
}

void product_tn(DType dtype, const void* a, const void* b, int64_t M, int64_t N, int64_t K, void* out) {
  constexpr int64_t table_bytes = 2 * kDepth * static_cast<int64_t>(sizeof(void*));
  constexpr int64_t sums_bytes = kOuterRows * kNarrow * 4;
  const int64_t packed_bytes = wgrad_scratch(kDepth, kOuterRows) + kDepth * (kOuterRows + kNarrow) * 4;
  run_tasks(blocks(M, N, kOuterRows, kNarrow), num_threads(), table_bytes + sums_bytes + packed_bytes,
            [&](const Block& t, char* scratch) {
              const void** a_rows = reinterpret_cast<const void**>(scratch);
              const void** b_rows = a_rows + kDepth;
              float* sums = reinterpret_cast<float*>(scratch + table_bytes);
              const int64_t n = t.n1 - t.n0;
              for (int64_t k0 = 0; k0 < K; k0 += kDepth) {
                const int64_t k = std::min(kDepth, K - k0);
                for (int64_t i = 0; i < k; i++)
                  a_rows[i] = at(a, dtype, (k0 + i) * M), b_rows[i] = at(b, dtype, (k0 + i) * N + t.n0);
                gemm_kernels().wgrad_gemm_f32[static_cast<int>(dtype)](
                    {a_rows, b_rows, k, t.m0, t.m1 - t.m0, n, sums, n, k0 ? Output::accumulate : Output::overwrite,
                     scratch + table_bytes + sums_bytes, packed_bytes});
              }
              store(dtype, sums, t, out, N);
            });
}
}  // namespace sail::cpu
