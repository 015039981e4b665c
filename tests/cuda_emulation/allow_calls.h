// emu::allow and emu::forget_allowed for a test to call.
#pragma once
#include "calls.h"

void allow(const void* p, int64_t bytes) { emu::allow(p, static_cast<size_t>(bytes)); }
void forget_allowed() { emu::forget_allowed(); }
