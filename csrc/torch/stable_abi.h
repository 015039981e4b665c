// PyTorch's stable C shim (torch >= 2.11), declared here so that building needs no torch at all.
// The symbols are resolved at load time from the libtorch that the process has imported.
// tests/support/abi_check.cpp includes torch's own headers next to this one: a signature that differs fails to compile.
#pragma once
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

struct AtenTensorOpaque;
struct TorchLibraryOpaque;
struct DeviceGuardOpaque;
extern "C" {
typedef AtenTensorOpaque* AtenTensorHandle;
typedef TorchLibraryOpaque* TorchLibraryHandle;
typedef DeviceGuardOpaque* DeviceGuardHandle;
typedef int32_t AOTITorchError;
typedef uint64_t StableIValue;
AOTITorchError aoti_torch_library_init_def(const char*, const char*, uint32_t, TorchLibraryHandle*);
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle*);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char*);
AOTITorchError torch_library_impl(TorchLibraryHandle, const char*, void (*)(StableIValue*, uint64_t, uint64_t),
                                  uint64_t);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle);
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle, void**);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle, int64_t*);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle, int64_t**);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle, int64_t**);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle, int32_t*);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t*);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t*);
AOTITorchError aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                        AtenTensorHandle*);
AOTITorchError aoti_torch__reinterpret_tensor(AtenTensorHandle, int64_t, const int64_t*, const int64_t*, int64_t,
                                              AtenTensorHandle*);
AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle);
AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double,
                                        double);
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*);
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle);
AOTITorchError torch_get_num_threads(uint32_t*);
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_bool();
}

namespace sail {
inline void ok(AOTITorchError e, const char* what) {
  if (e) throw std::runtime_error(std::string("sail_ops: torch call failed: ") + what);
}

// Owns one tensor reference; metadata is read once. An undefined tensor (None) is a std::nullopt, never a null Tensor.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle h) : h_(h) { refresh(); }
  Tensor(Tensor&& o) noexcept { *this = std::move(o); }
  Tensor& operator=(Tensor&& o) noexcept {
    if (h_) aoti_torch_delete_tensor_object(h_);
    h_ = o.h_, p_ = o.p_, nd_ = o.nd_, sz_ = o.sz_, st_ = o.st_, dt_ = o.dt_;
    o.h_ = nullptr;
    return *this;
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (h_) aoti_torch_delete_tensor_object(h_);
  }

  void* data() const { return p_; }
  template <class T> T* ptr() const { return static_cast<T*>(p_); }
  int64_t dim() const { return nd_; }
  int64_t size(int64_t i) const { return sz_[i < 0 ? i + nd_ : i]; }
  int64_t stride(int64_t i) const { return st_[i < 0 ? i + nd_ : i]; }
  const int64_t* sizes() const { return sz_; }
  const int64_t* strides() const { return st_; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < nd_; i++) n *= sz_[i];
    return n;
  }
  bool contiguous() const {
    int64_t n = 1;
    for (int64_t i = nd_ - 1; i >= 0; i--) {
      if (sz_[i] != 1 && st_[i] != n) return numel() == 0;
      n *= sz_[i];
    }
    return true;
  }
  int32_t dtype() const { return dt_; }
  int32_t device_type() const {
    int32_t t;
    ok(aoti_torch_get_device_type(h_, &t), "device_type");
    return t;
  }
  int32_t device_index() const {
    int32_t i;
    ok(aoti_torch_get_device_index(h_, &i), "device_index");
    return i;
  }
  AtenTensorHandle handle() const { return h_; }
  AtenTensorHandle release() { return std::exchange(h_, nullptr); }

  // A new contiguous tensor on this one's device.
  template <size_t N> Tensor empty(const int64_t (&sizes)[N], int32_t dtype) const { return empty(sizes, N, dtype); }
  template <size_t N>
  Tensor empty_strided(const int64_t (&sizes)[N], const int64_t (&strides)[N], int32_t dtype) const {
    return empty_strided(sizes, strides, N, dtype);
  }
  Tensor empty_like() const { return empty(sz_, nd_, dt_); }
  // A tensor on the same storage, from this one's element `first` on.
  template <size_t N> Tensor view(const int64_t (&sizes)[N], const int64_t (&strides)[N], int64_t first = 0) const {
    AtenTensorHandle out;
    // `first` alone: the shim adds this tensor's own offset into the storage
    ok(aoti_torch__reinterpret_tensor(h_, N, sizes, strides, first, &out), "reinterpret_tensor");
    return Tensor(out);
  }

 private:
  Tensor empty(const int64_t* sizes, int64_t n, int32_t dtype) const {
    int64_t strides[8], step = 1;
    for (int64_t i = n - 1; i >= 0; i--) strides[i] = step, step *= sizes[i] > 1 ? sizes[i] : 1;
    return empty_strided(sizes, strides, n, dtype);
  }
  Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t n, int32_t dtype) const {
    AtenTensorHandle out;
    ok(aoti_torch_empty_strided(n, sizes, strides, dtype, device_type(), device_index(), &out), "empty_strided");
    return Tensor(out);
  }
  void refresh() {
    ok(aoti_torch_get_data_ptr(h_, &p_), "data_ptr");
    ok(aoti_torch_get_dim(h_, &nd_), "dim");
    ok(aoti_torch_get_sizes(h_, &sz_), "sizes");
    ok(aoti_torch_get_strides(h_, &st_), "strides");
    ok(aoti_torch_get_dtype(h_, &dt_), "dtype");
  }
  AtenTensorHandle h_ = nullptr;
  void* p_ = nullptr;
  int64_t nd_ = 0, *sz_ = nullptr, *st_ = nullptr;
  int32_t dt_ = 0;
};

