// Scores, selection keys and routing weights from FP32 logits: steps 2, 3, 4 and 6 of
// router_runtime/spec.py.
//
// Every operation is one IEEE-rounded FP32 operation with subnormals kept, in the order that
// common/numerics.py states together with the constants (EXP_*, LOG1P_*, LOGIT_MAX,
// RENORM_EPSILON, all macros here) and the error bound. So the bits are the same on every target
// and in the CuTe DSL kernels (common/scoring.py).
//
// Functions are called by one lane for its own values unless they say that the full warp calls.
#pragma once

#include "common/selection.cuh"

// softplus(logit) = max(logit, 0) + log1p(exp(-|logit|)), the square of the score (steps 2 and 3).
// A NaN logit gives +0; an infinite logit counts as the finite number next to it.
//
// Separate from `score_of` for a caller that evaluates many logits: the square root branches (to a
// slow path for subnormals), and a branch keeps the long chains before it from overlapping.
__device__ __forceinline__ float softplus(float logit) {
    // fmaxf and fminf return the operand that is a number: a NaN becomes 0 here, EXP_CLAMP below.
    const float positive = fminf(fmaxf(logit, 0.0f), LOGIT_MAX);
    const float magnitude = fminf(fabsf(logit), EXP_CLAMP);

    // u = exp(-magnitude) = exp(r) * 2^n, with exp(r) = p by a polynomial of degree 6.
    const float shifted = __fmaf_rn(magnitude, EXP_NEG_LOG2E, EXP_SHIFT);
    const float n = __fsub_rn(shifted, EXP_SHIFT);
    float r = __fmaf_rn(n, EXP_NEG_LN2_HI, -magnitude);
    r = __fmaf_rn(n, EXP_NEG_LN2_LO, r);
    float p = EXP_C6;
    p = __fmaf_rn(p, r, EXP_C5);
    p = __fmaf_rn(p, r, EXP_C4);
    p = __fmaf_rn(p, r, EXP_C3);
    p = __fmaf_rn(p, r, EXP_C2);
    p = __fmaf_rn(p, r, EXP_C1);
    p = __fmaf_rn(p, r, EXP_C0);
    // The low bits of `shifted` hold n + 30; added to the exponent field they scale p by 2^(n +
    // 30).
    const unsigned scaled = __float_as_uint(p) + (__float_as_uint(shifted) << 23);
    const float u = __fmul_rn(__uint_as_float(scaled), EXP_UNSCALE);

    // q = log1p(u) / u, by a polynomial of degree 8.
    float q = LOG1P_C8;
    q = __fmaf_rn(q, u, LOG1P_C7);
    q = __fmaf_rn(q, u, LOG1P_C6);
    q = __fmaf_rn(q, u, LOG1P_C5);
    q = __fmaf_rn(q, u, LOG1P_C4);
    q = __fmaf_rn(q, u, LOG1P_C3);
    q = __fmaf_rn(q, u, LOG1P_C2);
    q = __fmaf_rn(q, u, LOG1P_C1);
    q = __fmaf_rn(q, u, LOG1P_C0);
    return __fmaf_rn(u, q, positive);
}

// The score of a logit, sqrt(softplus(logit)) (step 3). A NaN logit scores +0.
__device__ __forceinline__ float score_of(float logit) { return __fsqrt_rn(softplus(logit)); }

// The bias to add to the score of `logit`: `bias`, or -inf if the logit is a NaN, which makes the
// key -inf (step 2).
__device__ __forceinline__ float bias_for_key(float logit, float bias) {
    return logit != logit ? __int_as_float(0xff800000) : bias;
}

// The selection key fl32(score + bias) as an ordered key (step 4; selection.cuh defines the form).
// `bias` comes from bias_for_key.
__device__ __forceinline__ unsigned selection_key(float score, float bias) {
    return ordered_key(__fadd_rn(score, bias));
}

// The routing weight of the expert whose score this lane holds (step 6):
//
//   renormalize: (score / (sum + RENORM_EPSILON)) * scale, with sum = ((s_0 + s_1) + s_2) + ...
//   otherwise:   score * scale
//
// The full warp calls it. Lanes 0 to k - 1 pass the scores in rank order. All other lanes pass +0,
// because the sum is taken over the next multiple of 8 lanes; adding +0 does not change it.
// 1 <= k <= 32; k, scale and renormalize are the same in all lanes. A shuffle orders the exchange.
__device__ __forceinline__ float routing_weight(float score, unsigned k, float scale,
                                                bool renormalize) {
    if (!renormalize) return __fmul_rn(score, scale);
    float sum = 0.0f;
    for (unsigned first = 0; first < k; first += 8) {
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            sum = __fadd_rn(sum, __shfl_sync(ALL_LANES, score, first + j));
        }
    }
    return __fmul_rn(__fdiv_rn(score, __fadd_rn(sum, RENORM_EPSILON)), scale);
}
