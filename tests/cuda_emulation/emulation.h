// Runs CUDA kernels on the CPU, from their own sources: every thread of a block is a fiber of one CPU thread.
//
// Use, from a C++ file that a test compiles with g++ and loads (tests/support/emulated.py does both):
//   #include "cuda_runtime.h"     first: the language (threadIdx, __shared__, shuffles, bf16 and fp16, ...)
//   #include "some_kernel.cuh"    from csrc/cuda/kernels; its ptx.cuh includes ptx.h of this folder instead
//   emu::Options options;         seed: the order of threads; shared_bytes: dynamic shared memory of a block
//   const char* my_test(const Problem& p) {       declared in tests/native/calls.h, bound in module.cpp beside it
//     return emu::guard([&] { emu::launch(grid, block, options, [&] { some_kernel(arguments); }); });
//   }
// What it shows that a GPU shows only by chance:
//   - a missing barrier or wait: the order of threads is drawn from the seed, on some seeds with whole warps running as
//     far ahead as they can; cp.async writes NaN when it is issued and the data only when it is waited for
//   - memory nobody wrote: dynamic shared memory starts as NaN (all bits set), in every block
//   - deadlock, lanes of a warp in different collectives, a barrier that some threads missed: an error with who waits
//   - addresses: shared ones against the block's memory and their alignment, asynchronous global ones against
//     the ranges given by emu::allow, if any was
// What it does not show: speed, registers, bank conflicts, the rounding of a tensor core's sum, races inside one warp
// between collectives, poisoned static __shared__ memory (it keeps the last block's).
// Blocks run one after another, in an order drawn from the seed. Those of a cluster run together, so without static
// __shared__ variables, of which there is one set; what a block of it reaches in another must still be there: after the
// last access a barrier of the cluster comes before either leaves.
//
// An emulated instruction is built from three things: emu::warp_collective (all lanes give an argument, the last to come
// computes every lane's result), emu::barrier (named barriers) and emu::wait_until (any condition, such as an mbarrier).
#pragma once
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
  constexpr unsigned count() const { return x * y * z; }
};
inline uint3 threadIdx, blockIdx;  // of the running fiber
inline dim3 blockDim, gridDim;

