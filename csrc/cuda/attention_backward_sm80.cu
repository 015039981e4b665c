#include "attention_sm80.h"

namespace sail::cuda::sm80 {
void attention_backward(const AttentionBackward& a, const Launch& launch) { run(a, launch); }
}  // namespace sail::cuda::sm80
