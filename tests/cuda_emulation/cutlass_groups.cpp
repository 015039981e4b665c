// What CUTLASS's grouped GEMM is told of each expert, for tests/cuda/test_cuda_cutlass.py: the products are then made from
// that alone, as CUTLASS makes them.
#include "cutlass_groups.cuh"
#include "calls.h"

namespace {
using namespace sail::cuda;

struct Shape {
  int m, n, k;
};
struct One {};
struct Zero {};
struct Stride {
  int64_t rows;
  One one;
  Zero zero;
};

emu::Options options(int64_t seed) {
  emu::Options o;
  o.seed = static_cast<uint64_t>(seed);
  return o;
}

// D = A B^T, A [m, k], B [n, k], D [m, n] in rows of their strides
template <class T> void multiply(const Groups<T, Shape, Stride>& g, int64_t e) {
  const Shape s = g.shape[e];
  for (int i = 0; i < s.m; i++)
    for (int j = 0; j < s.n; j++) {
      float sum = 0;
      for (int k = 0; k < s.k; k++)
        sum += float(g.a[e][i * g.a_stride[e].rows + k]) * float(g.b[e][j * g.b_stride[e].rows + k]);
      g.d[e][i * g.d_stride[e].rows + j] = T(sum);
    }
}

template <class T> void grouped(const RowsProblem& p, const StoreRows& out, int64_t seed, int64_t blocks) {
  if (!cutlass_takes(p, out)) throw std::runtime_error("not for CUTLASS");
  Groups<T, Shape, Stride> g;
  std::vector<char> memory(g.place(nullptr, p.E), '\xff');
  if (g.place(memory.data(), p.E) != static_cast<int64_t>(memory.size())) throw std::runtime_error("another size");
  emu::launch((p.E + 127) / 128, 128, options(seed), [&] { describe_groups_kernel(p, out, g); });
  if (p.zero_tail)
    emu::launch(blocks, 256, options(seed),
                [&] { zero_tail_kernel(static_cast<uint4*>(out.out), p.offsets + p.E, p.R, p.N / 8); });
  for (int64_t e = 0; e < p.E; e++) multiply(g, e);
}

const char* run(const How& how, const RowsProblem& p, const StoreRows& out) {
  return emu::guard([&] {
    how.dtype == Element::bf16 ? grouped<__nv_bfloat16>(p, out, how.seed, how.blocks)
                               : grouped<__half>(p, out, how.seed, how.blocks);
  });
}
template <class Problem, class Output> const char* run(const How&, const Problem&, const Output&) {
  return "not for CUTLASS";
}
}  // namespace

#include "grouped_gemm_calls.h"
