// Scores, selection keys and weights from FP32 logits: steps 2 to 4 and 6 of the router.
//
// Every operation is one IEEE-rounded fp32 operation with subnormals kept, in the order that
// numerics.py gives together with the constants and the error bound. The result has the same bits
// on every target and in the CuTe DSL kernels.
#pragma once

#include "common/selection.cuh"

// The score is the square root of this. A NaN logit gives +0; logits beyond the finite range count
// as its ends.
__device__ __forceinline__ float softplus(float logit) {
    const float positive = fminf(fmaxf(logit, 0.0f), LOGIT_MAX);
    const float magnitude = fminf(fabsf(logit), EXP_CLAMP);

    // u = exp(-magnitude) = exp(r) * 2^n
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
    const unsigned scaled = __float_as_uint(p) + (__float_as_uint(shifted) << 23);
    const float u = __fmul_rn(__uint_as_float(scaled), EXP_UNSCALE);

    // q = log1p(u) / u
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

// The bias to select by: that of a NaN logit is -inf, which makes its key -inf.
__device__ __forceinline__ float selection_bias(float logit, float bias) {
    return logit != logit ? __int_as_float(0xff800000) : bias;
}

// The weight of the expert whose score this lane holds. Lanes 0 to k - 1 hold the scores in rank
// order, the others +0, which leaves the sum as it is.
__device__ __forceinline__ float routing_weight(float score, unsigned k, float scale,
                                                bool renormalize) {
    if (!renormalize) return __fmul_rn(score, scale);  // the same for all lanes
    float sum = 0.0f;
    for (unsigned first = 0; first < k; first += 8) {
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            sum = __fadd_rn(sum, __shfl_sync(ALL_LANES, score, first + j));
        }
    }
    return __fmul_rn(__fdiv_rn(score, __fadd_rn(sum, RENORM_EPSILON)), scale);
}
