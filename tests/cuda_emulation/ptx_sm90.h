// csrc/cuda/kernels/ptx_sm90.cuh on the fibers of emulation.h, from what the PTX ISA documents and nothing else:
//   mbarrier   9.7.13.15: a phase ends when the pending count and the transaction count are both zero
//   TMA        9.7.9.27 and 5.5: boxes, zeros outside of the tensor, 128-byte swizzle by address bits
//   wgmma      9.7.16.5.1.2: matrix descriptors and their canonical layouts; 9.7.16.5.1.1: fragments in registers, those
//              of A and of the accumulator
// Everything asynchronous happens as late as it may: a box or a cp.async lands when a thread waits for a barrier that
// lacks nothing else, and leaves NaN until then; wgmma reads its operands, registers too, at wait_group, finds out if they
// changed since it was issued, and leaves NaN in the accumulators until then.
#pragma once
#include <map>

#include "ptx.h"

struct alignas(64)
    CUtensorMap {  // what cuTensorMapEncodeTiled was given; 16-bit elements, 128-byte swizzle, 3 or 4 dimensions
  const char* data;
  int dims;
  uint64_t size[4];    // elements
  uint64_t stride[3];  // bytes, of dimensions 1 to 3
  uint32_t box[4];     // elements
};

namespace sail::cuda::ptx {
struct Box {  // one tensor copy on its way
  emu::Block* into;
  const CUtensorMap* map;
  int32_t at[4];
  uint32_t to;
  int64_t bytes() const { return int64_t{2} * map->box[0] * map->box[1] * map->box[2]; }  // and one of dimension 3
};
struct Arrival {  // one cp.async.mbarrier.arrive on its way
  emu::Fiber* thread;
  std::vector<emu::Copy> copies;
};
struct MBarrier {
  int64_t count = 0, pending = 0, bytes = 0;  // bytes promised and not yet landed
  uint64_t phase = 0;
  std::vector<Box> boxes;
  std::vector<Arrival> arrivals;
  std::vector<emu::Fiber*> waiting;
};
struct Call {  // one lane's wgmma
  uint64_t a, b;
  const uint32_t* fragment;  // four registers instead of a, or null
  float* d;
  int columns;
  bool add, trans_a, trans_b, bf16;
};
struct Product : Call {  // one in flight, a warp's 16 rows of it
  uint64_t sum;          // of its operands when it was issued
  float* lanes[emu::kWarp];
  const uint32_t* fragments[emu::kWarp];
};
struct Accumulator {
  std::vector<float> values[emu::kWarp];
  int in_flight = 0;
};
struct Warp {
  std::vector<std::vector<Product>> groups{1};  // the last one still open
  std::map<float*, Accumulator> accumulators;   // by the first lane's
  bool fenced = false;
  uint64_t issued = 0;
};
struct Chunk {  // the last ordinary write of 16 bytes of shared memory; 0: none since the copy engine's
  uint64_t when = 0;
  emu::Fiber* who = nullptr;
};
struct State {
  std::map<uint32_t, MBarrier> barriers;
  std::map<int, Warp> warps;
  std::map<std::pair<int, uint64_t>, std::pair<uint64_t, uint64_t>> descriptors;  // of a warp group's n-th wgmma
  std::vector<Chunk> chunks;
  std::map<emu::Fiber*, uint64_t> proxy_fence;
  uint64_t now = 1;
};
inline State& state(emu::Block& block = emu::block()) {
  auto& more = block.more;
  if (!more) {
    auto fresh = std::make_shared<State>();
    fresh->chunks.resize(block.shared_bytes / 16 + 1);
    more = fresh;
  }
  return *static_cast<State*>(more.get());
}

// ---- mbarrier: that of another block lies at the same address
inline MBarrier& barrier_at(const uint64_t* p, emu::Block& block = emu::block()) {
  const auto found = state(block).barriers.find(emu::shared_address(p));
  if (found == state(block).barriers.end()) emu::fail("an mbarrier that was not initialized");
  return found->second;
}
inline void mbarrier_init(uint64_t* p, uint32_t count) {
  if (emu::shared_address(p) % 8) emu::fail("mbarrier: address no multiple of 8");
  MBarrier& b = state().barriers[emu::shared_address(p)];
  if (b.count) emu::fail("an mbarrier initialized twice");
  b.count = b.pending = count;
}
inline void fence_mbarrier_init() {}

inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }  // Swizzle<3, 4, 3>

