// From a problem to a kernel: dtype, alignment, tile shape and activation become types. `start` is how a kernel is
// launched, on a card or by a test on the CPU: start.template operator()<Shape>(kernel, tiles, problem, arguments).
#pragma once
#include <initializer_list>
#include <type_traits>

#include "grouped_gemm_sm80.cuh"

namespace sail::cuda::sm80 {
// cp.async copies 16 bytes from an address of 16.
inline bool aligned(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides) {
  uint64_t bits = 0;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  for (int64_t s : strides) bits |= static_cast<uint64_t>(s) * 2;
  return bits % 16 == 0;
}

template <class T, class Shape, Layout kLayout, bool kAligned, class Epilogue, class Start>
void start_rows(const RowsProblem& p, const typename Epilogue::Arguments& arguments, const Start& start) {
  const int64_t n_tiles = ceil_div(p.N, Epilogue::kHalves ? Shape::kN / 2 : Shape::kN);
  const int64_t tiles = p.R ? most_row_tiles(p.R, p.E, Shape::kM, n_tiles) : 0;
  if (tiles) start.template launch<Shape>(rows_kernel<T, Shape, kLayout, kAligned, Epilogue>, tiles, p, arguments);
}

// Epilogue<kWhole>: without alignment, of operands or results, everything goes element by element, in one tile shape.
template <class T, Layout kLayout, template <bool> class Epilogue, class Start>
void dispatch_rows(const RowsProblem& p, const typename Epilogue<true>::Arguments& arguments, const Start& start) {
  if (!aligned({p.a.data, p.b.first, p.b.second}, {p.a.stride, p.b.row_stride, p.b.expert_stride}) ||
      !Epilogue<true>::whole(p, arguments))
    return start_rows<T, Roomy, kLayout, false, Epilogue<false>>(p, arguments, start);
  switch (start.tiles(p)) {
    case Tiles::small: return start_rows<T, Small, kLayout, true, Epilogue<true>>(p, arguments, start);
    case Tiles::medium:
      using Shape = std::conditional_t<Epilogue<true>::kFinish, Roomy, Medium>;
      return start_rows<T, Shape, kLayout, true, Epilogue<true>>(p, arguments, start);
    case Tiles::large: return start_rows<T, Large, kLayout, true, Epilogue<true>>(p, arguments, start);
  }
}

template <class T> struct For {
  template <bool kWhole> using Store = StoreRowsEpilogue<T, kWhole>;
  template <class Act> struct With {
    template <bool kWhole> using Forward = GatedForwardEpilogue<T, Act, kWhole>;
    template <bool kWhole> using Backward = GatedBackwardEpilogue<T, Act, kWhole>;
  };
};

template <class T, class Start> void dispatch(const RowsProblem& p, const StoreRows& out, const Start& start) {
  if (p.layout == Layout::nk) return dispatch_rows<T, Layout::nk, For<T>::template Store>(p, out, start);
  dispatch_rows<T, Layout::kn, For<T>::template Store>(p, out, start);
}

template <class T, class Start> void dispatch(const RowsProblem& p, const GatedForward& out, const Start& start) {
  for_activation(out.activation, [&](auto* act) {
    dispatch_rows<T, Layout::nk, For<T>::template With<std::remove_pointer_t<decltype(act)>>::template Forward>(p, out,
                                                                                                                start);
  });
}

template <class T, class Start> void dispatch(const RowsProblem& p, const GatedBackward& out, const Start& start) {
  for_activation(out.activation, [&](auto* act) {
    dispatch_rows<T, Layout::kn, For<T>::template With<std::remove_pointer_t<decltype(act)>>::template Backward>(p, out,
                                                                                                                 start);
  });
}

template <class T, class Start> void dispatch(const WgradProblem& p, const StoreGrad& out, const Start& start) {
  const auto tiles = [&](int64_t m, int64_t n) { return p.E * ceil_div(p.M, m) * ceil_div(p.N, n); };
  if (aligned({p.a.data, p.b.data}, {p.a.stride, p.b.stride}) && StoreGradEpilogue<T, false, true>::whole(p, out))
    return start.template launch<Large>(wgrad_kernel<T, Large, true>, tiles(Large::kM, Large::kN), p, out);
  start.template launch<Roomy>(wgrad_kernel<T, Roomy, false>, tiles(Roomy::kM, Roomy::kN), p, out);
}
}  // namespace sail::cuda::sm80
