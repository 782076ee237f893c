// The arithmetic that kernels share, for host and device: accumulate types, exp and its like.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __CUDACC__
#define FUSED_OPS_HOST_DEVICE __host__ __device__
#else
#define FUSED_OPS_HOST_DEVICE
#endif

namespace fused_ops {

// Sums over 16-bit values are kept in float.
template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename To, typename From>
FUSED_OPS_HOST_DEVICE inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Conversions to and from the accumulate type. Those of the 16-bit types have no branches, unlike their classes' own,
// so that compilers vectorise loops over them; a GPU has an instruction for each, which the classes use.
FUSED_OPS_HOST_DEVICE inline float widen(float x) { return x; }
FUSED_OPS_HOST_DEVICE inline double widen(double x) { return x; }
FUSED_OPS_HOST_DEVICE inline float widen(c10::BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.x) << 16); }
FUSED_OPS_HOST_DEVICE inline float widen(c10::Half x) {
#ifdef __CUDA_ARCH__
  return static_cast<float>(x);
#else
  const uint32_t sign = (x.x & 0x8000u) << 16, magnitude = (x.x & 0x7FFFu) << 13;
  const float value = bit_cast<float>(magnitude) * 0x1p112f;  // from Half's exponent bias to float's; denormals too
  const uint32_t bits = magnitude >= (0x7C00u << 13) ? magnitude | 0x7F800000u : bit_cast<uint32_t>(value);  // inf, NaN
  return bit_cast<float>(sign | bits);
#endif
}

template <typename T>
FUSED_OPS_HOST_DEVICE inline T narrow(accumulate_t<T> x) {
#ifdef __CUDA_ARCH__
  return static_cast<T>(x);
#else
  if constexpr (std::is_same_v<T, c10::BFloat16>) {  // round to nearest, ties to even
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
    return T(static_cast<uint16_t>(x != x ? 0x7FC0u : rounded), T::from_bits());
  } else if constexpr (std::is_same_v<T, c10::Half>) {
    const uint32_t sign = bit_cast<uint32_t>(x) & 0x80000000u;
    const float magnitude = bit_cast<float>(bit_cast<uint32_t>(x) ^ sign);
    // Normal numbers round in integers, from float's exponent bias to Half's. The small ones, whose result is denormal,
    // round by an addition that leaves them just Half's denormal bits.
    const uint32_t bits = bit_cast<uint32_t>(magnitude);
    const uint32_t normal = (bits - (112u << 23) + 0xFFFu + ((bits >> 13) & 1)) >> 13;
    const uint32_t denormal = bit_cast<uint32_t>(magnitude + 0.5f) - bit_cast<uint32_t>(0.5f);
    const uint32_t finite = magnitude < 0x1p-14f ? denormal : normal;
    const uint32_t half = magnitude != magnitude ? 0x7E00u : (magnitude >= 65520.0f ? 0x7C00u : finite);
    return T(static_cast<uint16_t>((sign >> 16) | half), T::from_bits());
  } else {
    return x;
  }
#endif
}

// The same, quicker, to the nearest, but of two as near to the one further from 0. NaN stays NaN if it is the usual
// one, or was once a value of 16 bits.
template <typename T>
inline T narrow_away(accumulate_t<T> x) {
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    return T(static_cast<uint16_t>((bit_cast<uint32_t>(x) + 0x8000u) >> 16), T::from_bits());
  else
    return narrow<T>(x);
}

// x or, for any NaN, the usual one.
template <typename Acc>
inline Acc usual_nan(Acc x) {
  return x == x ? x : std::numeric_limits<Acc>::quiet_NaN();
}

// Adding 1.5·2^23 to a float leaves no bits for a fraction: the addition itself rounds to the nearest integer, which is
// then in the low bits of the sum.
constexpr float kRounder = 12582912.0f;
constexpr float kInverseLn2 = 1.44269504f;

// ln 2 in two parts, the first with so few bits that a float has room for those of its product with any exponent.
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;

// 2^n, for an n from −126 to 127. The shift drops all bits but the lowest 9, where those of kRounder, and half of them,
// are 0: so n may be the bits of a sum as above.
inline float power_of_2(uint32_t n) { return bit_cast<float>((n + 127) << 23); }