inline void land(const Box& box) {
  const CUtensorMap& m = *box.map;
  for (uint32_t z = 0; z < m.box[2]; z++)
    for (uint32_t y = 0; y < m.box[1]; y++) {
      const uint64_t at[4] = {static_cast<uint64_t>(box.at[0]), box.at[1] + uint64_t{y}, box.at[2] + uint64_t{z},
                              static_cast<uint64_t>(box.at[3])};
      const bool inside = at[1] < m.size[1] && at[2] < m.size[2] && (m.dims == 3 || at[3] < m.size[3]);
      const char* from = m.data + at[0] * 2 + at[1] * m.stride[0] + at[2] * m.stride[1] + at[3] * m.stride[2];
      for (uint32_t x = 0; x < m.box[0]; x += 8) {  // 16 bytes, which the swizzle keeps together
        char* to = box.into->shared + swizzle_128(box.to + ((z * m.box[1] + y) * m.box[0] + x) * 2);
        const uint64_t left = m.size[0] > at[0] + x ? m.size[0] - at[0] - x : 0;
        const size_t bytes = inside ? std::min<uint64_t>(left, 8) * 2 : 0;
        emu::check_global(from + x * 2, bytes, "a tensor copy");
        memset(to, 0, 16);
        memcpy(to, from + x * 2, bytes);
      }
    }
  for (int64_t i = 0; i < box.bytes() / 16; i++) state(*box.into).chunks[box.to / 16 + i] = {};
  box.into->in_flight--;
}
inline void land(const Arrival& arrival) {
  for (const emu::Copy& c : arrival.copies) {
    memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
    memset(c.to + c.bytes, 0, static_cast<size_t>(c.size - c.bytes));
    State& s = state(*arrival.thread->block);
    s.chunks[(c.to - arrival.thread->block->shared) / 16] = {s.now++, arrival.thread};
  }
}

// Lets the phase end, if it lacks nothing but what is on its way and somebody waits for it.
inline void advance(MBarrier& b) {
  if (b.pending < 0) emu::fail("more arrivals at an mbarrier than its count");
  int64_t on_its_way = 0;
  for (const Box& box : b.boxes) on_its_way += box.bytes();
  const bool complete = b.pending == static_cast<int64_t>(b.arrivals.size()) && b.bytes == on_its_way;
  const bool asynchronous = !b.boxes.empty() || !b.arrivals.empty();
  if (!complete || (asynchronous && b.waiting.empty())) return;
  for (const Box& box : b.boxes) land(box);
  for (const Arrival& arrival : b.arrivals) land(arrival);
  b.boxes.clear(), b.arrivals.clear();
  b.pending = b.count, b.bytes = 0, b.phase++;
  for (emu::Fiber* f : b.waiting) emu::make_ready(f);
  b.waiting.clear();
  emu::machine.idle_polls = 0;
}
inline void mbarrier_arrive(uint64_t* p) {
  MBarrier& b = barrier_at(p);
  b.pending--;
  advance(b);
}
inline void mbarrier_arrive_at(uint64_t* p, uint32_t rank) {
  MBarrier& b = barrier_at(p, emu::reach(rank));
  b.pending--;
  advance(b);
}
inline void mbarrier_arrive_expect(uint64_t* p, uint32_t bytes) {
  MBarrier& b = barrier_at(p);
  b.pending--, b.bytes += bytes;
  advance(b);
}
inline void mbarrier_arrive_cp_async(uint64_t* p) {
  MBarrier& b = barrier_at(p);
  Arrival arrival{&emu::self(), {}};
  for (const auto& group : emu::self().copies) arrival.copies.insert(arrival.copies.end(), group.begin(), group.end());
  emu::self().copies.assign(1, {});
  b.arrivals.push_back(std::move(arrival));
  if (static_cast<int64_t>(b.arrivals.size()) > b.pending) emu::fail("more arrivals at an mbarrier than its count");
  advance(b);
}
inline void mbarrier_wait(uint64_t* p, uint32_t parity) {
  MBarrier& b = barrier_at(p);
  while ((b.phase & 1) == parity) {
    b.waiting.push_back(&emu::self());
    advance(b);
    if ((b.phase & 1) != parity) {  // advance() made this thread ready, and it still runs
      emu::keep_running();
      break;
    }
    emu::wait("mbarrier_wait");
  }
}
inline void cluster_sync() { emu::cluster_barrier(); }
inline void fence_proxy_async() { state().proxy_fence[&emu::self()] = state().now++; }

