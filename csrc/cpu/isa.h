// Which instruction set the CPU kernels use: chosen once, by cpuid, or by SAIL_OPS_ISA.
#pragma once
#include <cstdint>

// X-macro over the instruction sets this build contains, weakest first; each is a namespace of sail::cpu.
#if defined(__x86_64__)
#define SAIL_FOR_EACH_ISA(X) X(generic) X(avx2) X(avx512) X(avx512_bf16)
#else
#define SAIL_FOR_EACH_ISA(X) X(generic)
#endif

namespace sail::cpu {
enum class Isa {
#define SAIL_ISA_NAME(name) name,
  SAIL_FOR_EACH_ISA(SAIL_ISA_NAME)
#undef SAIL_ISA_NAME
      count
};

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);  // by this machine
Isa active_isa();             // throws std::invalid_argument if SAIL_OPS_ISA names none, or one the machine lacks
}  // namespace sail::cpu

// Declares `const TABLE name::VAR` for every ISA and defines `const TABLE& GETTER()`, the active one.
#define SAIL_DECLARE_TABLE(name, TABLE, VAR) \
  namespace name {                           \
  extern const TABLE VAR;                    \
  }
#define SAIL_TABLE_ADDRESS(name, VAR) &name::VAR,
