// What a test calls of a grouped GEMM. Included where `run(how, problem, epilogue)` is defined.
#pragma once
#include "allow_calls.h"

const char* store_rows(const How& how, const RowsProblem& p, const StoreRows& out) { return run(how, p, out); }
const char* gated_forward(const How& how, const RowsProblem& p, const GatedForward& out) { return run(how, p, out); }
const char* gated_backward(const How& how, const RowsProblem& p, const GatedBackward& out) { return run(how, p, out); }
const char* wgrad(const How& how, const WgradProblem& p, const StoreGrad& out) { return run(how, p, out); }