// ---- tensor copies
template <class TensorBox> bool encode(const TensorBox& b, CUtensorMap* map) {  // as csrc/cuda/tensor_map.h
  if (!b.encodable()) return false;
  map->data = static_cast<const char*>(b.data), map->dims = b.dims;
  for (int i = 0; i < 4; i++) map->size[i] = b.size[i], map->box[i] = b.box[i];
  for (int i = 0; i < 3; i++) map->stride[i] = b.stride[i];
  return true;
}
inline void load_box(const Box& box, uint64_t* p, int dims) {
  if (box.map->dims != dims) emu::fail("a box of other dimensions than its map");
  if (box.map->box[0] != 64) emu::fail("a box that is not 128 bytes wide");
  if (dims == 4 && box.map->box[3] != 1) emu::fail("a box of more than one of dimension 3 is not emulated");
  for (int32_t at : box.at)
    if (at < 0) emu::fail("a box at negative coordinates is not emulated");
  if (box.to % 1024) emu::fail("a swizzled box at no multiple of 1024");
  if (box.to + box.bytes() > static_cast<int64_t>(box.into->shared_bytes)) emu::fail("a box past shared memory");
  memset(box.into->shared + box.to, 0xff, static_cast<size_t>(box.bytes()));
  MBarrier& b = barrier_at(p, *box.into);
  b.boxes.push_back(box);
  box.into->in_flight++;
  advance(b);
}
inline void tma_load(void* to, const CUtensorMap* map, uint64_t* p, int32_t x, int32_t y, int32_t z) {
  load_box({&emu::block(), map, {x, y, z, 0}, emu::shared_address(to)}, p, 3);
}
inline void tma_load_to(uint16_t blocks, void* to, const CUtensorMap* map, uint64_t* p, int32_t x, int32_t y,
                        int32_t z) {
  if (!blocks) emu::fail("a tensor copy to no block");
  for (size_t rank = 0; rank < 16; rank++)
    if (blocks >> rank & 1) load_box({&emu::reach(rank), map, {x, y, z, 0}, emu::shared_address(to)}, p, 3);
}
inline void tma_load(void* to, const CUtensorMap* map, uint64_t* p, int32_t x, int32_t y, int32_t z, int32_t w) {
  load_box({&emu::block(), map, {x, y, z, w}, emu::shared_address(to)}, p, 4);
}

template <int kRegisters> void warpgroup_reg_alloc() { static_assert(kRegisters % 8 == 0 && kRegisters <= 256); }
template <int kRegisters> void warpgroup_reg_dealloc() { static_assert(kRegisters % 8 == 0 && kRegisters >= 24); }

