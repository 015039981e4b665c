// What linear_cross_entropy's host code shares between devices: the checks of its arguments and the size of its chunks.
// T tokens, D hidden, V vocabulary.
#pragma once
#include "checks.h"

namespace sail {
struct LossSizes {
  DType dtype;
  int64_t T, D, V;
};

// hidden [T, D], lm_head [V, D], labels [T]; the labels' values are each device's to check
inline LossSizes check_loss(const Check& c, const Tensor& hidden, const Tensor& lm_head, const Tensor& labels,
                            double z_loss) {
  const DType dtype = c.real("hidden", hidden);
  c.rank("hidden", hidden, 2);
  c.rank("lm_head", lm_head, 2);
  const LossSizes s = {dtype, hidden.size(0), hidden.size(1), lm_head.size(0)};
  c.positive("hidden", "D", s.D);
  c.positive("lm_head", "V", s.V);
  c.shape("lm_head", lm_head, {s.V, s.D});
  c.dtype("lm_head", lm_head, hidden.dtype());
  c.same_device("lm_head", lm_head, hidden);
  c.that(hidden.stride(1) == 1 || s.D == 1, "hidden", "rows of stride " + std::to_string(hidden.stride(1)),
         "rows of stride 1");
  c.shape("labels", labels, {s.T});
  c.same_device("labels", labels, hidden);
  c.is_int64("labels", labels);
  c.that(z_loss >= 0, "z_loss", std::to_string(z_loss), "0 or more");
  return s;
}

inline void check_label(const Check& c, int64_t label, int64_t t, int64_t V, int64_t ignore_index) {
  c.that((label >= 0 && label < V) || label == ignore_index, "labels",
         std::to_string(label) + " at token " + std::to_string(t),
         "a label in [0, " + std::to_string(V) + ") or ignore_index, " + std::to_string(ignore_index));
}

// [T] in fp32
inline const float* check_token_weights(const Check& c, const Tensor& weights, const Tensor& hidden) {
  c.floats("token_weights", weights, hidden, {hidden.size(0)});
  return weights.ptr<const float>();
}
}  // namespace sail
