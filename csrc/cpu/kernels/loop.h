// Loops over a row, a vector at a time: the body is compiled twice, for whole vectors and for the last few elements.
#pragma once
#include "vec.h"

namespace sail::cpu::SAIL_ISA {
struct All {};  // W elements
struct Some {   // the first n < W; loads fill the other lanes with zero
  int n;
};
template <class T> static inline vf load(const T* p, All) { return load(p); }
template <class T> static inline vf load(const T* p, Some s) { return load_n(p, s.n); }
template <class T> static inline void store(T* p, vf v, All) { store(p, v); }
template <class T> static inline void store(T* p, vf v, Some s) { store_n(p, v, s.n); }

// n elements at p into the second-level cache; p may be past the end of anything
template <class T> static inline void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i, 0, 2);
}

// body(c, lanes) for c = 0, W, 2W, ... < n
template <class Body> static inline void for_vectors(int64_t n, Body body) {
  int64_t c = 0;
  for (; c + W <= n; c += W) body(c, All{});
  if (c < n) body(c, Some{static_cast<int>(n - c)});
}

// Sum over the row of term(c, lanes, acc), which adds into acc (a vector or a struct of vectors with operator+).
// Four chains hide the latency of an addition; spans bound the rounding error of rows of any width.
template <class Acc, class Term> static inline Acc sum_vectors(int64_t n, Term term) {
  constexpr int64_t kSpan = 64 * W;
  Acc total = {};
  int64_t c = 0;
  while (c + W <= n) {
    const int64_t stop = n - c < kSpan ? n : c + kSpan;
    Acc a0 = {}, a1 = {}, a2 = {}, a3 = {};
    for (; c + 4 * W <= stop; c += 4 * W) {
      term(c, All{}, a0);
      term(c + W, All{}, a1);
      term(c + 2 * W, All{}, a2);
      term(c + 3 * W, All{}, a3);
    }
    for (; c + W <= stop; c += W) term(c, All{}, a0);
    total = total + ((a0 + a1) + (a2 + a3));
  }
  if (c < n) {
    Acc a = {};
    term(c, Some{static_cast<int>(n - c)}, a);
    total = total + a;
  }
  return total;
}
}  // namespace sail::cpu::SAIL_ISA
