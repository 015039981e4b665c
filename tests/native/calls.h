// What the libraries that tests compile export, each function once: its definition and its binding (module.cpp) read the
// same line. Text in return: what a launch ended with, null where it went well.
#pragma once
#include "cuda_runtime.h"

#include "attention.h"
#include "combine.cuh"
#include "gemm_config.h"
#include "routing_metadata.cuh"

namespace sail::cuda {
// How a test launches a kernel: on so many blocks, its threads in the order that `seed` draws.
struct How {
  Element dtype;
  sm80::Tiles tiles;
  int64_t seed, blocks;
  bool paired;  // sm_90a: in clusters of two
};
}  // namespace sail::cuda

extern "C" {
using namespace sail::cuda;

// ---- every emulated library: ranges that asynchronous copies may touch; none named: any
void allow(const void* p, int64_t bytes);
void forget_allowed();

// ---- grouped_gemm_sm80.cpp, grouped_gemm_sm90.cpp, cutlass_groups.cpp
const char* store_rows(const How& how, const RowsProblem& p, const StoreRows& out);
const char* gated_forward(const How& how, const RowsProblem& p, const GatedForward& out);
const char* gated_backward(const How& how, const RowsProblem& p, const GatedBackward& out);
const char* wgrad(const How& how, const WgradProblem& p, const StoreGrad& out);
// The first `most` tiles that blocks take of p, one (number, expert, row, row_end, n, shares_b) each, and their count; of
// pairs, with the number of a pair's tile for both.
const char* row_tiles(const RowsProblem& p, const How& how, int64_t tile_rows, int64_t n_tiles, int64_t most,
                      int64_t* found, int64_t* count);
int64_t bank_conflicts();

// ---- attention_sm80.cpp, attention_sm90.cpp (forward alone)
const char* forward(const How& how, const AttentionForward& a);
const char* decode(const How& how, const AttentionDecode& a);
const char* backward(const How& how, const AttentionBackward& a);

// ---- expert_rows.cpp
const char* sort_rows(int64_t seed, const RowSort& a);
const char* clamp_ends(int64_t seed, const SortedRows& a);
const char* combine(bool vectors, const Combine& a, int64_t T, int64_t threads);
const char* expert_sums(bool vectors, const ExpertSum& a, int64_t E);
}