namespace emu {
constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 << 10, kMostBytes = 256;  // of a fiber; of a collective's argument or result
constexpr size_t kSharedMost = 232448;                       // of a block

struct Options {
  uint64_t seed = 0;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks 0 .. cluster - 1 are one, and so on
};

struct Copy {  // one cp.async in flight: `bytes` from global memory, zeros up to `size`
  char* to;
  const char* from;
  int bytes, size;
};

struct Block;
struct Fiber {
  Block* block = nullptr;
  uint3 thread;
  int warp = 0, lane = 0, slot = 0;  // slot: of its warp among all that are resident
  enum State { ready, waiting, done } state = ready;
  const char* at = "";  // what it waits in
  unsigned mask = 0;    // lanes of the collective it waits in
  alignas(16) char argument[kMostBytes], result[kMostBytes];
  std::vector<std::vector<Copy>> copies{1};  // cp.async groups, the last one still open
  jmp_buf context;
  bool started = false;
};

struct Barrier {
  int arrived = 0;
  std::vector<Fiber*> waiting;
};

struct Block;
struct Cluster {
  std::vector<Block*> blocks;  // by rank
  Barrier barrier;
};

struct Block {
  uint3 index;
  Cluster* cluster = nullptr;
  bool reached = false;             // by another block since the cluster's last barrier
  int in_flight = 0;                // tensor copies on their way into it
  std::unique_ptr<char[]> storage;  // shared memory and room to align it
  char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Fiber> fibers;
  int live = 0;
  Barrier barriers[16];
  std::shared_ptr<void> more;  // the state of instructions emulated elsewhere
};

struct Machine {
  std::mt19937_64 random;
  bool greedy = false;                     // warps run ahead in the order of `rank`
  std::vector<uint64_t> rank;              // by slot
  std::vector<std::vector<Fiber*>> ready;  // by slot
  size_t ready_count = 0;
  std::vector<std::unique_ptr<Block>> blocks;  // of the one cluster that runs
  Cluster cluster;
  std::vector<std::unique_ptr<char[]>> stacks;
  Fiber* current = nullptr;
  int64_t idle_polls = 0;  // since something other than a poll ran
  std::string error;
  jmp_buf main;
  const std::function<void()>* kernel = nullptr;
  std::vector<std::pair<const char*, const char*>> allowed;
};
inline Machine machine;

inline Fiber& self() { return *machine.current; }
inline Block& block() { return *machine.current->block; }

// Ends the launch with this error; fibers are abandoned where they are.
[[noreturn]] inline void fail(const std::string& what) {
  const Fiber& f = self();
  machine.error =
      "block " + std::to_string(f.block->index.x) + ", thread " + std::to_string(f.warp * kWarp + f.lane) + ": " + what;
  _longjmp(machine.main, 1);
}

// ---- global memory that asynchronous copies may touch; none given: any
inline void allow(const void* p, size_t bytes) {
  machine.allowed.push_back({static_cast<const char*>(p), static_cast<const char*>(p) + bytes});
}
inline void forget_allowed() { machine.allowed.clear(); }
inline void check_global(const void* p, size_t bytes, const char* who) {
  const char* at = static_cast<const char*>(p);
  if (!bytes || machine.allowed.empty()) return;
  for (const auto& [begin, end] : machine.allowed)
    if (at >= begin && at + bytes <= end) return;
  fail(std::string(who) + " of " + std::to_string(bytes) + " bytes outside every allowed range");
}

// ---- shared memory as 32-bit addresses from 0
inline uint32_t shared_address(const void* p) {
  const char* at = static_cast<const char*>(p);
  if (at < block().shared || at > block().shared + block().shared_bytes) fail("a pointer outside of shared memory");
  return static_cast<uint32_t>(at - block().shared);
}
inline char* shared_pointer(uint32_t address, size_t bytes, const char* who) {
  if (address % std::min<size_t>(bytes, 16)) fail(std::string(who) + ": shared address " + std::to_string(address));
  if (address + bytes > block().shared_bytes) fail(std::string(who) + ": past the end of shared memory");
  return block().shared + address;
}

// ---- fibers
inline void make_ready(Fiber* f) {
  f->state = Fiber::ready;
  machine.ready[f->slot].push_back(f);
  machine.ready_count++;
}

// Takes back make_ready of the current fiber, which goes on running.
inline void keep_running() {
  std::vector<Fiber*>& among = machine.ready[self().slot];
  among.erase(std::find(among.begin(), among.end(), &self()));
  machine.ready_count--;
}

// The next fiber to run, taken out of the ready ones.
inline Fiber* take_ready() {
  Machine& m = machine;
  size_t slot = m.ready.size(), index = 0;
  if (m.greedy) {
    for (size_t i = 0; i < m.ready.size(); i++)
      if (!m.ready[i].empty() && (slot == m.ready.size() || m.rank[i] < m.rank[slot])) slot = i;
    index = m.random() % m.ready[slot].size();
  } else {
    index = m.random() % m.ready_count;
    for (slot = 0; index >= m.ready[slot].size(); slot++) index -= m.ready[slot].size();
  }
  std::vector<Fiber*>& from = m.ready[slot];
  Fiber* f = from[index];
  from[index] = from.back();
  from.pop_back();
  m.ready_count--;
  return f;
}

inline void fiber_main() {
  (*machine.kernel)();
  self().state = Fiber::done;
  _longjmp(machine.main, 2);
}

// Leaves the current fiber for another ready one, or for the launcher if there is none.
[[gnu::noinline]] inline void switch_away() {
  if (_setjmp(self().context) == 0) _longjmp(machine.main, 2);
}

inline void run(Fiber* f) {
  machine.current = f;
  threadIdx = f->thread, blockIdx = f->block->index;
  if (f->started) _longjmp(f->context, 1);
  f->started = true;
  ucontext_t start;
  getcontext(&start);
  const size_t index = static_cast<size_t>(f - f->block->fibers.data());
  size_t base = 0;
  for (const auto& b : machine.blocks) {
    if (b.get() == f->block) break;
    base += b->fibers.size();
  }
  start.uc_stack.ss_sp = machine.stacks[base + index].get();
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, fiber_main, 0);
  setcontext(&start);
}

inline void wait(const char* at) {
  self().state = Fiber::waiting;
  self().at = at;
  switch_away();
}