// The errors of the functions below are the largest over all floats, beside float64, with fused multiply-add or without
// (tests/test_numeric.py).

// exp(x − n·ln 2), for an n that leaves at most ln 2 / 2, by the polynomial of degree 5, with p(0) = 1, whose largest
// error in ulp, the steps' roundings included, is the least (by linear programming, coefficient after coefficient).
inline float exp_of_remainder(float x, float n) {
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 8.2459282130e-3f;
  p = p * r + 4.1906155646e-2f;
  p = p * r + 1.6668470204e-1f;
  p = p * r + 4.9999064207e-1f;
  p = p * r + 9.9999934435e-1f;
  return p * r + 1.0f;
}

// The same with a relative error under 1e-5, shorter: by a minimax polynomial for 2^f itself, f = x / ln 2 − n.
inline float exp_of_remainder_16(float x, float n) {
  const float f = x * kInverseLn2 - n;
  float p = 9.7006840638e-3f;
  p = p * f + 5.5897524509e-2f;
  p = p * f + 2.4021899614e-1f;
  p = p * f + 6.9312541790e-1f;
  return p * f + 1.0f;
}

FUSED_OPS_HOST_DEVICE inline double exp(double x) { return std::exp(x); }

// exp(x) = 2^n · exp(r), with n = round(x / ln 2) and |r| ≤ ln 2 / 2. Without branches or calls, so that compilers
// vectorise loops over it. Error under 1.99 ulp; exp(0) is 1, and NaN stays NaN.
FUSED_OPS_HOST_DEVICE inline float exp(float x) {
#ifdef __CUDA_ARCH__
  return ::expf(x);
#else
  x = x < -110.0f ? -110.0f : x;  // exp is 0 here already
  x = x > 89.0f ? 89.0f : x;      // and inf here
  const float rounded = x * kInverseLn2 + kRounder;
  const float p = exp_of_remainder(x, rounded - kRounder);
  // 2^n as two factors, since n reaches the exponents of denormals and of inf.
  const uint32_t n = bit_cast<uint32_t>(rounded), half = n >> 1;
  return p * power_of_2(half) * power_of_2(n - half);
#endif
}

// exp(x) as above from −87.33654, below which it's denormal, to 88: there 2^n is one factor, whose exponent the sum
// that rounds has in its low bits, if what it adds is larger by the exponent's bias. Elsewhere the result is wrong, but
// NaN stays NaN. For results of type T, of 16 bits with the shorter polynomial.
template <typename T = float>
inline float exp_if_normal(float x) {
  constexpr float kBiased = kRounder + 127;
  const float rounded = x * kInverseLn2 + kBiased, n = rounded - kBiased;
  const float p = std::is_same_v<T, float> ? exp_of_remainder(x, n) : exp_of_remainder_16(x, n);
  return p * bit_cast<float>(bit_cast<uint32_t>(rounded) << 23);
}

// exp(−x) for the x = max − s of a softmax over logits of type T, which are not below 0 but by rounding.
template <typename T>
inline double exp_of_softmax(double x) {
  return std::exp(-x);
}

// Where exp(−x) is denormal it is 0; NaN stays NaN. Elsewhere error under 1.99 ulp, or that of the shorter polynomial
// where T has 16 bits: logits and gradients are rounded by 1/4096 and more there.
template <typename T>
inline float exp_of_softmax(float x) {
  return x > 87.33654f ? 0.0f : exp_if_normal<T>(-x);
}

FUSED_OPS_HOST_DEVICE inline double log(double x) { return std::log(x); }

