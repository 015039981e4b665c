// Transient memory of one op call.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace sail::cpu {
// Asks for huge pages over the whole ones inside [p, p + bytes). Faulting a weight gradient in by 4 KB pages takes longer
// than computing it: 1.2 GB are 295,000 faults.
inline void advise_huge_pages(void* p, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / huge * huge;
  if (bytes >= static_cast<int64_t>(huge) && begin < end)
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: refused is fine
#endif
}

// A thread keeps its last few buffers for its next call: faulting 50 MB in anew would take as long as 5% of a layer of
// 1,024 tokens. Beyond kKeptBytes they go back to the system.
class Kept {
 public:
  void* take(int64_t& bytes) {  // sets bytes to the block's own size
    for (Block& b : blocks_)
      if (b.p && b.bytes >= bytes && b.bytes <= bytes + bytes / 4) {
        bytes = b.bytes;
        return std::exchange(b.p, nullptr);
      }
    return nullptr;
  }
  bool keep(void* p, int64_t bytes) {
    if (bytes > kKeptBytes / kCount) return false;
    std::free(std::exchange(blocks_[next_].p, p));
    blocks_[next_].bytes = bytes;
    next_ = (next_ + 1) % kCount;
    return true;
  }
  void free_all() {
    for (Block& b : blocks_) std::free(std::exchange(b.p, nullptr));
  }
  ~Kept() { free_all(); }

 private:
  static constexpr int64_t kCount = 6, kKeptBytes = 384 << 20;
  struct Block {
    void* p = nullptr;
    int64_t bytes = 0;
  } blocks_[kCount];
  int64_t next_ = 0;
};

class Buffer {  // uninitialized, 64-byte aligned
 public:
  explicit Buffer(int64_t bytes) : bytes_((bytes + 63) / 64 * 64) {
    if (bytes <= 0) return;
    p_ = kept().take(bytes_);
    if (p_) return;
    p_ = std::aligned_alloc(64, bytes_);
    if (!p_) throw std::bad_alloc();
    advise_huge_pages(p_, bytes_);
  }
  ~Buffer() {
    if (p_ && !kept().keep(p_, bytes_)) std::free(p_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <class T = char> T* get() const { return static_cast<T*>(p_); }
  static Kept& kept() {  // of this thread
    thread_local Kept k;
    return k;
  }

 private:
  void* p_ = nullptr;
  int64_t bytes_;
};
}  // namespace sail::cpu
