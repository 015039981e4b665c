// Rotary embedding, with RMSNorm over the head before it or without. A head is a few vectors: it stays in the first-level
// cache between its sums and its results.
#include "rope.h"

#include "loop.h"

namespace sail::cpu::SAIL_ISA {
namespace {
struct Halves {
  vf low, high;
};

template <class T, class Lanes> Halves halves(const T* x, int64_t half, int64_t c, Lanes lanes) {
  return {load(x + c, lanes), load(x + half + c, lanes)};
}

// cos and sin of the same columns of both halves
struct Angles {
  Halves cos, sin;
};
template <class Lanes> Angles angles(const RopeHeads& in, int64_t half, int64_t c, Lanes lanes) {
  return {halves(in.cos, half, c, lanes), halves(in.sin, half, c, lanes)};
}
inline Halves rotate(Halves x, const Angles& a) {
  return {x.low * a.cos.low - x.high * a.sin.low, x.high * a.cos.high + x.low * a.sin.high};
}
inline Halves rotate_back(Halves y, const Angles& a) {
  return {y.low * a.cos.low + y.high * a.sin.high, y.high * a.cos.high - y.low * a.sin.low};
}

template <class T, class Lanes> void put(T* y, int64_t half, int64_t c, Halves v, Lanes lanes) {
  store(y + c, v.low, lanes);
  store(y + half + c, v.high, lanes);
}

template <class T> const T* head(const void* base, int64_t h, int64_t step) {
  return reinterpret_cast<const T*>(static_cast<const char*>(base) + h * step);
}
template <class T> T* result(const RopeHeads& in, int64_t h) { return static_cast<T*>(in.y) + h * in.A; }

// heads(first, number of them) for groups of kGroup and what is left: a group shares its angles and weights, and the
// sums of its heads overlap
constexpr int kGroup = 2;
template <int N> struct Number {
  static constexpr int value = N;
};
template <class Heads> void for_groups(int64_t n, Heads heads) {
  int64_t h = 0;
  for (; h + kGroup <= n; h += kGroup) heads(h, Number<kGroup>{});
  for (; h < n; h++) heads(h, Number<1>{});
}

template <class T, bool TRANSPOSED, int N> void rope_heads(const RopeHeads& in, int64_t first) {
  const int64_t half = in.A / 2;
  for_vectors(half, [&](int64_t c, auto lanes) {
    const Angles a = angles(in, half, c, lanes);
    for (int i = 0; i < N; i++) {
      const T* x = TRANSPOSED ? head<T>(in.grad, first + i, in.grad_step) : head<T>(in.x, first + i, in.x_step);
      const Halves v = halves(x, half, c, lanes);
      put(result<T>(in, first + i), half, c, TRANSPOSED ? rotate_back(v, a) : rotate(v, a), lanes);
    }
  });
}

template <class T, bool TRANSPOSED> void rope_kernel(const RopeHeads& in) {
  for_groups(in.heads, [&](int64_t first, auto n) { rope_heads<T, TRANSPOSED, n.value>(in, first); });
}

// Heads between prefetch and use: a head is 4 lines of bf16, too few for the hardware to see a stream in time.
constexpr int64_t kAhead = 8;

inline vf squared(Halves v, vf acc) { return fma(v.low, v.low, fma(v.high, v.high, acc)); }
inline double inverse_rms(vf squares, const RopeHeads& in) {
  return 1 / sqrt(static_cast<double>(sum(squares)) / static_cast<double>(in.A) + static_cast<double>(in.eps));
}

template <class T, int N> void norm_rope_heads(const RopeHeads& in, int64_t first) {
  const int64_t half = in.A / 2;
  float r[N];
  for (int i = 0; i < N; i++) {
    const T* x = head<T>(in.x, first + i, in.x_step);
    prefetch(head<T>(in.x, first + i + kAhead, in.x_step), in.A);
    const vf squares =
        sum_vectors<vf>(half, [=](int64_t c, auto lanes, vf& acc) { acc = squared(halves(x, half, c, lanes), acc); });
    r[i] = static_cast<float>(inverse_rms(squares, in));
  }
  for_vectors(half, [&](int64_t c, auto lanes) {
    const Angles a = angles(in, half, c, lanes);
    const Halves wv = halves(in.weight, half, c, lanes);
    for (int i = 0; i < N; i++) {
      const Halves v = halves(head<T>(in.x, first + i, in.x_step), half, c, lanes);
      const Halves normed = {v.low * r[i] * wv.low, v.high * r[i] * wv.high};
      put(result<T>(in, first + i), half, c, rotate(normed, a), lanes);
    }
  });
}

template <class T> void norm_rope_kernel(const RopeHeads& in) {
  for_groups(in.heads, [&](int64_t first, auto n) { norm_rope_heads<T, n.value>(in, first); });
}

// body(i, c, lanes) for the i-th columns of a head of A; of 128, Qwen3's, whose `Kept` columns the compiler then keeps
// in registers from its sums to its results, as far as there are registers.
constexpr int kKept = 64 / W;
struct Kept {
  Halves columns[kKept];
};
template <class Body> inline void for_kept(Body body) {
#pragma GCC unroll 4
  for (int i = 0; i < kKept; i++) body(i, i * W, All{});
}

struct HeadSums {
  vf squares, dot;
};
inline HeadSums operator+(HeadSums a, HeadSums b) { return {a.squares + b.squares, a.dot + b.dot}; }

// With n the gradient of the norm's result: dx = r (w n - x r^2 mean(w n x)), dweight += n x r
struct HeadBackward {
  const RopeHeads& in;
  int64_t h, half = in.A / 2;
  float r = 0, dot = 0;

