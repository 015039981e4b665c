#include "attention_sm80.h"

namespace sail::cuda::sm80 {
void attention_forward(const AttentionForward& a, const Launch& launch) { run(a, launch); }
void attention_decode(const AttentionDecode& a, const Launch& launch) { run(a, launch); }
}  // namespace sail::cuda::sm80
