// Work cut into tasks, and the parallel loop over them.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "workspace.h"

namespace sail::cpu {
// Calls f(begin, end) for the fewest equal pieces of at most `most`.
template <class F> void for_pieces(int64_t begin, int64_t end, int64_t most, F&& f) {
  const int64_t n = end - begin, pieces = (n + most - 1) / most;
  for (int64_t i = 0; i < pieces; i++) f(begin + n * i / pieces, begin + n * (i + 1) / pieces);
}

// Runs body(task, scratch of this thread) over all tasks; each output belongs to one task, so the result does not
// depend on which thread takes it.
template <class Task, class Body>
void run_tasks(const std::vector<Task>& tasks, int threads, int64_t scratch_bytes, Body&& body) {
  const int64_t count = static_cast<int64_t>(tasks.size());
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (!threads) return;
  const int64_t each = (scratch_bytes + 4095) / 4096 * 4096 + 64;  // threads must not share cache sets exactly
  Buffer scratch(each * threads);
#pragma omp parallel num_threads(threads)
  {
    char* mine = scratch.get() + each * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) body(tasks[i], mine);
  }
}
}  // namespace sail::cpu
