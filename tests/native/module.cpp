// Native internals for tests, in one Python module: the plans of the CUDA library, and the functions of libraries that
// tests compile from the sources or from mutants of them (calls.h), which load_library() takes by their path.
#include "binding.h"
#include "calls.h"
#include "vec_calls.h"

namespace {
struct Library {};

py::object load_library(const std::string& path) {
  void* file = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!file) throw std::runtime_error(dlerror());
  py::object library = py::cast(Library{});
#define SAIL_BIND(name) bind<decltype(name)>(library, file, #name)
  SAIL_BIND(allow), SAIL_BIND(forget_allowed);
  SAIL_BIND(store_rows), SAIL_BIND(gated_forward), SAIL_BIND(gated_backward), SAIL_BIND(wgrad);
  SAIL_BIND(row_tiles), SAIL_BIND(bank_conflicts);
  SAIL_BIND(forward), SAIL_BIND(decode), SAIL_BIND(backward);
  SAIL_BIND(sort_rows), SAIL_BIND(clamp_ends), SAIL_BIND(combine), SAIL_BIND(expert_sums);
  SAIL_BIND(width), SAIL_BIND(widen_bf16), SAIL_BIND(widen_f16), SAIL_BIND(narrow_bf16), SAIL_BIND(narrow_f16);
  SAIL_BIND(exponential), SAIL_BIND(total), SAIL_BIND(copy_n);
#undef SAIL_BIND
  return library;
}

void enumerations(py::module_& m) {
  py::enum_<Element>(m, "Element").value("bf16", Element::bf16).value("f16", Element::f16);
  py::enum_<Scalar>(m, "Scalar").value("f32", Scalar::f32).value("bf16", Scalar::bf16).value("f16", Scalar::f16);
  py::enum_<Layout>(m, "Layout").value("nk", Layout::nk).value("kn", Layout::kn);
  py::enum_<Activation>(m, "Activation")
      .value("silu", Activation::silu)
      .value("gelu", Activation::gelu)
      .value("gelu_tanh", Activation::gelu_tanh);
  py::enum_<sm80::Tiles>(m, "Tiles")
      .value("small", sm80::Tiles::small)
      .value("medium", sm80::Tiles::medium)
      .value("large", sm80::Tiles::large);
}

#define F(T, name) field<T>(#name, &T::name)
template <class T> std::vector<Field<T>> stacked() {
  return {F(T, first), F(T, second), F(T, expert_stride), F(T, row_stride), F(T, split)};
}
template <class T> std::vector<Field<T>> with_attention(std::vector<Field<T>> more) {
  more.insert(more.end(), {F(T, q), F(T, k), F(T, v), F(T, cu_q), F(T, cu_k), F(T, B), F(T, S), F(T, L), F(T, H),
                           F(T, G), F(T, D), F(T, scale), F(T, causal)});
  return more;
}

void grouped_gemm(py::module_& m) {
  structure<Stacked<const void*>>(m, "Stacked", stacked<Stacked<const void*>>());
  structure<Stacked<void*>>(m, "StackedOut", stacked<Stacked<void*>>());
  structure<How>(m, "How", {F(How, dtype), F(How, tiles), F(How, seed), F(How, blocks), F(How, paired)});
  structure<Rows>(m, "Rows", {F(Rows, data), F(Rows, stride), F(Rows, index)});
  structure<RowsProblem>(
      m, "RowsProblem",
      {F(RowsProblem, a), F(RowsProblem, b), F(RowsProblem, layout), F(RowsProblem, offsets), F(RowsProblem, R),
       F(RowsProblem, E), F(RowsProblem, N), F(RowsProblem, K), F(RowsProblem, zero_tail)});
  structure<WgradProblem>(m, "WgradProblem",
                          {F(WgradProblem, a), F(WgradProblem, b), F(WgradProblem, offsets), F(WgradProblem, R),
                           F(WgradProblem, E), F(WgradProblem, M), F(WgradProblem, N)});
  structure<StoreRows>(m, "StoreRows",
                       {F(StoreRows, out), F(StoreRows, out_stride), F(StoreRows, bias), F(StoreRows, weight)});
  structure<GatedForward>(m, "GatedForward",
                          {F(GatedForward, bias), F(GatedForward, h), F(GatedForward, a), F(GatedForward, activation),
                           F(GatedForward, clamp)});
  structure<GatedBackward>(
      m, "GatedBackward",
      {F(GatedBackward, h), F(GatedBackward, weight), F(GatedBackward, dh), F(GatedBackward, a_weighted),
       F(GatedBackward, dot), F(GatedBackward, activation), F(GatedBackward, clamp)});
  structure<StoreGrad>(m, "StoreGrad", {F(StoreGrad, out), F(StoreGrad, fp32), F(StoreGrad, accumulate)});
  m.def("choose_tiles", sm80::choose_tiles);
  m.def("choose_pairs", sm90::choose_pairs);
  m.def("most_row_tiles", most_row_tiles);
  m.def("wgrad_tile", [](int64_t tile, int64_t m_tiles, int64_t n_tiles) {
    const WgradTile t = wgrad_tile(tile, m_tiles, n_tiles);
    return std::array{t.expert, t.m, t.n};
  });
}

