// vec.h's functions over n elements, as vec_probe.cpp exports them for one instruction set; width() elements are a vector.
#pragma once
#include <stdint.h>

#define SAIL_EXPORT __attribute__((visibility("default")))
extern "C" {
SAIL_EXPORT int64_t width();
// by whole vectors, by parts of them, one by one
SAIL_EXPORT void widen_bf16(const uint16_t* in, float* whole, float* part, float* scalar, int64_t n);
SAIL_EXPORT void widen_f16(const uint16_t* in, float* whole, float* part, float* scalar, int64_t n);
SAIL_EXPORT void narrow_bf16(const float* in, uint16_t* whole, uint16_t* scalar, int64_t n);
SAIL_EXPORT void narrow_f16(const float* in, uint16_t* whole, uint16_t* scalar, int64_t n);
SAIL_EXPORT void exponential(const float* in, float* out, int64_t n);
SAIL_EXPORT void total(const float* in, float* out);              // of width() elements
SAIL_EXPORT void copy_n(const float* in, float* out, int64_t n);  // n <= width(): those in and out, nothing beyond
}
