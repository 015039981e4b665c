// How C structures, pointers and functions of a library that is named by its path become Python's.
#pragma once
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace py = pybind11;

// A tensor's first element, null of None. The dtype must be the pointer's; void takes any, uint16_t any of two bytes.
template <class T> struct Pointer {
  T* first = nullptr;
  operator T*() const { return first; }
};
template <class T> std::string dtype_wanted() {
  using Element = std::remove_const_t<T>;
  if (std::is_same_v<Element, float>) return "torch.float32";
  if (std::is_same_v<Element, int32_t>) return "torch.int32";
  if (std::is_same_v<Element, int64_t>) return "torch.int64";
  return "";
}

namespace pybind11::detail {
template <class T> struct type_caster<Pointer<T>> {
  PYBIND11_TYPE_CASTER(Pointer<T>, const_name("Tensor"));
  bool load(handle given, bool) {
    if (given.is_none()) return true;
    if (!hasattr(given, "data_ptr")) return false;
    const std::string wanted = dtype_wanted<T>(), got = str(given.attr("dtype"));
    bool fits = wanted.empty() || got == wanted;
    if constexpr (sizeof(std::conditional_t<std::is_void_v<T>, char, T>) == 2)
      fits = given.attr("element_size")().template cast<int>() == 2;
    if (!fits) throw type_error("got a tensor of " + got + ", expected " + (wanted.empty() ? "two bytes" : wanted));
    value.first = reinterpret_cast<T*>(given.attr("data_ptr")().template cast<uintptr_t>());
    return true;
  }
};
}  // namespace pybind11::detail

// ---- structures: Name(field=value, ...), what is not named being zero. The object keeps the tensors that it points to.
template <class T> struct Field {
  const char* name;
  std::function<void(T&, py::handle)> set;
};
template <class M> void assign(M& to, py::handle value) {
  if constexpr (std::is_pointer_v<M>) {
    to = value.cast<Pointer<std::remove_pointer_t<M>>>();
  } else if constexpr (std::is_array_v<M>) {
    const auto values = value.cast<std::array<std::remove_extent_t<M>, std::extent_v<M>>>();
    std::copy(values.begin(), values.end(), to);
  } else {
    to = value.cast<M>();
  }
}
template <class T, class Owner, class M> Field<T> field(const char* name, M Owner::* member) {
  return {name, [member](T& object, py::handle value) { assign(object.*member, value); }};
}
template <class T> void structure(py::module_& m, const char* name, std::vector<Field<T>> fields) {
  py::class_<T>(m, (std::string(name) + "Struct").c_str(), py::dynamic_attr());
  m.def(name, [name, fields](const py::kwargs& given) {
    py::object self = py::cast(T{});
    for (const auto& [key, value] : given) {
      const std::string wanted = py::str(key);
      const auto found = std::find_if(fields.begin(), fields.end(), [&](const auto& f) { return f.name == wanted; });
      if (found == fields.end()) throw py::type_error(std::string(name) + " has no field " + wanted);
      found->set(self.cast<T&>(), value);
    }
    self.attr("given") = given;
    return self;
  });
}

// ---- functions of a library
struct EmulationError : std::runtime_error {
  using runtime_error::runtime_error;
};
template <class A>
using Given = std::conditional_t<std::is_pointer_v<A>, Pointer<std::remove_pointer_t<A>>, A>;
template <class R, class... A> py::cpp_function callable(R (*function)(A...)) {
  return [function](Given<A>... arguments) {
    if constexpr (std::is_same_v<R, const char*>) {
      if (const char* error = function(arguments...)) throw EmulationError(error);
    } else {
      return function(arguments...);
    }
  };
}
// Sets `name` on `library` where the file exports it, with the type that it is declared with.
template <class F> void bind(py::object& library, void* file, const char* name) {
  if (void* found = dlsym(file, name)) library.attr(name) = callable(reinterpret_cast<F*>(found));
}