void attention(py::module_& m) {
  structure<HeadRows>(m, "HeadRows", {F(HeadRows, data), F(HeadRows, batch), F(HeadRows, token), F(HeadRows, head)});
  structure<AttentionForward>(m, "AttentionForward",
                              with_attention<AttentionForward>({F(AttentionForward, out), F(AttentionForward, lse)}));
  structure<AttentionDecode>(m, "AttentionDecode",
                             with_attention<AttentionDecode>(
                                 {F(AttentionDecode, out), F(AttentionDecode, lse), F(AttentionDecode, most_queries),
                                  F(AttentionDecode, splits), F(AttentionDecode, chunk),
                                  F(AttentionDecode, partial_out), F(AttentionDecode, partial_lse)}));
  structure<AttentionBackward>(
      m, "AttentionBackward",
      with_attention<AttentionBackward>(
          {F(AttentionBackward, dout), F(AttentionBackward, out), F(AttentionBackward, lse), F(AttentionBackward, dlse),
           F(AttentionBackward, stats), F(AttentionBackward, dq), F(AttentionBackward, dk), F(AttentionBackward, dv)}));
  m.def("plan_splits", [](int64_t keys, int64_t blocks, int sm_count, int64_t least) {
    const SplitPlan plan = plan_splits(keys, blocks, sm_count, least);
    return std::array{plan.splits, plan.chunk};
  });
}

void expert_rows(py::module_& m) {
  structure<RowSort>(
      m, "RowSort",
      {F(RowSort, ids), F(RowSort, weights), F(RowSort, ids_stride), F(RowSort, weights_stride), F(RowSort, wide_ids),
       F(RowSort, weights_type), F(RowSort, count), F(RowSort, K), F(RowSort, E), F(RowSort, piece),
       F(RowSort, block_counts), F(RowSort, offsets), F(RowSort, token), F(RowSort, weight), F(RowSort, row_of)});
  structure<SortedRows>(
      m, "SortedRows",
      {F(SortedRows, ends), F(SortedRows, stride), F(SortedRows, E), F(SortedRows, rows), F(SortedRows, offsets)});
  structure<Combine>(
      m, "Combine",
      {F(Combine, rows), F(Combine, row_of), F(Combine, weight), F(Combine, out), F(Combine, D), F(Combine, K)});
  structure<ExpertSum>(m, "ExpertSum",
                       {F(ExpertSum, in), F(ExpertSum, index), F(ExpertSum, weight), F(ExpertSum, offsets),
                        F(ExpertSum, out), F(ExpertSum, columns), F(ExpertSum, stride)});
  m.def("plan_sort", [](int64_t count, int64_t E) {
    const SortPlan plan = plan_sort(count, E);
    return std::array<int64_t, 3>{plan.blocks, plan.warps, plan.piece};
  });
}
#undef F
}  // namespace

PYBIND11_MODULE(sail_internals, m) {
  py::register_exception<EmulationError>(m, "EmulationError", PyExc_AssertionError);
  py::class_<Library>(m, "Library", py::dynamic_attr());
  m.def("load_library", load_library);
  enumerations(m), grouped_gemm(m), attention(m), expert_rows(m);
}