// ---- wgmma: element (mn, k) of an operand, by its descriptor. Layouts in units of 16-bit elements, T = 8:
//   K-major    ((8, m), (T, 2k)) : ((8T, SBO), (1, T))           128-byte swizzle
//   MN-major   ((T, 8, m), (8, k)) : ((1, T, LBO), (8T, SBO))    128-byte swizzle
inline uint32_t element_address(uint64_t descriptor, bool mn_major, int mn, int k) {
  const auto field = [descriptor](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  if (descriptor >> 62 != 1) emu::fail("a descriptor whose swizzle is not that of 128 bytes");
  if (descriptor >> 49 & 7) emu::fail("a descriptor with a base offset");
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const uint32_t i = static_cast<uint32_t>(mn), j = static_cast<uint32_t>(k);
  const uint32_t offset =
      mn_major ? (i % 64) * 2 + i / 64 * leading + j % 8 * 128 + j / 8 * stride : i % 8 * 128 + i / 8 * stride + j * 2;
  const uint32_t address = swizzle_128(start + offset);
  if (address + 16 > emu::block().shared_bytes) emu::fail("a descriptor past the end of shared memory");
  return address;
}
// Calls f(shared address, i, k) for the 16-byte chunks of rows first .. first + count of M or N and 16 of K: a chunk holds
// 8 of K, or 8 of M or N.
template <class F> void for_chunks(uint64_t descriptor, bool mn_major, int first, int count, F f) {
  for (int i = 0; i < count; i += mn_major ? 8 : 1)
    for (int k = 0; k < 16; k += mn_major ? 1 : 8) f(element_address(descriptor, mn_major, first + i, k), i, k);
}
template <class F> void for_operands(const Call& p, int first_row, F f) {
  if (!p.fragment) for_chunks(p.a, p.trans_a, first_row, 16, [&](uint32_t at, int i, int k) { f(at, true, i, k); });
  for_chunks(p.b, p.trans_b, 0, p.columns, [&](uint32_t at, int i, int k) { f(at, false, i, k); });
}

// Tells whether the operands are still what they were.
inline uint64_t checksum(const Product& p, int first_row) {
  uint64_t sum = 14695981039346656037u;
  const auto add = [&sum](const void* from) {
    uint64_t words[2];
    memcpy(words, from, 16);
    for (uint64_t w : words) sum = (sum ^ w) * 1099511628211u;
  };
  for_operands(p, first_row, [&](uint32_t at, bool, int, int) { add(emu::block().shared + at); });
  if (p.fragment)
    for (const uint32_t* registers : p.fragments) add(registers);
  return sum;
}

// Ordinary writes to the operands need a proxy fence, by the writer or by every thread that issues, before they are read.
inline void check_proxy(const Call& p, int first_row, emu::Fiber** lanes) {
  State& s = state();
  uint64_t fenced = ~uint64_t{0};
  for (int l = 0; l < emu::kWarp; l++) fenced = std::min(fenced, s.proxy_fence[lanes[l]]);
  for_operands(p, first_row, [&](uint32_t at, bool, int, int) {
    const Chunk& c = s.chunks[at / 16];
    if (c.when && c.when > fenced && c.when > s.proxy_fence[c.who])
      emu::fail("wgmma reads what ordinary writes left, without fence.proxy.async");
  });
}

inline void issue(emu::Fiber** lanes) {
  const int id = lanes[0]->warp;
  Warp& w = state().warps[id];
  Product p{emu::argument_of<Call>(lanes[0]), 0, {}, {}};
  for (int l = 0; l < emu::kWarp; l++) {
    const Call& other = emu::argument_of<Call>(lanes[l]);
    if (other.a != p.a || other.b != p.b) emu::fail("wgmma: descriptors differ within a warp");
    p.lanes[l] = other.d, p.fragments[l] = other.fragment;
  }
  const auto [nth, first] = state().descriptors.insert({{id / 4, w.issued++}, {p.a, p.b}});
  if (!first && nth->second != std::make_pair(p.a, p.b)) emu::fail("wgmma: descriptors differ within a warp group");
  Accumulator& d = w.accumulators[p.d];
  if (d.in_flight++ == 0) {
    if (!w.fenced) emu::fail("wgmma without wgmma.fence before it");
    for (int l = 0; l < emu::kWarp; l++) {
      d.values[l].assign(p.lanes[l], p.lanes[l] + p.columns / 2);  // finish() lets them go where nothing is added
      memset(p.lanes[l], 0xff, sizeof(float) * static_cast<size_t>(p.columns / 2));
    }
  }
  p.sum = checksum(p, id % 4 * 16);
  check_proxy(p, id % 4 * 16, lanes);
  w.groups.back().push_back(p);
}

inline float element_value(uint16_t bits, bool bf16) {
  __nv_bfloat16 b;
  __half h;
  b.bits = h.bits = bits;
  return bf16 ? static_cast<float>(b) : static_cast<float>(h);
}
inline void finish(Warp& w, int id, const Product& p) {
  static float a[16][16], b[16][256], c[16][256];  // of the latter, p.columns
  if (checksum(p, id % 4 * 16) != p.sum) emu::fail("an operand of wgmma changed while it was read");
  for_operands(p, id % 4 * 16, [&](uint32_t at, bool is_a, int i, int k) {
    uint16_t bits[8];
    memcpy(bits, emu::block().shared + at, 16);
    for (int n = 0; n < 8; n++) {
      const bool along_k = !(is_a ? p.trans_a : p.trans_b);
      const int mn = i + (along_k ? 0 : n), at_k = k + (along_k ? n : 0);
      (is_a ? a[mn][at_k] : b[at_k][mn]) = element_value(bits[n], p.bf16);
    }
  });
  for (int l = 0; p.fragment && l < emu::kWarp; l++)
    for (int r = 0; r < 4; r++)
      for (int high = 0; high < 2; high++)
        a[l / 4 + r % 2 * 8][l % 4 * 2 + r / 2 * 8 + high] =
            element_value(static_cast<uint16_t>(p.fragments[l][r] >> 16 * high), p.bf16);
  memset(c, 0, sizeof c);
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < p.columns; j++) c[i][j] += a[i][k] * b[k][j];
  Accumulator& d = w.accumulators[p.d];
  for (int l = 0; l < emu::kWarp; l++)
    for (int i = 0; i < p.columns / 2; i++) {
      const float sum = c[l / 4 + (i & 2) * 4][i / 4 * 8 + l % 4 * 2 + (i & 1)];
      d.values[l][i] = p.add ? d.values[l][i] + sum : sum;
    }
  if (--d.in_flight) return;
  for (int l = 0; l < emu::kWarp; l++) memcpy(p.lanes[l], d.values[l].data(), sizeof(float) * d.values[l].size());
  w.accumulators.erase(p.d);
}