  template <class T, class Lanes> Halves x(int64_t c, Lanes lanes) const {
    return halves(head<T>(in.x, h, in.x_step), half, c, lanes);
  }
  template <class T, class Lanes> Halves n(int64_t c, Lanes lanes) const {
    return rotate_back(halves(head<T>(in.grad, h, in.grad_step), half, c, lanes), angles(in, half, c, lanes));
  }
  template <class Lanes> void add(Halves v, Halves n, int64_t c, Lanes lanes, HeadSums& acc) const {
    const Halves w = halves(in.weight, half, c, lanes);
    acc.squares = squared(v, acc.squares);
    acc.dot += fma(n.low * w.low, v.low, n.high * w.high * v.high);
  }
  void take(HeadSums sums) {
    const double inverse = inverse_rms(sums.squares, in);
    r = static_cast<float>(inverse);
    dot = static_cast<float>(inverse * inverse * static_cast<double>(sum(sums.dot)) / static_cast<double>(in.A));
  }
  template <class T, class Lanes> void put_gradients(Halves v, Halves n, int64_t c, Lanes lanes) const {
    const Halves w = halves(in.weight, half, c, lanes);
    const Halves dx = {(w.low * n.low - v.low * dot) * r, (w.high * n.high - v.high * dot) * r};
    put(result<T>(in, h), half, c, dx, lanes);
    if (!in.dweight) return;
    const Halves before = halves(in.dweight, half, c, lanes);
    put(in.dweight, half, c, {fma(n.low, v.low * r, before.low), fma(n.high, v.high * r, before.high)}, lanes);
  }
};

template <class T> void norm_rope_backward_kernel(const RopeHeads& in) {
  for (int64_t h = 0; h < in.heads; h++) {
    HeadBackward b = {in, h};
    prefetch(head<T>(in.x, h + kAhead, in.x_step), in.A);
    prefetch(head<T>(in.grad, h + kAhead, in.grad_step), in.A);
    if (b.half == kKept * W) {
      Kept v, n;
      HeadSums sums = {};
      for_kept([&](int i, int64_t c, All all) {
        b.add(v.columns[i] = b.x<T>(c, all), n.columns[i] = b.n<T>(c, all), c, all, sums);
      });
      b.take(sums);
      for_kept([&](int i, int64_t c, All all) { b.put_gradients<T>(v.columns[i], n.columns[i], c, all); });
    } else {
      b.take(sum_vectors<HeadSums>(b.half, [&](int64_t c, auto lanes, HeadSums& acc) {
        b.add(b.x<T>(c, lanes), b.n<T>(c, lanes), c, lanes, acc);
      }));
      for_vectors(b.half,
                  [&](int64_t c, auto lanes) { b.put_gradients<T>(b.x<T>(c, lanes), b.n<T>(c, lanes), c, lanes); });
    }
  }
}

template <class T> void widen_kernel(const void* in, int64_t n, float* out) {
  for_vectors(n, [=](int64_t c, auto lanes) { store(out + c, load(static_cast<const T*>(in) + c, lanes), lanes); });
}

template <class T> void narrow_kernel(const double* in, int64_t n, void* out) {
  for (int64_t i = 0; i < n; i++) from_float(static_cast<float>(in[i]), static_cast<T*>(out) + i);
}
}  // namespace

const RopeKernels kRope = {
    {rope_kernel<float, false>, rope_kernel<bf16, false>, rope_kernel<f16, false>},
    {rope_kernel<float, true>, rope_kernel<bf16, true>, rope_kernel<f16, true>},
    {norm_rope_kernel<float>, norm_rope_kernel<bf16>, norm_rope_kernel<f16>},
    {norm_rope_backward_kernel<float>, norm_rope_backward_kernel<bf16>, norm_rope_backward_kernel<f16>},
    {widen_kernel<float>, widen_kernel<bf16>, widen_kernel<f16>},
    {narrow_kernel<float>, narrow_kernel<bf16>, narrow_kernel<f16>},
};
}  // namespace sail::cpu::SAIL_ISA
