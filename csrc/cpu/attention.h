// Attention as data: sequences, strided tensors, and the blocks of rows that forward and backward work on.
// B batch, S tokens of a sequence, T tokens of a pack, H query heads, G key/value heads, D head dim.
#pragma once
#include <algorithm>
#include <vector>

#include "../torch/checks.h"
#include "kernels/attention.h"
#include "rows.h"
#include "tasks.h"

namespace sail::cpu {
// [B, S, H, D] or packed [T, H, D]: steps in bytes, the last dimension contiguous
struct Heads {
  char* p;
  int64_t batch, token, head;
  char* row(int64_t b, int64_t t, int64_t h) const { return p + b * batch + t * token + h * head; }
};

inline Heads heads_of(const Tensor& t, int64_t bytes) {
  const int64_t d = t.dim();
  return {t.ptr<char>(), d == 4 ? t.stride(0) * bytes : 0, t.stride(d - 3) * bytes, t.stride(d - 2) * bytes};
}

struct Sequence {
  int64_t batch, q0, nq, k0, nk;  // tokens q0 .. q0 + nq attend to tokens k0 .. k0 + nk
};

struct Attention {
  DType dtype;
  int64_t bytes, H, G, D;
  bool causal;
  float scale;
  Heads q, k, v;
  int64_t lse_batch, lse_head;  // steps of lse: [B, H, S], packed [H, T]
  std::vector<Sequence> sequences;

  int index() const { return static_cast<int>(dtype); }
  int64_t block() const { return attention_kernels().block[index()]; }
  // keys that query i of a sequence sees, from the first on: the last query sees all of them
  int64_t limit(const Sequence& s, int64_t i) const {
    return causal ? std::max<int64_t>(0, i + 1 + s.nk - s.nq) : s.nk;
  }
  int64_t lse_at(const Sequence& s, int64_t i, int64_t h) const {
    return s.batch * lse_batch + h * lse_head + s.q0 + i;
  }
  int threads() const {
    double work = 0;
    for (const Sequence& s : sequences) work += static_cast<double>(s.nq) * s.nk * H * D;
    return work < kParallelFrom ? 1 : num_threads();
  }

 private:
  static constexpr double kParallelFrom = 1 << 18;  // multiply-adds; fewer take less time than starting the threads
};

Attention check_attention(const Check& c, const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal);
Attention check_attention_varlen(const Check& c, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                                 const Tensor& cu_k, int64_t max_q, int64_t max_k, double scale, bool causal);

// Queries q0 .. q1 of heads h0 .. h1, which share the key/value head g. Row m is query q0 + m / heads, head
// h0 + m % heads: rows next to each other see almost the same keys, and the keys' blocks serve all heads of the group.
struct RowBlock {
  int64_t sequence, g, h0, h1, q0, q1;
  int64_t rows() const { return (q1 - q0) * (h1 - h0); }
  template <class F> void for_rows(F&& f) const {
    int64_t m = 0;
    for (int64_t i = q0; i < q1; i++)
      for (int64_t h = h0; h < h1; h++) f(m++, i, h);
  }
};

// The row blocks of one sequence and key/value head, in order.
template <class F> void for_row_blocks(const Attention& a, int64_t sequence, int64_t g, F&& f) {
  const int64_t group = a.H / a.G, nq = a.sequences[sequence].nq;
  for_pieces(g * group, (g + 1) * group, a.block(), [&](int64_t h0, int64_t h1) {
    for_pieces(0, nq, a.block() / (h1 - h0), [&](int64_t q0, int64_t q1) { f(RowBlock{sequence, g, h0, h1, q0, q1}); });
  });
}

// Keys and values of sequences, packed for the kernels: `forms` times what they take themselves.
class PackedKeys {
 public:
  enum Kind { transposed, rows };
  struct Form {
    const Heads& from;
    Kind kind;
  };
  // sequences that `wanted` refuses are left out
  template <class Wanted> PackedKeys(const Attention& a, std::vector<Form> forms, Wanted&& wanted) : a_(a) {
    int64_t blocks = 0;
    for (const Sequence& s : a.sequences) {
      first_.push_back(blocks);
      if (wanted(s)) blocks += (s.nk + a.block() - 1) / a.block();
    }
    first_.push_back(blocks);
    buffer_.emplace(static_cast<int64_t>(forms.size()) * a.G * blocks * attention_pack_bytes(a.D));
    pack(forms);
  }
  const char* at(int64_t form, int64_t sequence, int64_t g) const {
    return buffer_->get() + ((form * a_.G + g) * first_.back() + first_[sequence]) * attention_pack_bytes(a_.D);
  }

 private:
  void pack(const std::vector<Form>& forms);
  const Attention& a_;
  std::vector<int64_t> first_;  // block of each sequence
  std::optional<Buffer> buffer_;
};
}  // namespace sail::cpu
