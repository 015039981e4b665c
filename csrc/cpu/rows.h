// The rows of a tensor [..., D]: the last dimension is contiguous, the others may have any strides.
#pragma once
#include <unistd.h>

#include <algorithm>

#include "huge.h"

namespace sail::cpu {
inline int64_t element_size(DType t) { return t == DType::f32 ? 4 : 2; }

// Whether a result, written by rows of `width` elements, is stored past the caches: where it and as much input overflow
// the last one, its lines would be read first and driven out again before anyone needs them. A store is 64 bytes, aligned.
inline bool streams(const Check& c, const Tensor& result, int64_t width) {
  static const int64_t cache = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), 16 << 20);
  const int64_t element = element_size(c.real("result", result));
  const bool aligned = reinterpret_cast<uintptr_t>(result.data()) % 64 == 0 && width * element % 64 == 0;
  return aligned && 2 * result.numel() * element > cache;
}

class StridedRows {
 public:
  StridedRows(const Check& c, const char* arg, const Tensor& t) {
    c.rows(arg, t);
    width_ = t.size(-1);
    count_ = t.numel() / width_;
    const int64_t element = element_size(c.real(arg, t));
    base_ = t.ptr<char>();
    for (int64_t i = 0; i + 1 < t.dim(); i++) {
      const int64_t size = t.size(i), step = t.stride(i) * element;
      if (size == 1) continue;
      if (dims_ && step_[dims_ - 1] == step * size) {  // one stride walks both dimensions
        size_[dims_ - 1] *= size, step_[dims_ - 1] = step;
      } else {
        size_[dims_] = size, step_[dims_++] = step;
      }
    }
  }

  int64_t count() const { return count_; }
  int64_t width() const { return width_; }
  bool dense(int64_t element) const { return !dims_ || (dims_ == 1 && step_[0] == width_ * element); }
  char* operator[](int64_t r) const {
    int64_t offset = 0;
    for (int i = dims_ - 1; i > 0; i--) offset += r % size_[i] * step_[i], r /= size_[i];
    return base_ + (dims_ ? offset + r * step_[0] : 0);
  }

 private:
  static constexpr int kMaxDim = 8;
  char* base_;
  int64_t count_, width_, size_[kMaxDim], step_[kMaxDim];  // steps in bytes, neighboring dimensions merged
  int dims_ = 0;
};
}  // namespace sail::cpu
