// Argument checks of every host function: a failed one throws std::invalid_argument (ValueError in Python) whose
// message names the op, the argument, what was given and what is wanted.
#pragma once
#include <algorithm>
#include <optional>

#include "stable_abi.h"

namespace sail {
using OptTensor = std::optional<Tensor>;

enum class DType { f32 = 0, bf16 = 1, f16 = 2 };  // index into kernel tables

inline const char* dtype_name(int32_t t) {
  return t == aoti_torch_dtype_float32()    ? "float32"
         : t == aoti_torch_dtype_bfloat16() ? "bfloat16"
         : t == aoti_torch_dtype_float16()  ? "float16"
         : t == aoti_torch_dtype_int32()    ? "int32"
         : t == aoti_torch_dtype_int64()    ? "int64"
         : t == aoti_torch_dtype_bool()     ? "bool"
                                            : "another dtype";
}

inline std::string shape_text(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); i++) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

// One op's checks: Check c("rms_norm"); c.rank("x", x, 2); ...
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}
  const char* op() const { return op_; }

  [[noreturn]] void fail(const std::string& arg, const std::string& given, const std::string& wanted) const {
    throw std::invalid_argument("sail_ops." + std::string(op_) + ": " + arg + ": got " + given + ", expected " +
                                wanted);
  }
  void that(bool good, const char* arg, const std::string& given, const std::string& wanted) const {
    if (!good) fail(arg, given, wanted);
  }
  void rank(const char* arg, const Tensor& t, int64_t n) const {
    if (t.dim() != n) fail(arg, "shape " + shape_text(t), std::to_string(n) + " dimensions");
  }
  void shape(const char* arg, const Tensor& t, std::initializer_list<int64_t> want) const {
    bool same = t.dim() == static_cast<int64_t>(want.size());
    int64_t i = 0;
    std::string text = "[";
    for (int64_t w : want) {
      same = same && t.size(i) == w;
      text += (i++ ? ", " : "") + std::to_string(w);
    }
    if (!same) fail(arg, "shape " + shape_text(t), "shape " + text + "]");
  }
  void positive(const char* arg, const char* dim_name, int64_t n) const {
    if (n <= 0) fail(arg, std::string(dim_name) + " = " + std::to_string(n), std::string(dim_name) + " >= 1");
  }
  void contiguous(const char* arg, const Tensor& t) const {
    if (!t.contiguous()) fail(arg, "a non-contiguous tensor of shape " + shape_text(t), "a contiguous tensor");
  }
  // float32, bfloat16 or float16
  DType real(const char* arg, const Tensor& t) const {
    if (t.dtype() == aoti_torch_dtype_float32()) return DType::f32;
    if (t.dtype() == aoti_torch_dtype_bfloat16()) return DType::bf16;
    if (t.dtype() == aoti_torch_dtype_float16()) return DType::f16;
    fail(arg, dtype_name(t.dtype()), "float32, bfloat16 or float16");
  }
  void dtype(const char* arg, const Tensor& t, int32_t want) const {
    if (t.dtype() != want) fail(arg, dtype_name(t.dtype()), dtype_name(want));
  }
  // [..., D] with contiguous rows
  void rows(const char* arg, const Tensor& t) const {
    that(t.dim() >= 1 && t.dim() <= 8, arg, "shape " + shape_text(t), "1 to 8 dimensions, [..., D]");
    positive(arg, "D", t.size(-1));
    that(t.size(-1) == 1 || t.stride(-1) == 1 || !t.numel(), arg, "stride " + std::to_string(t.stride(-1)),
         "contiguous rows (a last dimension of stride 1)");
  }
  // int32 or int64
  bool is_int64(const char* arg, const Tensor& t) const {
    if (t.dtype() == aoti_torch_dtype_int64()) return true;
    if (t.dtype() == aoti_torch_dtype_int32()) return false;
    fail(arg, dtype_name(t.dtype()), "int32 or int64");
  }
  // of x's device, dtype and shape
  void like(const char* arg, const Tensor& t, const Tensor& x) const {
    same_device(arg, t, x);
    dtype(arg, t, x.dtype());
    that(t.dim() == x.dim() && std::equal(x.sizes(), x.sizes() + x.dim(), t.sizes()), arg, "shape " + shape_text(t),
         "shape " + shape_text(x));
  }
  // [n], contiguous, of x's device and dtype
  void vector(const char* arg, const Tensor& t, const Tensor& x, int64_t n) const {
    same_device(arg, t, x);
    dtype(arg, t, x.dtype());
    shape(arg, t, {n});
    contiguous(arg, t);
  }
  // of this shape, contiguous, fp32, on x's device
  void floats(const char* arg, const Tensor& t, const Tensor& x, std::initializer_list<int64_t> want) const {
    same_device(arg, t, x);
    shape(arg, t, want);
    dtype(arg, t, aoti_torch_dtype_float32());
    contiguous(arg, t);
  }
  void same_device(const char* arg, const Tensor& t, const Tensor& as) const {
    if (t.device_type() != as.device_type() || t.device_index() != as.device_index())
      fail(arg, "a tensor on another device", "all tensors on one device");
  }

 private:
  const char* op_;
};
}  // namespace sail
