// What attention asks of its tensors on every device; strides, dtypes and head dims are each device's own.
#pragma once
#include <cmath>

#include "checks.h"

namespace sail {
// q is [.., H, D], k and v are [.., G, D]; ranks, dtypes and devices are known to be right.
inline void check_attention_shapes(const Check& c, const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  const int64_t H = q.size(-2), G = k.size(-2), D = q.size(-1);
  c.that(k.size(-1) == D, "k", "shape " + shape_text(k), "a head dim of " + std::to_string(D) + ", as q has");
  c.positive("k", "heads", G);
  c.that(H > 0 && H % G == 0, "q", std::to_string(H) + " heads", "a multiple of k's " + std::to_string(G));
  c.that(std::equal(k.sizes(), k.sizes() + k.dim(), v.sizes()), "v", "shape " + shape_text(v),
         "k's shape, " + shape_text(k));
  c.that(q.dim() != 4 || k.size(0) == q.size(0), "k", "shape " + shape_text(k),
         "a batch of " + std::to_string(q.size(0)) + ", as q has");
  c.that(std::isfinite(scale), "softmax_scale", std::to_string(scale), "a finite number");
}

// What the backward is given besides the forward's arguments.
inline void check_attention_results(const Check& c, const Tensor& dout, const OptTensor& dlse, const Tensor& q,
                                    const Tensor& out, const Tensor& lse, std::initializer_list<int64_t> lse_shape) {
  c.like("dout", dout, q), c.contiguous("dout", dout);
  c.like("out", out, q), c.contiguous("out", out);
  c.floats("lse", lse, q, lse_shape);
  if (dlse) c.floats("dlse", *dlse, q, lse_shape);
}

inline void check_cu_seqlens(const Check& c, const Tensor& cu_q, const Tensor& cu_k, const Tensor& q) {
  for (const auto& [arg, cu] : {std::pair<const char*, const Tensor&>{"cu_seqlens_q", cu_q}, {"cu_seqlens_k", cu_k}}) {
    c.same_device(arg, cu, q);
    c.dtype(arg, cu, aoti_torch_dtype_int32());
    c.rank(arg, cu, 1);
    c.contiguous(arg, cu);
    c.that(cu.size(0) >= 1, arg, "no element", "[sequences + 1]");
  }
  c.that(cu_k.size(0) == cu_q.size(0), "cu_seqlens_k", shape_text(cu_k), shape_text(cu_q) + ", as cu_seqlens_q");
}

// `count` ends, on the host: from 0 to `total`, steps of at most `most`
inline void check_cu_values(const Check& c, const char* arg, const int32_t* ends, int64_t count, int64_t total,
                            int64_t most) {
  c.that(ends[0] == 0, arg, "first element " + std::to_string(ends[0]), "0");
  for (int64_t i = 1; i < count; i++) {
    c.that(ends[i] >= ends[i - 1], arg, std::to_string(ends[i]) + " after " + std::to_string(ends[i - 1]),
           "offsets that never fall");
    c.that(ends[i] - ends[i - 1] <= most, arg, "a sequence of " + std::to_string(ends[i] - ends[i - 1]),
           "at most max_seqlen = " + std::to_string(most));
  }
  c.that(ends[count - 1] == total, arg, "last element " + std::to_string(ends[count - 1]),
         std::to_string(total) + ", the tokens there");
}
}  // namespace sail
