// For tests/cuda/test_cuda_launcher.py: csrc/cuda/launcher.h over the emulated card (SAIL_EMULATED_CARD).
#include "launcher.h"

#include <cstdio>

using namespace sail::cuda;

static void count_kernel(int* blocks, int* threads) {
  if (!threadIdx.x) ++*blocks;
  ++*threads;
}

static void launch_count(const char* name, const Grid& grid, int64_t shared_bytes) {
  int blocks = 0, threads = 0;
  try {
    launch(count_kernel, grid, 32, shared_bytes, Stream{"norm", nullptr}, &blocks, &threads);
    std::printf("%s: %d blocks, %d threads\n", name, blocks, threads);
  } catch (const std::runtime_error& e) {
    std::printf("%s: %s; then %s\n", name, e.what(), cudaGetErrorString(cudaGetLastError()));
  }
}

static void copy(const char* name, int64_t stride) {
  const int from[] = {1, 2, 3, 4, 5, 6};
  int to[] = {0, 0, 0, 0};
  copy_to_host(to, from, 4, 3, stride, Stream{"norm", nullptr});
  std::printf("%s: %d %d %d %d\n", name, to[0], to[1], to[2], to[3]);
}

int main() {
  launch_count("plain", 3, 0);
  launch_count("rows", Grid(3, 2), 0);
  launch_count("clusters", Grid(4, 1, 2), 0);
  launch_count("half of a cluster", Grid(3, 1, 2), 0);
  launch_count("asked for", 1, 60 * 1024);
  launch_count("too much", 1, 70 * 1024);
  launch_count("nothing", 0, 0);
  launch_count("too many", int64_t{1} << 31, 0);
  copy("side by side", 4), copy("apart", 8), copy("one for all", 0);
}
