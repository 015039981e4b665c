// csrc/cuda/kernels/ptx.cuh on the fibers of emulation.h, from the layouts that the PTX ISA documents.
#pragma once
#include "cuda_runtime.h"

namespace sail::cuda::ptx {
inline uint32_t shared_address(const void* p) { return emu::shared_address(p); }

inline void named_barrier(int id, int threads) { emu::barrier(id, threads); }
inline void named_barrier_arrive(int id, int threads) { emu::barrier(id, threads, false); }
inline uint32_t fresh(uint32_t x) { return x; }
inline float exp2(float x) { return ::exp2f(x); }

// ---- cp.async: NaN when issued, the data when it is waited for, as late as the ISA allows
inline void cp_async_of(int size, uint32_t to, const void* from, int bytes) {
  if (bytes < 0 || bytes > size) emu::fail("cp.async of " + std::to_string(bytes) + " bytes");
  if (reinterpret_cast<uintptr_t>(from) % size)
    emu::fail("cp.async from an address that is no multiple of " + std::to_string(size));
  emu::check_global(from, static_cast<size_t>(bytes), "cp.async");
  char* at = emu::shared_pointer(to, static_cast<size_t>(size), "cp.async");
  memset(at, 0xff, static_cast<size_t>(size));
  emu::self().copies.back().push_back({at, static_cast<const char*>(from), bytes, size});
}
inline void cp_async(uint32_t to, const void* from, int bytes) { cp_async_of(16, to, from, bytes); }
inline void cp_async_8(uint32_t to, const void* from, int bytes) { cp_async_of(8, to, from, bytes); }
inline void cp_async_commit() { emu::self().copies.emplace_back(); }
template <int kPending> void cp_async_wait() {
  auto& groups = emu::self().copies;  // the last one is still open
  while (groups.size() > kPending + 1) {
    for (const emu::Copy& c : groups.front()) {
      memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
      memset(c.to + c.bytes, 0, static_cast<size_t>(c.size - c.bytes));
    }
    groups.erase(groups.begin());
  }
}

// ---- ldmatrix
struct Registers {
  uint32_t r[4];
};
inline void ldmatrix_any(const char* name, uint32_t (&r)[4], uint32_t row, bool transposed) {
  const Registers all = emu::warp_collective<Registers>(name, ~0u, row, [transposed](emu::Fiber** lanes) {
    uint16_t m[4][8][8];
    for (int i = 0; i < emu::kWarp; i++)
      memcpy(m[i / 8][i % 8], emu::shared_pointer(emu::argument_of<uint32_t>(lanes[i]), 16, "ldmatrix"), 16);
    for (int l = 0; l < emu::kWarp; l++)
      for (int j = 0; j < 4; j++) {
        const int g = l / 4, q = 2 * (l % 4);
        const uint32_t low = transposed ? m[j][q][g] : m[j][g][q], high = transposed ? m[j][q + 1][g] : m[j][g][q + 1];
        emu::result_of<Registers>(lanes[l]).r[j] = low | high << 16;
      }
  });
  memcpy(r, all.r, sizeof r);
}
inline void ldmatrix(uint32_t (&r)[4], uint32_t row) { ldmatrix_any("ldmatrix", r, row, false); }
inline void ldmatrix_transposed(uint32_t (&r)[4], uint32_t row) { ldmatrix_any("ldmatrix.trans", r, row, true); }

// ---- mma: exact products, summed over k and rounded to fp32 once
template <class T> float element(uint32_t pair, int high) {
  T value;
  value.bits = static_cast<uint16_t>(pair >> (16 * high));
  return static_cast<float>(value);
}
struct Fragments {
  uint32_t a[4], b[2];
  float c[4];
};
template <class T> void mma_all(emu::Fiber** lanes) {
  float A[16][16], B[16][8];
  for (int l = 0; l < emu::kWarp; l++) {
    const Fragments& f = emu::argument_of<Fragments>(lanes[l]);
    const int g = l / 4, q = 2 * (l % 4);
    for (int h = 0; h < 2; h++) {
      for (int i = 0; i < 4; i++) A[g + 8 * (i % 2)][q + 8 * (i / 2) + h] = element<T>(f.a[i], h);
      for (int i = 0; i < 2; i++) B[q + 8 * i + h][g] = element<T>(f.b[i], h);
    }
  }
  for (int l = 0; l < emu::kWarp; l++) {
    const Fragments& f = emu::argument_of<Fragments>(lanes[l]);
    for (int i = 0; i < 4; i++) {
      const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
      double sum = f.c[i];
      for (int k = 0; k < 16; k++) sum += double{A[row][k]} * B[k][column];
      emu::result_of<Fragments>(lanes[l]).c[i] = static_cast<float>(sum);
    }
  }
}
template <class T> void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments f = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  f = emu::warp_collective<Fragments>("mma", ~0u, f, mma_all<T>);
  memcpy(c, f.c, sizeof c);
}
}  // namespace sail::cuda::ptx
