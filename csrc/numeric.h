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
  // Of the sign, extended, one bit stays. From Half's exponent bias to float's is a factor, for denormals, too.
  const uint32_t bits = static_cast<uint32_t>(static_cast<int16_t>(x.x)) << 13 & 0x8FFFE000u, inf = 31u << 23;
  const float value = bit_cast<float>(bits) * 0x1p112f;
  return bit_cast<float>((bits & inf) == inf ? bits | 0x7F800000u : bit_cast<uint32_t>(value));  // inf, NaN
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
    // |x|, from 2^e up to 2^(e + 1), is rounded to a multiple of 2^(e − 10), Half's last bit, by the addition of
    // 2^(e + 13): that has the multiple in the low bits of the sum. Where Half is denormal e is −14.
    const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7FFFFFFFu;
    const uint32_t inf = (16u + 127u) << 23, least = (127u - 14u) << 23, from_e = 13u << 23;
    const uint32_t finite = magnitude < inf ? magnitude : inf, exponent = finite & 0x7F800000u;
    const uint32_t e = exponent > least ? exponent : least;
    const uint32_t multiple = bit_cast<uint32_t>(bit_cast<float>(finite) + bit_cast<float>(e + from_e)) - (e + from_e);
    const uint32_t half = x != x ? 0x7E00u : multiple + ((e - least) >> 13);
    return T(static_cast<uint16_t>((bits >> 16 & 0x8000u) | half), T::from_bits());
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

// What exp has to know of a type. Adding kRounder, 1.5 times the power of 2 from which on there are no bits for a
// fraction, rounds to the nearest integer, which is then in the low bits of the sum. ln 2 is in two parts, the first
// with so few bits that there is room for those of its product with any exponent.
template <typename Acc>
struct Exponents;

template <>
struct Exponents<float> {
  using Bits = uint32_t;
  static constexpr int kMantissaBits = 23, kBias = 127;
  static constexpr float kRounder = 0x1.8p23f, kInverseLn2 = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kZero = -110, kInf = 89;  // exp(x) is 0 and inf here already
  static constexpr float kLastNormal = 87.33654f;  // and exp(−x) denormal beyond this
};

template <>
struct Exponents<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52, kBias = 1023;
  static constexpr double kRounder = 0x1.8p52, kInverseLn2 = 1.4426950408889634;
  static constexpr double kLn2High = 6.93147180369123816e-1, kLn2Low = 1.90821492927058770e-10;
  static constexpr double kZero = -746, kInf = 710;
  static constexpr double kLastNormal = 708.39641853226410;
};

// 2^n, for an n from 1 − kBias to kBias. The shift drops all bits but the lowest 9, or 12, where those of kRounder, and
// half of them, are 0: so n may be the bits of a sum as above.
template <typename Acc, typename E = Exponents<Acc>>
inline Acc power_of_2(typename E::Bits n) {
  return bit_cast<Acc>((n + E::kBias) << E::kMantissaBits);
}

// x − n·ln 2
template <typename Acc, typename E = Exponents<Acc>>
inline Acc remainder_of_ln2(Acc x, Acc n) {
  return (x - n * E::kLn2High) - n * E::kLn2Low;
}

// The errors of the functions below are the largest over all floats, beside float64, and over many doubles, beside more
// digits; with fused multiply-add or without (tests/test_numeric.py).

// exp(x − n·ln 2), for an n that leaves at most ln 2 / 2, by the polynomial of degree 5, with p(0) = 1, whose largest
// error in ulp, the steps' roundings included, is the least (by linear programming, coefficient after coefficient).
inline float exp_of_remainder(float x, float n) {
  const float r = remainder_of_ln2(x, n);
  float p = 8.2459282130e-3f;
  p = p * r + 4.1906155646e-2f;
  p = p * r + 1.6668470204e-1f;
  p = p * r + 4.9999064207e-1f;
  p = p * r + 9.9999934435e-1f;
  return p * r + 1.0f;
}

// The same in double: 1 + r + r²·q, where q meets (exp(r) − 1 − r)/r² at Chebyshev's nodes.
inline double exp_of_remainder(double x, double n) {
  const double r = remainder_of_ln2(x, n);
  double p = 2.51003854955103203e-8;
  p = p * r + 2.76200884454097462e-7;
  p = p * r + 2.75572684599970641e-6;
  p = p * r + 2.48015212959543761e-5;
  p = p * r + 1.98412698630536177e-4;
  p = p * r + 1.38888889172137167e-3;
  p = p * r + 8.33333333333006153e-3;
  p = p * r + 4.16666666666241289e-2;
  p = p * r + 1.66666666666666685e-1;
  p = p * r + 5.00000000000000111e-1;
  p = p * r + 1.0;
  return p * r + 1.0;
}