// Waits until condition() holds; others run meanwhile.
template <class Condition> void wait_until(const char* at, Condition condition) {
  while (!condition()) {
    if (++machine.idle_polls > 200000) fail(std::string("nothing moves any more, waiting in ") + at);
    self().at = at;
    make_ready(&self());
    if (machine.greedy) machine.greedy = false;  // a poller of high rank would keep the others from running
    switch_away();
  }
  machine.idle_polls = 0;
}

// ---- barriers: `threads` arrivals complete one; with wait = false the thread goes on
inline void complete_barrier(Barrier& b) {
  b.arrived = 0;
  for (Fiber* f : b.waiting) make_ready(f);
  b.waiting.clear();
  machine.idle_polls = 0;
  for (uint64_t& r : machine.rank) r = machine.random();
}
inline void barrier(int id, int threads, bool wait_for_it = true) {
  Barrier& b = block().barriers[id];
  b.arrived++;
  if (b.arrived >= threads) return complete_barrier(b);
  if (!wait_for_it) return;
  b.waiting.push_back(&self());
  wait(id ? "a named barrier" : "__syncthreads");
}
inline void sync_threads() { barrier(0, block().live); }

// ---- clusters
inline void complete_cluster(Cluster& c) {
  for (Block* b : c.blocks) b->reached = false;
  complete_barrier(c.barrier);
}
inline int live_threads(const Cluster& c) {
  int live = 0;
  for (const Block* b : c.blocks) live += b->live;
  return live;
}
inline void cluster_barrier() {
  Cluster& c = *block().cluster;
  if (++c.barrier.arrived >= live_threads(c)) return complete_cluster(c);
  c.barrier.waiting.push_back(&self());
  wait("the cluster's barrier");
}
// The block of this rank, about to be reached by the running one.
inline Block& reach(size_t rank) {
  Cluster& c = *block().cluster;
  if (rank >= c.blocks.size()) fail("a block of rank " + std::to_string(rank) + " that the cluster does not have");
  Block& other = *c.blocks[rank];
  if (!other.live) fail("a block that has left is reached");
  if (&other != &block()) other.reached = true;
  return other;
}

// ---- warp collectives: compute(lanes) is called once, by the last lane of `mask` to arrive; lanes[i] is null where i
// is not in the mask, otherwise its fiber with `argument`, and gets `result`.
template <class Result, class Argument, class Compute>
Result warp_collective(const char* name, unsigned mask, const Argument& argument, Compute compute) {
  static_assert(sizeof(Argument) <= kMostBytes && sizeof(Result) <= kMostBytes);
  Fiber& me = self();
  if (!(mask >> me.lane & 1)) fail(std::string(name) + ": the mask leaves out the calling lane");
  memcpy(me.argument, &argument, sizeof argument);
  me.at = name, me.mask = mask, me.state = Fiber::waiting;
  Fiber* first = &block().fibers[me.warp * kWarp];
  Fiber* lanes[kWarp] = {};
  for (int i = 0; i < kWarp; i++) {
    if (!(mask >> i & 1)) continue;
    Fiber& f = first[i];
    if (static_cast<size_t>(me.warp * kWarp + i) >= block().fibers.size()) fail(std::string(name) + ": no such lane");
    if (f.state != Fiber::waiting || f.at != name || f.mask != mask) {
      if (f.state == Fiber::waiting && f.mask && f.at != name && (f.mask & mask) && strcmp(f.at, name))
        fail("lane " + std::to_string(me.lane) + " is in " + name + ", lane " + std::to_string(i) + " in " + f.at);
      switch_away();
      Result r;
      memcpy(&r, me.result, sizeof r);
      return r;
    }
    lanes[i] = &f;
  }
  compute(lanes);
  for (Fiber* f : lanes)
    if (f) {
      f->mask = 0;
      if (f != &me) make_ready(f);
    }
  me.state = Fiber::ready;
  machine.idle_polls = 0;
  Result r;
  memcpy(&r, me.result, sizeof r);
  return r;
}
template <class T> T& argument_of(Fiber* f) { return *reinterpret_cast<T*>(f->argument); }
template <class T> T& result_of(Fiber* f) { return *reinterpret_cast<T*>(f->result); }

