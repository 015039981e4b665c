// Which rows a block of an attention kernel has, and where they lie.
#pragma once
#include "attention.h"
#include "ptx.cuh"

namespace sail::cuda {
struct Sequence {
  int batch, q0, nq, k0, nk;  // tokens q0 .. q0 + nq attend to tokens k0 .. k0 + nk
  // the last key that query i sees is i + behind
  __device__ __forceinline__ int behind(bool causal) const { return causal ? nk - nq : 1 << 30; }
};

struct Span {
  int first, count;
};
__device__ __forceinline__ Span span(const int32_t* cu, int64_t i, int64_t total) {
  const int most = static_cast<int>(total), first = max(0, min(cu[i], most));
  return {first, max(first, min(cu[i + 1], most)) - first};
}

__device__ __forceinline__ Sequence sequence(const Attention& a, int64_t i) {
  if (!a.cu_q) return {static_cast<int>(i), 0, static_cast<int>(a.S), 0, static_cast<int>(a.L)};
  const Span q = span(a.cu_q, i, a.S), k = span(a.cu_k, i, a.L);
  return {0, q.first, q.count, k.first, k.count};
}

struct RowBlock {
  Sequence s;
  int head, first;  // first: row of the sequence
};

// Block `index` of all: heads are neighbors, as those of a group share keys. Every sequence has ceil(tokens / kRows)
// blocks of `heads`; with kLastFirst the last ones come first, as in a causal one they take longest. False: no block.
template <int kRows, bool kLastFirst>
__device__ __forceinline__ bool find_block(const Attention& a, const int32_t* cu, int64_t tokens, int64_t heads,
                                           RowBlock* out) {
  const auto heads32 = static_cast<uint32_t>(heads), rest = blockIdx.x / heads32;
  out->head = static_cast<int>(blockIdx.x % heads32);
  int blocks, block;
  if (!cu) {
    const auto B = static_cast<uint32_t>(a.B);
    blocks = static_cast<int>(ceil_div(tokens, kRows)), block = static_cast<int>(rest / B);
    out->s = sequence(a, rest % B);
  } else {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int before = 0;
    int64_t first = 0;
    while (true) {  // 32 sequences at a time, a lane each
      if (first >= a.B) return false;
      const int own = first + lane < a.B ? static_cast<int>(ceil_div(span(cu, first + lane, tokens).count, kRows)) : 0;
      int end = own;
#pragma unroll
      for (int o = 1; o < 32; o *= 2) {
        const int lower = __shfl_up_sync(~0u, end, o);
        if (lane >= o) end += lower;
      }
      const int total = __shfl_sync(~0u, end, 31), index = static_cast<int>(rest) - before;
      if (index < total) {
        const int owner = __ffs(__ballot_sync(~0u, index < end)) - 1;
        blocks = __shfl_sync(~0u, own, owner), block = index - __shfl_sync(~0u, end - own, owner);
        out->s = sequence(a, first + owner);
        break;
      }
      before += total, first += 32;
    }
  }
  out->first = (kLastFirst ? blocks - 1 - block : block) * kRows;
  return true;
}

// What a block works on, in shared memory: in registers it would take the place of a loop's operands.
template <class Work> __device__ __forceinline__ const Work& share(const Work& mine) {
  __shared__ Work work;
  if (threadIdx.x == 0) work = mine;
  __syncthreads();
  return work;
}

template <class T> __device__ __forceinline__ const T* row_of(const HeadRows& x, int64_t b, int64_t t, int64_t h) {
  return static_cast<const T*>(x.data) + b * x.batch + t * x.token + h * x.head;
}
// Of a contiguous tensor with `heads` heads
__device__ __forceinline__ int64_t flat_row(int64_t tokens, int64_t heads, int64_t D, int64_t b, int64_t t, int64_t h) {
  return ((b * tokens + t) * heads + h) * D;
}
__device__ __forceinline__ int64_t lse_at(const Attention& a, const Sequence& s, int i, int head) {
  return (int64_t{s.batch} * a.H + head) * a.S + s.q0 + i;
}
}  // namespace sail::cuda
