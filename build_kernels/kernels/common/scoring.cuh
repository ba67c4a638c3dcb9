// Scores, selection keys and routing weights from FP32 logits: steps 2, 3, 4 and 6 of
// router_runtime/spec.py.
//
// Every operation is one IEEE-rounded FP32 operation with subnormals kept, in the order that
// common/numerics.py states together with the constants (EXP_*, LOG1P_*, LOGIT_MAX,
// RENORM_EPSILON, all macros here) and the error bound. So the bits are the same on every target
// and in the CuTe DSL kernels (common/scoring.py). The macros SCORING and GATE_TEMPERATURE say
// which function of the logit a score is.
//
// Functions are called by one lane for its own values unless they say that the full warp calls.
#pragma once

#include "common/selection.cuh"

enum class Scoring { sqrtsoftplus, sigmoid };

// exp(-|z|), 0 for a NaN.
__device__ __forceinline__ float exponential(float z) {
    // fminf returns the operand that is a number: a NaN becomes EXP_CLAMP.
    const float magnitude = fminf(fabsf(z), EXP_CLAMP);

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
    return __fmul_rn(__uint_as_float(scaled), EXP_UNSCALE);
}

// softplus(z) = max(z, 0) + log1p(exp(-|z|)). A NaN gives +0; an infinite z counts as the finite
// number next to it.
__device__ __forceinline__ float softplus(float z) {
    // fmaxf and fminf return the operand that is a number: a NaN becomes 0.
    const float positive = fminf(fmaxf(z, 0.0f), LOGIT_MAX);
    const float u = exponential(z);

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

// a / b rounded to the nearest, for b = fl32(1 + u) with u in [0, 1], and a either u or 1. Without
// the branch of a general division; common/scoring.py has the argument.
__device__ __forceinline__ float divided(float a, float b) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
    inverse = __fmaf_rn(__fmaf_rn(-b, inverse, 1.0f), inverse, inverse);
    inverse = fmaxf(inverse, 0x1.000002p-1f);
    const float quotient = __fmul_rn(a, inverse);
    return __fmaf_rn(__fmaf_rn(-b, quotient, a), inverse, quotient);
}

// 1 / (1 + exp(-z)). A NaN gives +0.
__device__ __forceinline__ float sigmoid(float z) {
    const float u = exponential(z);
    return divided(z >= 0.0f ? 1.0f : u, __fadd_rn(u, 1.0f));
}

// The first part of `score_of`, for a caller that scores many logits: what follows has a branch (the
// square root's, to a slow path for subnormals), and a branch keeps the long chains before it from
// overlapping.
__device__ __forceinline__ float unfinished_score(float logit) {
    const float z =
        GATE_TEMPERATURE == 1.0f ? logit : __fmul_rn(logit, 1.0f / GATE_TEMPERATURE);
    return Scoring::SCORING == Scoring::sigmoid ? sigmoid(z) : softplus(z);
}

// The score of a logit, from its `unfinished_score`.
__device__ __forceinline__ float finished_score(float unfinished) {
    return Scoring::SCORING == Scoring::sigmoid ? unfinished : __fsqrt_rn(unfinished);
}

// The score of a logit (step 3). A NaN logit scores +0.
__device__ __forceinline__ float score_of(float logit) {
    return finished_score(unfinished_score(logit));
}

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
