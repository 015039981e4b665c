// From a problem to a kernel for Hopper: tensor maps, dtype and activation. False: the problem is not for TMA, or an
// epilogue could not store 16 bytes at a time; nothing was launched. `start` makes a tensor map and launches a kernel,
// on a card or in a test on the CPU: start.encode(box, &map), start.launch(kernel, tiles, arguments, paired); and it says
// whether blocks go in pairs, start.paired(problem).
#pragma once
#include "grouped_gemm_sm90.cuh"

namespace sail::cuda::sm90 {
// What cp.async and the copy engine both need: 16-byte addresses and row strides.
inline bool aligned(const Rows& rows) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride % 8 == 0;
}

// Rows contiguous, `width` elements each, in boxes of box_rows; a gather needs no map.
template <class Start>
bool encode_rows(const Rows& rows, int64_t width, int64_t R, uint32_t box_rows, const Start& start, CUtensorMap* map) {
  return aligned(rows) &&
         (rows.index || start.encode(tensor_box(rows.data, width, R, rows.stride, 1, 0, box_rows), map));
}

// The two parts of B, which are alike where there is one.
template <bool kGated, class Start>
bool encode_weights(const RowsProblem& p, const Start& start, CUtensorMap (&maps)[2]) {
  const bool kn = p.layout == Layout::kn, two = kGated || p.b.split < (kn ? p.K : p.N);
  if (two && !kGated && !kn) return false;                    // a tile could have columns of both
  if (two && kn && p.a.index && p.b.split % 8) return false;  // the second part's K would start within 16 bytes of A
  const int64_t rows = kn ? p.K : p.N, first = two && kn ? p.b.split : rows, second = two && kn ? rows - first : rows;
  const auto encode = [&](const void* data, int64_t part_rows, CUtensorMap* map) {
    return start.encode(
        tensor_box(data, kn ? p.N : p.K, part_rows, p.b.row_stride, p.E, p.b.expert_stride, kn ? kTileK : kTileN / 2),
        map);
  };
  return encode(p.b.first, first, &maps[0]) && (!two || encode(p.b.second, second, &maps[1]));
}

template <class T, Layout kLayout, class Epilogue, class Start>
bool start_rows(const RowsProblem& p, const typename Epilogue::Arguments& out, const Start& start) {
  if (!p.R) return true;
  RowsArguments<typename Epilogue::Arguments> args{{}, {}, p, out, start.paired(p)};
  if (!Epilogue::whole(p, out) || !encode_rows(p.a, p.K, p.R, kTileM, start, &args.a) ||
      !encode_weights<Epilogue::kHalves>(p, start, args.b))
    return false;
  const int64_t n_tiles = ceil_div(p.N, Epilogue::kHalves ? kTileN / 2 : kTileN);
  start.launch(rows_kernel<T, kLayout, Epilogue>, most_row_tiles(p.R, p.E, kTileM, n_tiles), args, args.paired);
  return true;
}

template <class T, class Start> bool dispatch(const RowsProblem& p, const StoreRows& out, const Start& start) {
  if (p.layout == Layout::nk) return start_rows<T, Layout::nk, StoreRowsEpilogue<T, true>>(p, out, start);
  return start_rows<T, Layout::kn, StoreRowsEpilogue<T, true>>(p, out, start);
}

template <class T, class Start> bool dispatch(const RowsProblem& p, const GatedForward& out, const Start& start) {
  return for_activation(out.activation, [&](auto* act) {
    return start_rows<T, Layout::nk, GatedForwardEpilogue<T, std::remove_pointer_t<decltype(act)>, true>>(p, out,
                                                                                                          start);
  });
}

template <class T, class Start> bool dispatch(const RowsProblem& p, const GatedBackward& out, const Start& start) {
  return for_activation(out.activation, [&](auto* act) {
    return start_rows<T, Layout::kn, GatedBackwardEpilogue<T, std::remove_pointer_t<decltype(act)>, true>>(p, out,
                                                                                                           start);
  });
}

template <class T, class Start> bool dispatch(const WgradProblem& p, const StoreGrad& out, const Start& start) {
  WgradArguments args{{}, {}, p, out};
  if (!StoreGradEpilogue<T, false, true>::whole(p, out) || !p.R ||
      !encode_rows(p.a, p.M, p.R, kTileK, start, &args.a) || !encode_rows(p.b, p.N, p.R, kTileK, start, &args.b))
    return false;
  start.launch(wgrad_kernel<T>, p.E * ceil_div(p.M, kTileM) * ceil_div(p.N, kTileN), args);
  return true;
}
}  // namespace sail::cuda::sm90
