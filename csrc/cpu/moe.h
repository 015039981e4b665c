// The expert layer's passes; moe.cpp checks arguments and calls them.
#pragma once
#include "moe_layer.h"

namespace sail::cpu {
// `sorted`: x and y are already in expert order (grouped_experts); h [R, 2F] or null.
void experts_forward(const Layer& l, const RoutedRows& rows, bool sorted, char* h, char* y);

// One task's pre-activation and activation; h and a point at its first row (a also at its first column), either may be
// null. scratch: 2 * rows * columns floats.
void up_block(const Layer& l, const RoutedRows& rows, const Task& t, float* scratch, char* h, char* a);

// out[t] = sum over the token's rows of per_row[r] (times its weight)
void combine_tokens(const Layer& l, const RoutedRows& rows, const char* per_row, bool weighted, char* out);

// Gradients::weight is [R] here, in row order. h null: the pre-activation is computed again.
void experts_backward(const Layer& l, const RoutedRows& rows, bool sorted, const char* dy, const char* h,
                      const Gradients& g);
}  // namespace sail::cpu
