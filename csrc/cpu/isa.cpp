#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace sail::cpu {
namespace {
constexpr int kCount = static_cast<int>(Isa::count);

Isa choose() {
  const char* wanted = std::getenv("SAIL_OPS_ISA");
  if (!wanted || !*wanted) {
    int best = 0;
    for (int i = 0; i < kCount; i++)
      if (isa_supported(static_cast<Isa>(i))) best = i;
    return static_cast<Isa>(best);
  }
  std::string names;
  for (int i = 0; i < kCount; i++) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_supported(isa)) continue;
    if (!std::strcmp(wanted, isa_name(isa))) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument("SAIL_OPS_ISA: got '" + std::string(wanted) + "', expected one that this machine has: " + names);
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
  static const Isa isa = choose();
  return isa;
}
}  // namespace sail::cpu

// For `python -m sail_ops` and the tests (ctypes): the name, or the error's text.
extern "C" __attribute__((visibility("default"))) const char* sail_cpu_isa() {
  static std::string text;
  try {
    text = sail::cpu::isa_name(sail::cpu::active_isa());
  } catch (const std::exception& e) {
    text = std::string("error: ") + e.what();
  }
  return text.c_str();
}