template <class Compute> void whole_warp(const char* name, Compute compute) {
  emu::warp_collective<char>(name, ~0u, char{}, [&](emu::Fiber** lanes) { compute(lanes[0]->warp); });
}
inline void wgmma_fence() {
  whole_warp("wgmma.fence", [](int id) { state().warps[id].fenced = true; });
}
inline void wgmma_commit() {
  whole_warp("wgmma.commit_group", [](int id) { state().warps[id].groups.emplace_back(); });
}
template <int kPending> void wgmma_wait() {
  whole_warp("wgmma.wait_group", [](int id) {
    Warp& w = state().warps[id];
    while (w.groups.size() > kPending + 1) {
      for (const Product& p : w.groups.front()) finish(w, id, p);
      w.groups.erase(w.groups.begin());
    }
    if (w.accumulators.empty()) w.fenced = false;
  });
}
template <class T, int N> void hold(T (&)[N]) {}
template <class T, int kN, bool kAdd, bool kMNA, bool kMNB> void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b) {
  const Call call{a, b, nullptr, d, kN, kAdd, kMNA, kMNB, std::is_same_v<T, __nv_bfloat16>};
  emu::warp_collective<char>("wgmma", ~0u, call, issue);
}
template <class T, int kN, bool kAdd, bool kMNB>
void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
  const Call call{0, b, a, d, kN, kAdd, false, kMNB, std::is_same_v<T, __nv_bfloat16>};
  emu::warp_collective<char>("wgmma", ~0u, call, issue);
}
}  // namespace sail::cuda::ptx