struct DeviceGuard {
  explicit DeviceGuard(int32_t i) { ok(aoti_torch_create_device_guard(i, &g), "device guard"); }
  ~DeviceGuard() { aoti_torch_delete_device_guard(g); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuardHandle g;
};

inline int num_threads() {
  uint32_t n = 1;
  ok(torch_get_num_threads(&n), "num_threads");
  return static_cast<int>(n);
}

// ---- boxing: StableIValue stack <-> typed C++ function
template <class T> struct Conv {
  static T to(StableIValue v) {
    T r;
    std::memcpy(&r, &v, sizeof(T));
    return r;
  }
  static StableIValue from(T t) {
    StableIValue v = 0;
    std::memcpy(&v, &t, sizeof(T));
    return v;
  }
};
template <> struct Conv<Tensor> {
  static Tensor to(StableIValue v) { return Tensor(reinterpret_cast<AtenTensorHandle>(v)); }
  static StableIValue from(Tensor&& t) { return reinterpret_cast<StableIValue>(t.release()); }
};
template <class T> struct Conv<std::optional<T>> {
  static std::optional<T> to(StableIValue v) {
    auto* p = reinterpret_cast<StableIValue*>(v);
    if (!p) return std::nullopt;
    std::optional<T> r(Conv<T>::to(*p));
    delete p;
    return r;
  }
};
template <auto F> struct Box;
template <class R, class... A, R (*F)(A...)> struct Box<F> {
  static void call(StableIValue* s, uint64_t, uint64_t) { go(s, std::index_sequence_for<A...>{}); }
  template <size_t... I> static void go(StableIValue* s, std::index_sequence<I...>) {
    std::tuple<std::decay_t<A>...> a{Conv<std::decay_t<A>>::to(s[I])...};
    if constexpr (std::is_void_v<R>)
      F(std::get<I>(a)...);
    else
      put(s, F(std::get<I>(a)...));
  }
  template <class T> static void put(StableIValue* s, T&& t) { s[0] = Conv<std::decay_t<T>>::from(std::move(t)); }
  template <class... T> static void put(StableIValue* s, std::tuple<T...>&& t) {
    std::apply(
        [&](auto&&... e) {
          int i = 0;
          ((s[i++] = Conv<std::decay_t<decltype(e)>>::from(std::move(e))), ...);
        },
        std::move(t));
  }
};

class Library {  // lives as long as the process, like TORCH_LIBRARY's statics
 public:
  static Library def(const char* ns) {
    Library l;
    ok(aoti_torch_library_init_def(ns, __FILE__, __LINE__, &l.h_), ns);
    return l;
  }
  static Library impl(const char* ns, const char* key) {
    Library l;
    ok(aoti_torch_library_init_impl(ns, key, __FILE__, __LINE__, &l.h_), key);
    return l;
  }
  Library& schema(const char* s) {
    ok(aoti_torch_library_def(h_, s), s);
    return *this;
  }
  template <auto F> Library& kernel(const char* name) {
    ok(torch_library_impl(h_, name, &Box<F>::call, kAbi), name);
    return *this;
  }

 private:
  static constexpr uint64_t kAbi = (2ull << 56) | (11ull << 48);  // oldest torch supported
  TorchLibraryHandle h_ = nullptr;
};
}  // namespace sail