// ---- launch
inline void start_block(Block& b, uint3 index, int first_slot, dim3 threads, const Options& o) {
  b.index = index;
  if (o.shared_bytes > kSharedMost) throw std::runtime_error("more shared memory than a block has");
  const size_t bytes = o.shared_bytes + 2048;  // a mutant that reads past its end must find poison, and no wild index
  b.storage.reset(new char[bytes]);
  b.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(b.storage.get()) + 1023) / 1024 * 1024);
  b.shared_bytes = o.shared_bytes;
  memset(b.storage.get(), 0xff, bytes);
  b.fibers = std::vector<Fiber>(threads.count());
  b.live = static_cast<int>(threads.count());
  for (Barrier& barrier : b.barriers) barrier = {};
  for (unsigned i = 0; i < threads.count(); i++) {
    Fiber& f = b.fibers[i];
    f.block = &b;
    f.thread.x = i % threads.x, f.thread.y = i / threads.x % threads.y, f.thread.z = i / threads.x / threads.y;
    f.warp = static_cast<int>(i) / kWarp, f.lane = static_cast<int>(i) % kWarp;
    f.slot = first_slot + f.warp;
    make_ready(&f);
  }
}

// A block's last thread has ended.
inline void leave(const Block& b) {
  if (b.in_flight) throw std::runtime_error("a block leaves while tensor copies are on their way into it");
  if (b.reached) throw std::runtime_error("a block leaves that was reached since the cluster's last barrier");
}

inline std::string who_waits() {
  std::string text = "deadlock:";
  int named = 0;
  for (const auto& b : machine.blocks)
    for (const Fiber& f : b->fibers)
      if (f.state != Fiber::done && named++ < 8)
        text += " thread " + std::to_string(f.warp * kWarp + f.lane) + " in " + f.at + ";";
  return text + (named > 8 ? " ..." : "");
}

inline void run_blocks() {
  Machine& m = machine;
  const int code = _setjmp(m.main);
  if (code == 1) throw std::runtime_error(m.error);
  if (code == 2 && m.current->state == Fiber::done) {
    Block& b = *m.current->block;
    b.live--;
    if (!b.live) leave(b);
    if (b.live && b.barriers[0].arrived >= b.live) complete_barrier(b.barriers[0]);
    if (m.cluster.barrier.arrived && m.cluster.barrier.arrived >= live_threads(m.cluster)) complete_cluster(m.cluster);
    m.idle_polls = 0;
  }
  if (m.ready_count) run(take_ready());
  for (const auto& b : m.blocks)
    if (b->live) throw std::runtime_error(who_waits());
}

inline void launch(dim3 grid, dim3 threads, const Options& o, const std::function<void()>& kernel) {
  Machine& m = machine;
  m.random.seed(o.seed);
  m.kernel = &kernel;
  m.idle_polls = 0;
  gridDim = grid, blockDim = threads;
  if (grid.count() % o.cluster) throw std::runtime_error("a grid that is no multiple of the cluster");
  std::vector<unsigned> order(grid.count() / o.cluster);
  for (unsigned i = 0; i < order.size(); i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), m.random);
  const size_t warps = (threads.count() + kWarp - 1) / kWarp;
  while (m.stacks.size() < o.cluster * threads.count()) m.stacks.emplace_back(new char[kStackBytes]);
  for (const unsigned cluster : order) {
    m.ready.assign(warps * o.cluster, {}), m.ready_count = 0, m.blocks.clear(), m.cluster = {};
    m.greedy = m.random() % 2 != 0;
    m.rank.resize(m.ready.size());
    for (uint64_t& r : m.rank) r = m.random();
    for (unsigned rank = 0; rank < o.cluster; rank++) {
      m.blocks.push_back(std::make_unique<Block>());
      const unsigned b = cluster * o.cluster + rank;
      uint3 index;
      index.x = b % grid.x, index.y = b / grid.x % grid.y, index.z = b / grid.x / grid.y;
      m.blocks.back()->cluster = &m.cluster;
      m.cluster.blocks.push_back(m.blocks.back().get());
      start_block(*m.blocks.back(), index, static_cast<int>(rank * warps), threads, o);
    }
    run_blocks();
  }
}

// For exported functions: what f throws as text, or null.
template <class F> const char* guard(F&& f) {
  static std::string error;
  try {
    f();
  } catch (const std::exception& e) { return (error = e.what()).c_str(); }
  return nullptr;
}
}  // namespace emu
