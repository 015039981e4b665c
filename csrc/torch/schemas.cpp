// Every operator of the package: the table of contents. Backends implement these names for their dispatch key
// (csrc/cpu/*.cpp, csrc/cuda/*.cu); sail_ops/*.py adds the public signature, the fake kernel and the gradient.
#include "stable_abi.h"

namespace {
const auto schemas =
    sail::Library::def("sail_ops")
        // ---- experts: moe.cpp, grouped_mm.cpp. `needs` is a bit mask of the wanted gradients (moe.h);
        // an unwanted one comes back as an empty tensor. h is the pre-activation, empty if it was not saved.
        .schema(
            "fused_experts(Tensor x, Tensor gate_up, Tensor? up, Tensor down, Tensor ids, Tensor weights,"
            " Tensor? gate_up_bias, Tensor? down_bias, int activation, float? clamp, bool save_h)"
            " -> (Tensor y, Tensor h)")
        .schema(
            "fused_experts_backward(Tensor dy, Tensor x, Tensor gate_up, Tensor? up, Tensor down, Tensor ids,"
            " Tensor weights, Tensor h, Tensor? gate_up_bias, Tensor? down_bias, int activation, float? clamp,"
            " int needs, Tensor(a!)? main_gate_up, Tensor(b!)? main_up, Tensor(c!)? main_down)"
            " -> (Tensor dx, Tensor dgate_up, Tensor dup, Tensor ddown, Tensor dweights, Tensor dgate_up_bias,"
            " Tensor ddown_bias)")
        .schema(
            "grouped_experts(Tensor x, Tensor gate_up, Tensor? up, Tensor down, Tensor offsets, Tensor? weights,"
            " Tensor? gate_up_bias, Tensor? down_bias, int activation, float? clamp, bool save_h)"
            " -> (Tensor y, Tensor h)")
        .schema(
            "grouped_experts_backward(Tensor dy, Tensor x, Tensor gate_up, Tensor? up, Tensor down, Tensor offsets,"
            " Tensor? weights, Tensor h, Tensor? gate_up_bias, Tensor? down_bias, int activation, float? clamp,"
            " int needs, Tensor(a!)? main_gate_up, Tensor(b!)? main_up, Tensor(c!)? main_down)"
            " -> (Tensor dx, Tensor dgate_up, Tensor dup, Tensor ddown, Tensor dweights, Tensor dgate_up_bias,"
            " Tensor ddown_bias)")
        .schema("grouped_mm(Tensor x, Tensor w, Tensor offsets) -> Tensor")
        .schema(
            "grouped_mm_backward(Tensor dy, Tensor x, Tensor w, Tensor offsets, bool need_x, bool need_w)"
            " -> (Tensor dx, Tensor dw)")
        // ---- norms: norm.cpp. A gradient that is not needed comes back as an empty tensor.
        .schema("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
        .schema("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)")
        .schema(
            "rms_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, float eps, bool need_dx, "
            "bool need_dweight) -> (Tensor, Tensor)")
        .schema("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor")
        .schema("add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)")
        .schema(
            "layer_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, float eps, bool need_dx, "
            "bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)")
        // ---- rotary embedding: rope.cpp. cos and sin are [..., A] or [..., A/2], a row a token, or tables that
        // positions index. rope's backward is rope with `transpose`.
        .schema(
            "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool transpose) -> (Tensor, Tensor)")
        .schema(
            "qk_norm_rope(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
            "Tensor? positions, float eps) -> (Tensor, Tensor)")
        .schema(
            "qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, "
            "Tensor cos, Tensor sin, Tensor? positions, float eps, bool need_dweights)"
            " -> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)")
        // ---- dense layers: linear.cpp. A gradient that is not needed comes back as an empty tensor.
        .schema("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
        .schema(
            "linear_backward(Tensor dy, Tensor x, Tensor weight, bool need_dx, bool need_dweight)"
            " -> (Tensor dx, Tensor dweight)")
        // ---- loss: loss.cpp. The gradients are those of sum_t scale_t (-logprob_t + z_loss lse_t^2); one that is not
        // needed comes back as an empty tensor.
        .schema(
            "linear_cross_entropy(Tensor hidden, Tensor lm_head, Tensor labels, Tensor? scale, int ignore_index, "
            "float z_loss, bool need_dhidden, bool need_dlm_head)"
            " -> (Tensor logprobs, Tensor lse, Tensor dhidden, Tensor dlm_head)")
        // ---- attention: attention.cpp, attention_backward.cpp. lse is fp32, [B, H, S] or packed [H, T].
        .schema("attention(Tensor q, Tensor k, Tensor v, float scale, bool causal) -> (Tensor out, Tensor lse)")
        .schema(
            "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
            " float scale, bool causal) -> (Tensor dq, Tensor dk, Tensor dv)")
        .schema(
            "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
            " int max_seqlen_q, int max_seqlen_k, float scale, bool causal) -> (Tensor out, Tensor lse)")
        .schema(
            "attention_varlen_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
            " Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, float scale, bool causal)"
            " -> (Tensor dq, Tensor dk, Tensor dv)")
        // ---- element-wise: activation.cpp
        .schema("swiglu(Tensor gate, Tensor up) -> Tensor")
        .schema("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)")
        // ---- router: routing.cpp
        .schema(
            "route_topk(Tensor logits, int k, bool renormalize, Tensor? bias, Tensor? ids, Tensor? mask) -> "
            "(Tensor, Tensor, Tensor, Tensor)")
        .schema(
            "route_topk_backward(Tensor? grad_weights, Tensor? grad_prob_sum, Tensor logits, Tensor ids, "
            "Tensor? mask, bool renormalize) -> Tensor");
}  // namespace
