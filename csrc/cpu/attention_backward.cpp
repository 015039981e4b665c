// Attention's gradients on the CPU. A task is a part of one sequence and key/value head: some of its row blocks, in a
// fixed order, added into dk and dv of its own, so that nothing depends on which thread does what. How many parts there
// are depends on the shapes alone; where there are several, their dk and dv are added at the end.
#include "../torch/attention.h"
#include "attention.h"
#include "kernels/experts.h"

namespace sail::cpu {
namespace {
constexpr double kTasks = 16;  // no task is more than this fraction of all the work

struct Gradients {
  Heads dout, out, dq, dk, dv;
  const float *lse, *dlse;  // dlse may be null
};

struct Part {
  int64_t cost, sequence, g, index, parts;
  float* sums;  // [2, keys, width]: dk, dv; null: the thread's own
};

int64_t sums_size(const Attention& a, const Sequence& s) { return s.nk * attention_width(a.D); }

std::vector<Part> plan(const Attention& a) {
  double all = 0;
  const auto cost = [&](const Sequence& s) { return static_cast<double>(s.nq) * s.nk; };
  for (const Sequence& s : a.sequences) all += cost(s) * a.G;
  std::vector<Part> parts;
  for (int64_t i = 0; i < static_cast<int64_t>(a.sequences.size()); i++) {
    int64_t blocks = 0;
    for_row_blocks(a, i, 0, [&](const RowBlock&) { blocks++; });
    const double c = cost(a.sequences[i]), wanted = all > 0 ? c * kTasks / all + 0.999 : 1;
    const int64_t n = std::clamp<int64_t>(static_cast<int64_t>(wanted), 1, std::max<int64_t>(blocks, 1));
    for (int64_t g = 0; g < a.G; g++)
      for (int64_t p = 0; p < n; p++) parts.push_back({static_cast<int64_t>(c) / n, i, g, p, n, nullptr});
  }
  return parts;
}

void backward_block(const Attention& a, const PackedKeys& keys, const RowBlock& block, const Gradients& g, float* dk,
                    float* dv, char* scratch) {
  const Sequence& s = a.sequences[block.sequence];
  const void *q[kMaxAttentionRows], *dout[kMaxAttentionRows];
  void* dq[kMaxAttentionRows];
  float lse[kMaxAttentionRows], dlse[kMaxAttentionRows], dout_out[kMaxAttentionRows];
  int64_t limit[kMaxAttentionRows];
  block.for_rows([&](int64_t m, int64_t i, int64_t h) {
    const int64_t at = a.lse_at(s, i, h), t = s.q0 + i;
    q[m] = a.q.row(s.batch, t, h);
    dout[m] = g.dout.row(s.batch, t, h);
    dq[m] = g.dq.row(s.batch, t, h);
    lse[m] = g.lse[at];
    dlse[m] = g.dlse ? g.dlse[at] : 0;
    dout_out[m] = expert_kernels().row_dot[a.index()](dout[m], g.out.row(s.batch, t, h), a.D);
    limit[m] = a.limit(s, i);
  });
  attention_kernels().backward[a.index()]({.q = q,
                                           .dout = dout,
                                           .dq = dq,
                                           .lse = lse,
                                           .dlse = dlse,
                                           .dout_out = dout_out,
                                           .limit = limit,
                                           .M = block.rows(),
                                           .D = a.D,
                                           .k_transposed = keys.at(0, block.sequence, block.g),
                                           .v_transposed = keys.at(1, block.sequence, block.g),
                                           .k_rows = keys.at(2, block.sequence, block.g),
                                           .dk = dk,
                                           .dv = dv,
                                           .scale = a.scale,
                                           .scratch = scratch});
}

// dk and dv of keys n0 .. n1: the sum over `parts` of them, rounded once
void store_sums(const Attention& a, const Part& p, int64_t n0, int64_t n1, const float* sums, const Gradients& g) {
  const Sequence& s = a.sequences[p.sequence];
  const int64_t width = attention_width(a.D), size = sums_size(a, s);
  const auto kernel = attention_kernels().sum_parts[a.index()];
  for (int64_t n = n0; n < n1; n++) {
    kernel(sums + n * width, p.parts, 2 * size, a.D, a.scale, g.dk.row(s.batch, s.k0 + n, p.g));
    kernel(sums + size + n * width, p.parts, 2 * size, a.D, 1, g.dv.row(s.batch, s.k0 + n, p.g));
  }
}

void backward_part(const Attention& a, const PackedKeys& keys, const Part& p, const Gradients& g, char* scratch) {
  const int64_t size = sums_size(a, a.sequences[p.sequence]);
  float* sums = p.sums ? p.sums : reinterpret_cast<float*>(scratch + kBackwardScratch);
  std::fill(sums, sums + 2 * size, 0.f);
  int64_t i = 0;
  for_row_blocks(a, p.sequence, p.g, [&](const RowBlock& b) {
    if (i++ % p.parts == p.index) backward_block(a, keys, b, g, sums, sums + size, scratch);
  });
  if (p.parts == 1) store_sums(a, p, 0, a.sequences[p.sequence].nk, sums, g);
}

void backward(const Attention& a, const Gradients& g) {
  const PackedKeys keys(a, {{a.k, PackedKeys::transposed}, {a.v, PackedKeys::transposed}, {a.k, PackedKeys::rows}},
                        [](const Sequence&) { return true; });
  std::vector<Part> parts = plan(a);
  int64_t shared = 0, own = 0;
  for (const Part& p : parts) {
    const int64_t size = 2 * sums_size(a, a.sequences[p.sequence]);
    p.parts > 1 ? shared += size : own = std::max(own, size);
  }
  const Buffer memory(shared * 4);
  float* next = memory.get<float>();
  struct Sum {
    const Part* first;
    int64_t n0, n1;
  };
  std::vector<Sum> sums;
  for (Part& p : parts) {
    if (p.parts == 1) continue;
    p.sums = next, next += 2 * sums_size(a, a.sequences[p.sequence]);
    if (p.index == 0)
      for_pieces(0, a.sequences[p.sequence].nk, 256, [&](int64_t n0, int64_t n1) { sums.push_back({&p, n0, n1}); });
  }
  std::vector<const Part*> order;
  for (const Part& p : parts) order.push_back(&p);
  std::stable_sort(order.begin(), order.end(), [](const auto* x, const auto* y) { return x->cost > y->cost; });
  run_tasks(order, a.threads(), kBackwardScratch + own * 4,
            [&](const Part* p, char* scratch) { backward_part(a, keys, *p, g, scratch); });
  run_tasks(sums, a.threads(), 0, [&](const Sum& s, char*) { store_sums(a, *s.first, s.n0, s.n1, s.first->sums, g); });
}

// Of the two public forms, which differ in the sequences and in lse's shape alone.
std::tuple<Tensor, Tensor, Tensor> backward_tensors(const Check& c, const Attention& a, const Tensor& dout,
                                                    const OptTensor& dlse, const Tensor& q, const Tensor& k,
                                                    const Tensor& out, const Tensor& lse,
                                                    std::initializer_list<int64_t> lse_shape) {
  check_attention_results(c, dout, dlse, q, out, lse, lse_shape);
  Tensor dq = q.empty_like(), dk = k.empty_like(), dv = k.empty_like();
  backward(a, {heads_of(dout, a.bytes), heads_of(out, a.bytes), heads_of(dq, a.bytes), heads_of(dk, a.bytes),
               heads_of(dv, a.bytes), lse.ptr<const float>(), dlse ? dlse->ptr<const float>() : nullptr});
  return {std::move(dq), std::move(dk), std::move(dv)};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const OptTensor& dlse, const Tensor& q,
                                                      const Tensor& k, const Tensor& v, const Tensor& out,
                                                      const Tensor& lse, double scale, bool causal) {
  const Check c("attention_backward");
  const Attention a = check_attention(c, q, k, v, scale, causal);
  return backward_tensors(c, a, dout, dlse, q, k, out, lse, {q.size(0), a.H, q.size(1)});
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_backward(const Tensor& dout, const OptTensor& dlse, const Tensor& q,
                                                             const Tensor& k, const Tensor& v, const Tensor& out,
                                                             const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k,
                                                             int64_t max_q, int64_t max_k, double scale, bool causal) {
  const Check c("attention_varlen_backward");
  const Attention a = check_attention_varlen(c, q, k, v, cu_q, cu_k, max_q, max_k, scale, causal);
  return backward_tensors(c, a, dout, dlse, q, k, out, lse, {a.H, q.size(0)});
}

const auto library = Library::impl("sail_ops", "CPU")
                         .kernel<attention_backward>("attention_backward")
                         .kernel<attention_varlen_backward>("attention_varlen_backward");
}  // namespace
}  // namespace sail::cpu
