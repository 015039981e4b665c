// What a test calls of an attention forward. Included where `run(how, problem)` is defined.
#pragma once
#include "allow_calls.h"

const char* forward(const How& how, const AttentionForward& a) { return run(how, a); }
