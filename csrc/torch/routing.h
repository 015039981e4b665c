// What the router asks of its arguments on every device. The ids' values are each device's to read.
// T tokens, E experts, K of them a token.
#pragma once
#include "checks.h"

namespace sail {
inline DType check_logits(const Check& c, const Tensor& logits) {
  c.rank("logits_TE", logits, 2);
  const DType dtype = c.real("logits_TE", logits);
  c.rows("logits_TE", logits);
  return dtype;
}

inline void check_top_k(const Check& c, int64_t K, int64_t E) {
  c.that(K >= 1 && K <= E, "k", std::to_string(K), "1 <= k <= E = " + std::to_string(E));
}

// Whether they are int64; int32 otherwise.
inline bool check_ids(const Check& c, const Tensor& ids, int64_t T, int64_t K, const Tensor& logits) {
  c.same_device("ids_TK", ids, logits);
  c.shape("ids_TK", ids, {T, K});
  c.contiguous("ids_TK", ids);
  return c.is_int64("ids_TK", ids);
}

inline void check_id(const Check& c, int64_t id, int64_t E) {
  if (id < 0 || id >= E) c.fail("ids_TK", "id " + std::to_string(id), "ids in [0, " + std::to_string(E) + ")");
}

inline const bool* check_mask(const Check& c, const OptTensor& mask, int64_t T, const Tensor& logits) {
  if (!mask) return nullptr;
  c.same_device("mask_T", *mask, logits);
  c.shape("mask_T", *mask, {T});
  c.dtype("mask_T", *mask, aoti_torch_dtype_bool());
  c.contiguous("mask_T", *mask);
  return mask->ptr<const bool>();
}

inline const float* check_floats(const Check& c, const char* arg, const OptTensor& t,
                                 std::initializer_list<int64_t> shape, const Tensor& logits) {
  if (!t) return nullptr;
  c.floats(arg, *t, logits, shape);
  return t->ptr<const float>();
}
}  // namespace sail
