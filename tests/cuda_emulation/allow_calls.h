// emu::allow and emu::forget_allowed for a test to call.
#pragma once

extern "C" {
const char* allow(const void* p, int64_t bytes) {
  emu::allow(p, static_cast<size_t>(bytes));
  return nullptr;
}
const char* forget_allowed() {
  emu::forget_allowed();
  return nullptr;
}
}
