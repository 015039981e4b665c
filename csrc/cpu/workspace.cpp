#include "workspace.h"

// For sail_ops.empty_cache (ctypes): frees what this thread keeps between calls.
extern "C" __attribute__((visibility("default"))) void sail_cpu_empty_cache() { sail::cpu::Buffer::kept().free_all(); }
