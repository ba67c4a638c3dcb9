// An accumulator and 16 products, summed in the way that published recordings of B200, H100 and H200
// show: all 17 are aligned to the largest exponent among them and cut off below 25 fractional bits,
// the sum of what is left is exact, and it is cut off to FP32.
#pragma once

constexpr int STEP = 16, FRACTION = 25;
// The exponent of a product or an accumulator that is zero.
constexpr int ZERO_EXPONENT = -133;

// significand * 2^(exponent - bits): a number, or a product of two. A product of significands from 1
// to 2 can be up to 4, and keeps the sum of their exponents.
struct Scaled {
    long long significand;
    int exponent, bits;
};

// A binary floating-point number of `fraction` fractional bits.
static __device__ Scaled scaled(unsigned bits, int width, int fraction) {
    const int bias = (1 << (width - 1)) - 1, raw = bits >> fraction & ((1 << width) - 1);
    long long significand = bits & ((1u << fraction) - 1);
    if (raw) significand |= 1ll << fraction;
    const bool negative = bits >> (width + fraction) & 1;
    return {negative ? -significand : significand, (raw ? raw : 1) - bias, fraction};
}
static __device__ Scaled product(Scaled a, Scaled b) {
    return {a.significand * b.significand, a.exponent + b.exponent, a.bits + b.bits};
}
static __device__ int aligned_to(Scaled x) { return x.significand ? x.exponent : ZERO_EXPONENT; }

// In units of 2^(exponent - FRACTION), cut off.
static __device__ long long aligned(Scaled x, int exponent) {
    const int left = x.exponent - exponent + FRACTION - x.bits;
    if (left >= 0) return x.significand << left;
    const long long size = (x.significand < 0 ? -x.significand : x.significand) >> min(-left, 63);
    return x.significand < 0 ? -size : size;
}

static __device__ double number(unsigned bits, bool bf16) {
    if (bf16) return __uint_as_float(bits << 16);
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((unsigned short)bits));
    return value;
}

// sum + a[0] b[0] + ... + a[15] b[15], of FP16 or BF16 numbers as bits.
static __device__ float exact_sum(float sum, const unsigned* a, const unsigned* b, bool bf16) {
    // Finite products are far below the largest double: this shows infinities and what is not a number.
    double plain = sum;
    for (int k = 0; k < STEP; ++k) plain += number(a[k], bf16) * number(b[k], bf16);
    if (!isfinite(plain)) return isnan(plain) ? __uint_as_float(0x7fffffffu) : (float)plain;
    const int width = bf16 ? 8 : 5, fraction = 15 - width;
    const Scaled first = scaled(__float_as_uint(sum), 8, 23);
    Scaled products[STEP];
    int exponent = aligned_to(first);
    for (int k = 0; k < STEP; ++k) {
        products[k] = product(scaled(a[k], width, fraction), scaled(b[k], width, fraction));
        exponent = max(exponent, aligned_to(products[k]));
    }
    long long total = aligned(first, exponent);
    for (int k = 0; k < STEP; ++k) total += aligned(products[k], exponent);
    const double exact = ldexp((double)total, exponent - FRACTION);
    if (fabs(exact) >= 0x1p128) return (float)exact;
    // Zero has no sign here.
    return __double2float_rz(exact) + 0.0f;
}