// That of floats with a relative error under 1e-5, shorter: by a minimax polynomial for 2^f itself, f = x / ln 2 − n.
inline float exp_of_remainder_16(float x, float n) {
  const float f = x * Exponents<float>::kInverseLn2 - n;
  float p = 9.7006840638e-3f;
  p = p * f + 5.5897524509e-2f;
  p = p * f + 2.4021899614e-1f;
  p = p * f + 6.9312541790e-1f;
  return p * f + 1.0f;
}

// exp(x) = 2^n · exp(r), with n = round(x / ln 2) and |r| ≤ ln 2 / 2. Without branches or calls, so that compilers
// vectorise loops over it. Error under 1.99 ulp, of doubles 1.26; exp(0) is 1, and NaN stays NaN.
template <typename Acc, typename E = Exponents<Acc>>
FUSED_OPS_HOST_DEVICE inline Acc exp(Acc x) {
#ifdef __CUDA_ARCH__
  return ::exp(x);
#else
  x = x < E::kZero ? E::kZero : x;
  x = x > E::kInf ? E::kInf : x;
  const Acc rounded = x * E::kInverseLn2 + E::kRounder;
  const Acc p = exp_of_remainder(x, rounded - E::kRounder);
  // 2^n as two factors, since n reaches the exponents of denormals and of inf.
  const auto n = bit_cast<typename E::Bits>(rounded), half = n >> 1;
  return p * power_of_2<Acc>(half) * power_of_2<Acc>(n - half);
#endif
}

// exp(x) as above from −87.33654, below which it's denormal, to 88 (doubles: −708.39 to 709): there 2^n is one factor,
// whose exponent the sum that rounds has in its low bits, if what it adds is larger by the exponent's bias. Elsewhere
// the result is wrong, but NaN stays NaN. For results of type T, of 16 bits with the shorter polynomial.
template <typename T, typename Acc, typename E = Exponents<Acc>>
inline Acc exp_if_normal(Acc x) {
  constexpr Acc kBiased = E::kRounder + E::kBias;
  const Acc rounded = x * E::kInverseLn2 + kBiased, n = rounded - kBiased;
  Acc p;
  if constexpr (sizeof(T) == 2)
    p = exp_of_remainder_16(x, n);
  else
    p = exp_of_remainder(x, n);
  return p * bit_cast<Acc>(bit_cast<typename E::Bits>(rounded) << E::kMantissaBits);
}

// exp(−x) for the x = max − s of a softmax over logits of type T, which are not below 0 but by rounding. Where it is
// denormal it is 0; NaN stays NaN. Elsewhere error under 1.99 ulp, of doubles 1.26, or that of the shorter polynomial
// where T has 16 bits: logits and gradients are rounded by 1/4096 and more there.
template <typename T, typename Acc>
inline Acc exp_of_softmax(Acc x) {
  return x > Exponents<Acc>::kLastNormal ? 0 : exp_if_normal<T>(-x);
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
  using E = Exponents<float>;
  const float log_1p =
      ((p * f * z + n * E::kLn2Low) - 0.5f * z) + f;  // and the low part of n·ln 2: smallest terms first
  const float elsewhere = x < 0 ? NAN : (x == 0 ? -INFINITY : x);
  return x > 0 && x < INFINITY ? log_1p + n * E::kLn2High : elsewhere;
#endif
}

// tanh(a) of small a, where 1 − 2 / (exp(2a) + 1) cancels: by Cephes' tanhf and tanh.
inline float tanh_near_zero(float a) {
  const float z = a * a;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return p * z * a + a;
}

inline double tanh_near_zero(double a) {
  const double z = a * a;
  const double p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3;
  const double q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3;
  return p / q * z * a + a;
}

// tanh|x| = 1 − 2 / (exp(2|x|) + 1). Without branches or calls, like exp above. Error under 1.71 ulp, of doubles 1.4;
// −0 and NaN stay what they are.
template <typename Acc>
FUSED_OPS_HOST_DEVICE inline Acc tanh(Acc x) {
#ifdef __CUDA_ARCH__
  return ::tanh(x);
#else
  const Acc a = std::fabs(x), near = tanh_near_zero(a), far = 1 - 2 / (exp_if_normal<Acc>(2 * a) + 1);
  const Acc y = a < Acc(0.625) ? near : far;
  return std::copysign(a > 20 ? 1 : y, x);
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
    if (total > 0) merge(other_count, other_mean, other_m2, other_count / total);
  }
  // `share` of the others among all: for several sets that are as large, one division.
  FUSED_OPS_HOST_DEVICE void merge(Acc other_count, Acc other_mean, Acc other_m2, Acc share) {
    const Acc delta = other_mean - mean;
    mean += delta * share;
    m2 += other_m2 + delta * delta * count * share;
    count += other_count;
  }
  FUSED_OPS_HOST_DEVICE void merge(const Moments& other) { merge(other.count, other.mean, other.m2); }
};

}  // namespace fused_ops