// log(x) = n·ln 2 + log(1 + f), with x = 2^n · (1 + f) and √½ ≤ 1 + f < √2, by the polynomial of Cephes' logf. Without
// branches or calls, like exp above. Error under 0.83 ulp; −inf at zero, NaN below, NaN stays NaN.
FUSED_OPS_HOST_DEVICE inline float log(float x) {
#ifdef __CUDA_ARCH__
  return ::logf(x);
#else
  const bool denormal = x < 0x1p-126f;
  const uint32_t root_half = 0x3F3504F3u;  // the bits of √½: from there on, the exponent's bits count powers of 2
  const uint32_t beyond = bit_cast<uint32_t>(denormal ? x * 0x1p23f : x) - root_half;
  const float n = static_cast<float>((static_cast<int32_t>(beyond) >> 23) - (denormal ? 23 : 0));
  const float f = bit_cast<float>((beyond & 0x7FFFFFu) + root_half) - 1.0f, z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float log_1p = ((p * f * z + n * kLn2Low) - 0.5f * z) + f;  // and the low part of n·ln 2: smallest terms first
  const float elsewhere = x < 0 ? NAN : (x == 0 ? -INFINITY : x);
  return x > 0 && x < INFINITY ? log_1p + n * kLn2High : elsewhere;
#endif
}

FUSED_OPS_HOST_DEVICE inline double tanh(double x) { return std::tanh(x); }

// tanh|x| = 1 − 2 / (exp(2|x|) + 1), and near zero, where that cancels, the polynomial of Cephes' tanhf. Without
// branches or calls, like exp above. Error under 1.71 ulp; −0 and NaN stay what they are.
FUSED_OPS_HOST_DEVICE inline float tanh(float x) {
#ifdef __CUDA_ARCH__
  return ::tanhf(x);
#else
  const float a = std::fabs(x), z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float near = p * z * a + a, far = 1.0f - 2.0f / (exp_if_normal(2.0f * a) + 1.0f);
  const float y = a < 0.625f ? near : far;
  return std::copysign(a > 10.0f ? 1.0f : y, x);
#endif
}

// The normal distribution Φ(z), where e is exp(−z²/2).
FUSED_OPS_HOST_DEVICE inline double normal_distribution(double z, double) {
  return 0.5 * std::erfc(-z * 0.70710678118654752);
}

// Near zero Φ is ½ + z·near(z²). Further out the tail beyond |z| is e·R(|z|), where R falls slowly: a polynomial in
// u = 1/(1 + 0.35·|z|), for |z| up to 14.5, where e is 0. Both are minimax polynomials (by Lawson's iteration). Without
// branches or calls, like exp above. Error under 1e-7 and, relative to a tail of z < 0 that isn't denormal, under
// 5e-6; NaN stays NaN.
FUSED_OPS_HOST_DEVICE inline float normal_distribution(float z, float e) {
#ifdef __CUDA_ARCH__
  return ::normcdff(z);
#else
  const float a = z < 0 ? -z : z, u = 1.0f / (1.0f + 0.35f * a);
  float p = -2.915788572e-02f;
  p = p * u + 1.440309193e-01f;
  p = p * u - 2.558390030e-01f;
  p = p * u + 1.593196939e-01f;
  p = p * u - 2.321235210e-02f;
  p = p * u + 1.055525015e-01f;
  p = p * u + 1.198212879e-01f;
  p = p * u + 1.398635154e-01f;
  p = p * u + 1.396213068e-01f;
  const float s = z * z;
  float near = -7.530306486e-06f;
  near = near * s + 1.131436477e-04f;
  near = near * s - 1.185984699e-03f;
  near = near * s + 9.973170930e-03f;
  near = near * s - 6.649033235e-02f;
  near = near * s + 3.989422787e-01f;
  const float tail = p * u * e, far = z < 0 ? tail : 1.0f - tail;
  return a < 1.0f ? 0.5f + z * near : far;
#endif
}

// The number of values, their mean, and the sum of their squared distances from it.
template <typename Acc>
struct Moments {
  Acc count = 0, mean = 0, m2 = 0;

  // The moments of both sets together (Chan, Golub and LeVeque 1979).
  FUSED_OPS_HOST_DEVICE void merge(Acc other_count, Acc other_mean, Acc other_m2) {
    const Acc total = count + other_count;
    if (total == 0) return;
    const Acc delta = other_mean - mean, share = other_count / total;
    mean += delta * share;
    m2 += other_m2 + delta * delta * count * share;
    count = total;
  }
  FUSED_OPS_HOST_DEVICE void merge(const Moments& other) { merge(other.count, other.mean, other.m2); }
};

}  // namespace fused_ops
