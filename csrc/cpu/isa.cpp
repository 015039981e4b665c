#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "product.h"

namespace sail::cpu {
namespace {
constexpr int kCount = static_cast<int>(Isa::count);

std::atomic<int> forced{-1};  // by sail_cpu_set_isa

std::string supported_names() {
  std::string names;
  for (int i = 0; i < kCount; i++)
    if (isa_supported(static_cast<Isa>(i)))
      names += (names.empty() ? "" : ", ") + std::string(isa_name(static_cast<Isa>(i)));
  return names;
}

Isa parse(const char* source, const char* wanted) {
  for (int i = 0; i < kCount; i++)
    if (isa_supported(static_cast<Isa>(i)) && !std::strcmp(wanted, isa_name(static_cast<Isa>(i))))
      return static_cast<Isa>(i);
  throw std::invalid_argument(std::string(source) + ": got '" + wanted +
                              "', expected one that this machine has: " + supported_names());
}

Isa choose() {
  const char* wanted = std::getenv("SAIL_OPS_ISA");
  if (wanted && *wanted) return parse("SAIL_OPS_ISA", wanted);
  int best = 0;
  for (int i = 0; i < kCount; i++)
    if (isa_supported(static_cast<Isa>(i))) best = i;
  return static_cast<Isa>(best);
}
}  // namespace

const char* isa_name(Isa isa) {
#define SAIL_ISA_TEXT(name) #name,
  static const char* const names[] = {SAIL_FOR_EACH_ISA(SAIL_ISA_TEXT)};
#undef SAIL_ISA_TEXT
  return names[static_cast<int>(isa)];
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512_bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    default: break;
  }
#endif
  return isa == Isa::generic;
}

Isa active_isa() {
  const int f = forced.load(std::memory_order_relaxed);
  if (f >= 0) return static_cast<Isa>(f);
  static const Isa isa = choose();
  return isa;
}

namespace {
// The text lives until this thread asks again.
template <class F> const char* text_or_error(F f) {
  static thread_local std::string text;
  try {
    text = f();
  } catch (const std::exception& e) { text = std::string("error: ") + e.what(); }
  return text.c_str();
}
}  // namespace
}  // namespace sail::cpu

// For `python -m sail_ops` and the tests (ctypes): a name, names, or "error: ..."
#define SAIL_EXPORT extern "C" __attribute__((visibility("default")))
SAIL_EXPORT const char* sail_cpu_isa() {
  return sail::cpu::text_or_error([] { return std::string(sail::cpu::isa_name(sail::cpu::active_isa())); });
}
SAIL_EXPORT const char* sail_cpu_isas() { return sail::cpu::text_or_error(sail::cpu::supported_names); }

// The dtypes whose dense products are torch's (product.h).
SAIL_EXPORT const char* sail_cpu_torch_products() {
  return sail::cpu::text_or_error([] {
    std::string names;
    for (const auto& [dtype, name] :
         {std::pair{sail::DType::f32, "float32"}, {sail::DType::bf16, "bfloat16"}, {sail::DType::f16, "float16"}})
      if (sail::cpu::torch_multiplies(dtype)) names += (names.empty() ? "" : ", ") + std::string(name);
    return names;
  });
}

// For tests: overrides the choice in the whole process; a null name takes the override away.
SAIL_EXPORT const char* sail_cpu_set_isa(const char* name) {
  return sail::cpu::text_or_error([=] {
    sail::cpu::forced = name ? static_cast<int>(sail::cpu::parse("sail_cpu_set_isa", name)) : -1;
    return std::string();
  });
}
