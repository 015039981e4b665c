// Transient memory of one op call.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

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

class Buffer {  // uninitialised, 64-byte aligned
 public:
  explicit Buffer(int64_t bytes) {
    if (bytes <= 0) return;
    p_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!p_) throw std::bad_alloc();
    advise_huge_pages(p_, bytes);
  }
  ~Buffer() { std::free(p_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <class T = char> T* get() const { return static_cast<T*>(p_); }

 private:
  void* p_ = nullptr;
};
}  // namespace sail::cpu
