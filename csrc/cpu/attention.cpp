// Attention on the CPU, checks and forward: keys and values are packed once, then every block of rows is a task, the most
// expensive first, so that ragged packs balance. Few queries against many keys are split over the keys instead.
#include "attention.h"

#include "../torch/attention.h"
#include "kernels/gemm.h"

namespace sail::cpu {
namespace {
void check_heads(const Check& c, const char* arg, const Tensor& t, const Tensor& q) {
  c.same_device(arg, t, q);
  c.rank(arg, t, q.dim());
  c.dtype(arg, t, q.dtype());
  c.that(t.stride(-1) == 1 || t.size(-1) == 1 || !t.numel(), arg, "stride " + std::to_string(t.stride(-1)),
         "contiguous rows (a last dimension of stride 1)");
}

// All but the sequences; q is [.., H, D] and k, v are [.., G, D].
Attention check_tensors(const Check& c, const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal) {
  const DType dtype = c.real("q", q);
  check_heads(c, "q", q, q);
  check_heads(c, "k", k, q);
  check_heads(c, "v", v, q);
  const int64_t D = q.size(-1);
  c.that(D >= 1 && D <= kMaxHeadDim, "q", "a head dim of " + std::to_string(D), "1 to " + std::to_string(kMaxHeadDim));
  check_attention_shapes(c, q, k, v, scale);
  const int64_t bytes = element_size(dtype);
  return {.dtype = dtype,
          .bytes = bytes,
          .H = q.size(-2),
          .G = k.size(-2),
          .D = D,
          .causal = causal,
          .scale = static_cast<float>(scale),
          .q = heads_of(q, bytes),
          .k = heads_of(k, bytes),
          .v = heads_of(v, bytes),
          .lse_batch = 0,
          .lse_head = 0,
          .sequences = {}};
}
}  // namespace

Attention check_attention(const Check& c, const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                          bool causal) {
  c.rank("q", q, 4);
  Attention a = check_tensors(c, q, k, v, scale, causal);
  a.lse_head = q.size(1), a.lse_batch = a.H * a.lse_head;
  for (int64_t b = 0; b < q.size(0); b++) a.sequences.push_back({b, 0, q.size(1), 0, k.size(1)});
  return a;
}

Attention check_attention_varlen(const Check& c, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                                 const Tensor& cu_k, int64_t max_q, int64_t max_k, double scale, bool causal) {
  c.rank("q", q, 3);
  Attention a = check_tensors(c, q, k, v, scale, causal);
  check_cu_seqlens(c, cu_q, cu_k, q);
  const int32_t *eq = cu_q.ptr<const int32_t>(), *ek = cu_k.ptr<const int32_t>();
  check_cu_values(c, "cu_seqlens_q", eq, cu_q.size(0), q.size(0), max_q);
  check_cu_values(c, "cu_seqlens_k", ek, cu_k.size(0), k.size(0), max_k);
  a.lse_head = q.size(0);
  for (int64_t i = 0; i + 1 < cu_q.size(0); i++)
    a.sequences.push_back({0, eq[i], eq[i + 1] - eq[i], ek[i], ek[i + 1] - ek[i]});
  return a;
}

void PackedKeys::pack(const std::vector<Form>& forms) {
  struct Block {
    int64_t form, sequence, g, k0;
  };
  std::vector<Block> blocks;
  for (int64_t f = 0; f < static_cast<int64_t>(forms.size()); f++)
    for (int64_t g = 0; g < a_.G; g++)
      for (int64_t s = 0; s < static_cast<int64_t>(a_.sequences.size()); s++)
        for (int64_t b = 0; b < first_[s + 1] - first_[s]; b++) blocks.push_back({f, s, g, b * a_.block()});
  const auto& kernels = attention_kernels();
  run_tasks(blocks, a_.threads(), 0, [&](const Block& b, char*) {
    const Form& form = forms[b.form];
    const Sequence& s = a_.sequences[b.sequence];
    const auto kernel = form.kind == transposed ? kernels.pack_transposed : kernels.pack_rows;
    const char* out = at(b.form, b.sequence, b.g) + b.k0 / a_.block() * attention_pack_bytes(a_.D);
    kernel[a_.index()]({form.from.row(s.batch, s.k0 + b.k0, b.g), form.from.token, std::min(a_.block(), s.nk - b.k0),
                        a_.D, const_cast<char*>(out)});
  });
}

namespace {
// ---- few queries: one task a chunk of keys, whose results are combined
constexpr int64_t kFewQueries = 8, kFewRows = 64;
constexpr int64_t kChunk = 512;  // keys

struct Output {
  Heads heads;
  float* lse;
};

bool few_queries(const Attention& a, const Sequence& s) {
  return s.nq <= kFewQueries && s.nq * (a.H / a.G) <= kFewRows;
}

RowBlock all_rows(const Attention& a, int64_t sequence, int64_t g) {
  const int64_t group = a.H / a.G;
  return {sequence, g, g * group, (g + 1) * group, 0, a.sequences[sequence].nq};
}

// Results of chunk i: o [rows, D], max [rows], total [rows] from i * rows * (D + 2) on.
struct Chunks {
  RowBlock block;
  int64_t count;
  float* results;
  float* o(int64_t i, int64_t D) const { return results + i * step(D); }
  float* max(int64_t i, int64_t D) const { return o(i, D) + block.rows() * D; }
  float* total(int64_t i, int64_t D) const { return max(i, D) + block.rows(); }
  int64_t step(int64_t D) const { return block.rows() * (D + 2); }
};

constexpr int64_t kChunkScratch = kFewRows * kChunk * 8 + kOuterScratch;

void forward_chunk(const Attention& a, const Chunks& c, int64_t chunk, char* scratch) {
  const Sequence& s = a.sequences[c.block.sequence];
  const int64_t M = c.block.rows(), n0 = chunk * kChunk, N = std::min(kChunk, s.nk - n0);
  const void *q[kFewRows], *p_rows[kFewRows];
  int64_t visible[kFewRows];
  float* scores = reinterpret_cast<float*>(scratch);
  char* p = scratch + kFewRows * kChunk * 4;
  c.block.for_rows([&](int64_t m, int64_t i, int64_t h) {
    q[m] = a.q.row(s.batch, s.q0 + i, h);
    p_rows[m] = p + m * N * a.bytes;
    visible[m] = a.limit(s, i) - n0;
  });
  const char *k = a.k.row(s.batch, s.k0 + n0, c.block.g), *v = a.v.row(s.batch, s.k0 + n0, c.block.g);
  gemm_kernels().dot_gemm[a.index()]({.a_rows = q,
                                      .b = k,
                                      .ldb = a.k.token / a.bytes,
                                      .M = M,
                                      .N = N,
                                      .K = a.D,
                                      .c = scores,
                                      .ldc = N,
                                      .accumulate = false,
                                      .scratch = nullptr});
  attention_kernels().softmax[a.index()]({.s = scores,
                                          .M = M,
                                          .N = N,
                                          .visible = visible,
                                          .scale = a.scale,
                                          .p = p,
                                          .max = c.max(chunk, a.D),
                                          .total = c.total(chunk, a.D)});
  gemm_kernels().outer_gemm[a.index()]({.a_rows = p_rows,
                                        .b = v,
                                        .ldb = a.v.token / a.bytes,
                                        .M = M,
                                        .N = a.D,
                                        .K = N,
                                        .c = c.o(chunk, a.D),
                                        .ldc = a.D,
                                        .accumulate = false,
                                        .scratch = scratch + kFewRows * kChunk * 8});
}

void combine_chunks(const Attention& a, const Chunks& c, const Output& out) {
  const Sequence& s = a.sequences[c.block.sequence];
  c.block.for_rows([&](int64_t m, int64_t i, int64_t h) {
    attention_kernels().combine[a.index()]({.o = c.o(0, a.D) + m * a.D,
                                            .max = c.max(0, a.D) + m,
                                            .total = c.total(0, a.D) + m,
                                            .parts = c.count,
                                            .o_step = c.step(a.D),
                                            .step = c.step(a.D),
                                            .D = a.D,
                                            .out = out.heads.row(s.batch, s.q0 + i, h),
                                            .lse = out.lse + a.lse_at(s, i, h)});
  });
}

// ---- many queries
void forward_block(const Attention& a, const PackedKeys& keys, const RowBlock& block, const Output& out,
                   char* scratch) {
  const Sequence& s = a.sequences[block.sequence];
  const void* q[kMaxAttentionRows];
  void* o[kMaxAttentionRows];
  float* lse[kMaxAttentionRows];
  int64_t limit[kMaxAttentionRows];
  block.for_rows([&](int64_t m, int64_t i, int64_t h) {
    q[m] = a.q.row(s.batch, s.q0 + i, h);
    o[m] = out.heads.row(s.batch, s.q0 + i, h);
    lse[m] = out.lse + a.lse_at(s, i, h);
    limit[m] = a.limit(s, i);
  });
  attention_kernels().forward[a.index()]({.q = q,
                                          .out = o,
                                          .lse = lse,
                                          .limit = limit,
                                          .M = block.rows(),
                                          .D = a.D,
                                          .k_transposed = keys.at(0, block.sequence, block.g),
                                          .v_rows = keys.at(1, block.sequence, block.g),
                                          .scale = a.scale,
                                          .scratch = scratch});
}

struct ForwardTask {
  int64_t cost;
  RowBlock block;
  int64_t split, chunk;  // index into the split sequences, or -1
};

void forward(const Attention& a, const Output& out) {
  const PackedKeys keys(a, {{a.k, PackedKeys::transposed}, {a.v, PackedKeys::rows}},
                        [&](const Sequence& s) { return !few_queries(a, s); });
  std::vector<ForwardTask> tasks;
  std::vector<Chunks> splits;
  int64_t results = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(a.sequences.size()); i++)
    for (int64_t g = 0; g < a.G; g++) {
      const Sequence& s = a.sequences[i];
      if (few_queries(a, s) && s.nq) {
        splits.push_back({all_rows(a, i, g), (s.nk + kChunk - 1) / kChunk, nullptr});
        for (int64_t c = 0; c < splits.back().count; c++)
          tasks.push_back(
              {kChunk * splits.back().block.rows(), splits.back().block, static_cast<int64_t>(splits.size()) - 1, c});
        results += splits.back().count * splits.back().step(a.D);
      } else {
        for_row_blocks(a, i, g,
                       [&](const RowBlock& b) { tasks.push_back({a.limit(s, b.q1 - 1) * b.rows(), b, -1, 0}); });
      }
    }
  const Buffer memory(results * 4);
  float* next = memory.get<float>();
  for (Chunks& c : splits) c.results = next, next += c.count * c.step(a.D);
  std::stable_sort(tasks.begin(), tasks.end(), [](const auto& x, const auto& y) { return x.cost > y.cost; });
  run_tasks(tasks, a.threads(), std::max(kForwardScratch, kChunkScratch), [&](const ForwardTask& t, char* scratch) {
    if (t.split < 0)
      forward_block(a, keys, t.block, out, scratch);
    else
      forward_chunk(a, splits[t.split], t.chunk, scratch);
  });
  run_tasks(splits, a.threads(), 0, [&](const Chunks& c, char*) { combine_chunks(a, c, out); });
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal) {
  const Attention a = check_attention(Check("attention"), q, k, v, scale, causal);
  Tensor out = q.empty_like(), lse = q.empty({q.size(0), a.H, q.size(1)}, aoti_torch_dtype_float32());
  forward(a, {heads_of(out, a.bytes), lse.ptr<float>()});
  return {std::move(out), std::move(lse)};
}

std::tuple<Tensor, Tensor> attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                                            const Tensor& cu_k, int64_t max_q, int64_t max_k, double scale,
                                            bool causal) {
  const Attention a =
      check_attention_varlen(Check("attention_varlen"), q, k, v, cu_q, cu_k, max_q, max_k, scale, causal);
  Tensor out = q.empty_like(), lse = q.empty({a.H, q.size(0)}, aoti_torch_dtype_float32());
  forward(a, {heads_of(out, a.bytes), lse.ptr<float>()});
  return {std::move(out), std::move(lse)};
}

const auto library =
    Library::impl("sail_ops", "CPU").kernel<attention>("attention").kernel<attention_varlen>("attention_varlen");
}  // namespace
}  // namespace sail::cpu
