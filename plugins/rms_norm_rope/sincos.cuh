// Sine and cosine of a float of any size, with the same bits under every compiler.
//
// The angle is reduced by multiples of pi/2 in double precision (three operations; pi/2 as a sum of two doubles leaves
// an error below 2^-60 for angles up to 2^31), then two short polynomials in single precision. Both are within 1.5 ulp
// of the exact value. CUDA's own sinf and cosf are as accurate, but keep an array in local memory for large angles.
#pragma once

#include "../common/kernel.cuh"

namespace deepstitch {

__device__ __forceinline__ void sin_cos(float angle, float& sine, float& cosine) {
    constexpr double kTwoOverPi = 0.63661977236758134308;
    constexpr double kHalfPi = 1.57079632679489655800;
    constexpr double kHalfPiRest = 6.12323399573676603587e-17;
    const double turns = rint(static_cast<double>(angle) * kTwoOverPi);
    const double reduced = fma(-turns, kHalfPiRest, fma(-turns, kHalfPi, static_cast<double>(angle)));
    const int quadrant = static_cast<int>(static_cast<int64_t>(turns) & 3);

    // |r| <= pi/4; coefficients of least relative error there, rounded to float
    const float r = static_cast<float>(reduced);
    const float z = r * r;
    float s = fmaf(z, 2.7182925e-6F, -1.9839333e-4F);
    s = fmaf(s, z, 8.3333291e-3F);
    s = fmaf(s, z, -1.6666667e-1F);
    s = fmaf(r * z, s, r);
    float c = fmaf(z, -2.7205570e-7F, 2.4799458e-5F);
    c = fmaf(c, z, -1.3888883e-3F);
    c = fmaf(c, z, 4.1666668e-2F);
    c = fmaf(c, z, -0.5F);
    c = fmaf(c, z, 1.0F);

    const bool swapped = (quadrant & 1) != 0;
    sine = swapped ? c : s;
    cosine = swapped ? s : c;
    if (quadrant >= 2) sine = -sine;
    if (quadrant == 1 || quadrant == 2) cosine = -cosine;
}

}  // namespace deepstitch
