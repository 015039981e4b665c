// Attention on blocks of rows, for one thread; tables indexed by DType.
// The rows of a block are (query, head) pairs of one key/value head, queries slowest: each sees the keys 0 .. limit, and
// limit never falls from one row to the next. Keys and values come packed, one block of kernels.block[dtype] at a time.
#pragma once
#include "../isa.h"

namespace sail::cpu {
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxAttentionRows = 128;  // of a block, for any dtype

static constexpr int64_t attention_width(int64_t D) { return (D + 31) / 32 * 32; }  // D in whole panels of any ISA
static constexpr int64_t attention_pack_bytes(int64_t D) {
  return 256 * attention_width(D);
}  // of one block, either form
constexpr int64_t kForwardScratch = 512 << 10, kBackwardScratch = 1536 << 10;  // for any D

struct AttentionPack {
  const char* rows;  // n rows of D elements, row_bytes apart
  int64_t row_bytes, n, D;
  void* out;  // attention_pack_bytes(D), 64-byte aligned
};

struct AttentionForward {
  const void* const* q;  // M rows of D
  void* const* out;
  float* const* lse;
  const int64_t* limit;  // [M]
  int64_t M, D;
  const char *k_transposed, *v_rows;  // packed blocks
  float scale;
  void* scratch;  // kForwardScratch, 64-byte aligned
};

struct AttentionBackward {
  const void *const *q, *const *dout;  // M rows of D
  void* const* dq;
  const float *lse, *dlse, *dout_out;  // [M]; dlse: gradient of lse; dout_out: <dout, out>
  const int64_t* limit;                // [M]
  int64_t M, D;
  const char *k_transposed, *v_transposed, *k_rows;  // packed blocks
  float *dk, *dv;                                    // [keys, attention_width(D)], added to; dk without the scale
  float scale;
  void* scratch;  // kBackwardScratch, 64-byte aligned
};

// p[m][c] = exp(scale * s[m][c] - max[m]) for c < visible[m], else 0; total[m] is their sum
struct AttentionSoftmax {
  float* s;  // [M, N], rows N apart; overwritten
  int64_t M, N;
  const int64_t* visible;  // [M], may be negative
  float scale;
  void* p;  // [M, N] of T
  float *max, *total;
};

// out = sum_i exp(max_i - m) o_i / l, l = sum_i exp(max_i - m) total_i, m = max_i max_i: parts that saw different keys
struct AttentionCombine {
  const float *o, *max, *total;  // of part i: o + i * o_step, max + i * step, total + i * step
  int64_t parts, o_step, step, D;
  void* out;
  float* lse;
};

struct AttentionKernels {
  int64_t block[3];                                  // keys of a packed block, and the most rows of a call
  void (*pack_transposed[3])(const AttentionPack&);  // for sums along D
  void (*pack_rows[3])(const AttentionPack&);        // for sums along the rows
  void (*forward[3])(const AttentionForward&);
  void (*backward[3])(const AttentionBackward&);
  void (*softmax[3])(const AttentionSoftmax&);
  void (*combine[3])(const AttentionCombine&);
  // out[0..n) = scale * sum of `parts` rows of fp32, `step` apart
  void (*sum_parts[3])(const float* rows, int64_t parts, int64_t step, int64_t n, float scale, void* out);
};
#define X(name) SAIL_DECLARE_TABLE(name, AttentionKernels, kAttention)
SAIL_FOR_EACH_ISA(X)
#undef X

inline const AttentionKernels& attention_kernels() {
#define X(name) SAIL_TABLE_ADDRESS(name, kAttention)
  static const AttentionKernels* const tables[] = {SAIL_FOR_EACH_ISA(X)};
#undef X
  return *tables[static_cast<int>(active_isa())];
}
}  // namespace sail::cpu
