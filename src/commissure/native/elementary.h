// Vectors of T and branch-free elementary functions on them, float and double.
//
// Polynomials are Chebyshev interpolants (errors below); rounding dominates in double.  Measured bounds are asserted in
// tests/native/test_elementary.py.  Included by translation units compiled once per instruction set: everything is
// `static` or in an unnamed namespace, so that no clone's code can be linked into another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace commissure {
namespace {

#if defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define COMMISSURE_INLINE inline __attribute__((always_inline))

template <class T>
struct Simd;
template <>
struct Simd<float> {
    typedef float V __attribute__((vector_size(kVectorBytes), may_alias));
    typedef int32_t I __attribute__((vector_size(kVectorBytes), may_alias));
    static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    static constexpr int kMantissa = 23;
    static constexpr float kExpMin = -87.0f, kExpMax = 88.0f;
    static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
};
template <>
struct Simd<double> {
    typedef double V __attribute__((vector_size(kVectorBytes), may_alias));
    typedef int64_t I __attribute__((vector_size(kVectorBytes), may_alias));
    static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr int kMantissa = 52;
    static constexpr double kExpMin = -708.0, kExpMax = 709.0;
    static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using IntVec = typename Simd<T>::I;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
COMMISSURE_INLINE Vec<T> splat(T x) {
    return x - Vec<T>{};
}
template <class T>
COMMISSURE_INLINE Vec<T> load(const T* p) {
    return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
COMMISSURE_INLINE void store(T* p, Vec<T> v) {
    *reinterpret_cast<Vec<T>*>(p) = v;
}
template <class T>
COMMISSURE_INLINE T sum(Vec<T> v) {
    T lanes[kLanes<T>];
    std::memcpy(lanes, &v, sizeof(v));
    for (int width = kLanes<T> / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}
template <class T>
COMMISSURE_INLINE IntVec<T> bits(Vec<T> v) {
    IntVec<T> out;
    std::memcpy(&out, &v, sizeof(out));
    return out;
}
template <class T>
COMMISSURE_INLINE Vec<T> from_bits(IntVec<T> v) {
    Vec<T> out;
    std::memcpy(&out, &v, sizeof(out));
    return out;
}
template <class T, int N>
COMMISSURE_INLINE Vec<T> horner(const T (&c)[N], Vec<T> x) {
    Vec<T> y = splat<T>(c[N - 1]);
    for (int i = N - 2; i >= 0; --i) y = y * x + c[i];
    return y;
}
template <class T>
COMMISSURE_INLINE Vec<T> magnitude(Vec<T> x) {
    return x < T(0) ? -x : x;
}

template <class T>
struct Coefficients;
template <>
struct Coefficients<float> {
    static constexpr float exp[] = {1.0f,           1.000000038f,   0.5000000047f, 0.1666641551f,
                                    0.0416663529f, 0.008375126398f, 0.001394110843f};  // 2.5e-9
    static constexpr float sin[] = {6.283185307f, -41.34170215f, 81.60520471f, -76.69786635f, 41.47283324f};  // 5e-12
    static constexpr float cos[] = {1.0f, -19.73920865f, 64.93931614f, -85.44284467f, 59.22016896f};          // 7e-11
    static constexpr float erfc[] = {-0.6717940928f,  0.6726432125f,   0.04734394039f,  -0.04689478102f,
                                     -0.009880431638f, 0.008815156956f, 0.001795201494f, -0.002303143465f,
                                     -0.00022919226f, 0.0005880716888f, 8.50831661e-6f,  -9.246457796e-5f};  // 1.5e-8
    static constexpr float atanh[] = {2.0f,         0.6666667903f, 0.3999871125f,
                                      0.2862020741f, 0.2139856051f, 0.2439390808f};  // 1e-10
};
template <>
struct Coefficients<double> {
    static constexpr double exp[] = {1.0,
                                     0.999999999999999998,
                                     0.5,
                                     0.166666666666667024,
                                     0.0416666666666666922,
                                     0.00833333333330952708,
                                     0.00138888888888718882,
                                     0.000198412699092171014,
                                     0.0000248015873501107956,
                                     2.75572249583926227e-6,
                                     2.75572519041749126e-7,
                                     2.51148695286577649e-8,
                                     2.09215799649503001e-9};  // 6e-20
    static constexpr double sin[] = {6.28318530717958648, -41.3417022403997601, 81.6052492760749307,
                                     -76.7058597529981267, 42.0586939289887834, -15.0946404038915456,
                                     3.81978812016321142, -0.7116358090781666};
    static constexpr double cos[] = {1.0,
                                     -19.7392088021787172,
                                     64.9393940226682912,
                                     -85.4568172066935499,
                                     60.2446413718181047,
                                     -26.4262567725454378,
                                     7.90353519476295794,
                                     -1.71431618792852784,
                                     0.279458671475289623};
    static constexpr double erfc[] = {
        -0.671794084056692267,   0.672643223977656788,   0.04734330684190473,     -0.0468956102311826727,
        -0.00987268936640672606, 0.0088249385573277622,  0.00175893355816543409,  -0.00234581250498258396,
        -0.000146246867540451334, 0.000673678838250606135, -0.00009373500301998986, -0.000174303199429746351,
        0.0000714008918909923474, 0.0000317461656435567909, -0.0000301875288422438156, 1.35091029329579541e-7,
        8.56191490492247999e-6,  -2.94309268213418337e-6, -1.27134306702365502e-6, 1.24371914167216544e-6,
        -1.69392375799956559e-7, -2.44046623755816739e-7, 1.53876066692852205e-7,  -1.71106964669531403e-9,
        -3.93565334478099143e-8, 1.22257105512604152e-8,  4.08922248089616682e-9,  -2.04646703291923744e-9};  // 6e-18
    static constexpr double atanh[] = {2.0,
                                       0.666666666666661496,
                                       0.400000000001857475,
                                       0.285714285454541145,
                                       0.222222240807476732,
                                       0.181817408325048045,
                                       0.153866140423040078,
                                       0.133003740326746243,
                                       0.121101687280692177,
                                       0.0832450651186082058,
                                       0.170441635627813981};  // 1e-18
};

// exp(x) = 2^n exp(r), |r| <= ln 2 / 2; the argument is clamped so that the result stays normal (softmax weights below
// e^-87 count as e^-87).
template <class T>
COMMISSURE_INLINE Vec<T> exp_v(Vec<T> x) {
    using S = Simd<T>;
    x = x < S::kExpMin ? splat<T>(S::kExpMin) : x;
    x = x > S::kExpMax ? splat<T>(S::kExpMax) : x;
    const Vec<T> shifted = x * T(1.44269504088896340736) + S::kRound;
    const Vec<T> n = shifted - S::kRound;
    const Vec<T> r = (x - n * S::kLn2High) - n * S::kLn2Low;
    const IntVec<T> exponent = bits<T>(shifted) << S::kMantissa;
    return from_bits<T>(bits<T>(horner<T>(Coefficients<T>::exp, r)) + exponent);
}

// exp(x) - 1 = 2^n (exp(r) - 1) + (2^n - 1), exact differences both: relative accuracy at 0 as well.  NaN stays NaN.
template <class T>
COMMISSURE_INLINE Vec<T> expm1_v(Vec<T> x) {
    using S = Simd<T>;
    constexpr int count = int(sizeof(Coefficients<T>::exp) / sizeof(T));
    x = x < S::kExpMin ? splat<T>(S::kExpMin) : x;
    x = x > S::kExpMax ? splat<T>(S::kExpMax) : x;
    const Vec<T> shifted = x * T(1.44269504088896340736) + S::kRound;
    const Vec<T> n = shifted - S::kRound;
    const Vec<T> r = (x - n * S::kLn2High) - n * S::kLn2Low;
    Vec<T> y = splat<T>(Coefficients<T>::exp[count - 1]);
    for (int i = count - 2; i >= 1; --i) y = y * r + Coefficients<T>::exp[i];
    const Vec<T> power = from_bits<T>((bits<T>(shifted) << S::kMantissa) + bits<T>(splat<T>(1)));
    return power * (y * r) + (power - T(1));
}

// sin and cos of 2 pi u for |u| <= 1/2 turn: reduced to an eighth of a turn, then swapped and signed by the quadrant.
template <class T>
COMMISSURE_INLINE void sincos_turns(Vec<T> u, Vec<T>& sine, Vec<T>& cosine) {
    using S = Simd<T>;
    const Vec<T> shifted = u * T(4) + S::kRound;
    const Vec<T> r = u - (shifted - S::kRound) * T(0.25);
    const Vec<T> y = r * r;
    const Vec<T> s = r * horner<T>(Coefficients<T>::sin, y), c = horner<T>(Coefficients<T>::cos, y);
    const IntVec<T> quadrant = bits<T>(shifted);
    const IntVec<T> odd = (quadrant & 1) != 0;
    constexpr int top = int(8 * sizeof(T)) - 1;
    const IntVec<T> sine_sign = (quadrant >> 1) << top, cosine_sign = ((quadrant + 1) >> 1) << top;
    sine = from_bits<T>(bits<T>(odd ? c : s) ^ sine_sign);
    cosine = from_bits<T>(bits<T>(odd ? s : c) ^ cosine_sign);
}

// erfc(z) = t exp(-z^2 + P(2t - 1)), t = 2 / (2 + z), z >= 0 (the form of Numerical Recipes 6.2, own coefficients):
// relative accuracy in the tail, so that gelu(x) = x erfc(-x / sqrt 2) / 2 loses nothing at negative x.
template <class T>
COMMISSURE_INLINE Vec<T> gelu_v(Vec<T> x) {
    Vec<T> z = magnitude<T>(x) * T(0.70710678118654752440);
    const Vec<T> t = T(2) / (z + T(2));
    const Vec<T> tail = t * exp_v<T>(horner<T>(Coefficients<T>::erfc, t * T(2) - T(1)) - z * z);
    return x * T(0.5) * (x < T(0) ? tail : T(2) - tail);
}

template <class T>
COMMISSURE_INLINE Vec<T> sigmoid_v(Vec<T> x) {
    return T(1) / (T(1) + exp_v<T>(-x));
}

// e / (e + 2), e = exp(2 |x|) - 1: as expm1_v, but what is never negative nor large needs no bounds.  NaN stays NaN.
template <class T>
COMMISSURE_INLINE Vec<T> tanh_v(Vec<T> x) {
    using S = Simd<T>;
    constexpr int count = int(sizeof(Coefficients<T>::exp) / sizeof(T));
    const IntVec<T> sign = bits<T>(x) & bits<T>(splat<T>(T(-0.0)));
    Vec<T> twice = from_bits<T>(bits<T>(x) ^ sign);
    twice = twice > T(20) ? splat<T>(20) : twice;  // tanh 20 rounds to 1; NaN stays
    twice += twice;
    const Vec<T> shifted = twice * T(1.44269504088896340736) + S::kRound;
    const Vec<T> n = shifted - S::kRound;
    const Vec<T> r = (twice - n * S::kLn2High) - n * S::kLn2Low;
    Vec<T> y = splat<T>(Coefficients<T>::exp[count - 1]);
    for (int i = count - 2; i >= 1; --i) y = y * r + Coefficients<T>::exp[i];
    const Vec<T> power = from_bits<T>((bits<T>(shifted) << S::kMantissa) + bits<T>(splat<T>(1)));
    const Vec<T> e = power * (y * r) + (power - T(1));
    return from_bits<T>(bits<T>(e / (e + T(2))) | sign);
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), log1p(y) = 2 atanh(y / (2 + y))
template <class T>
COMMISSURE_INLINE Vec<T> softplus_v(Vec<T> x) {
    const Vec<T> y = exp_v<T>(-magnitude<T>(x));
    const Vec<T> s = y / (y + T(2));
    return (x > T(0) ? x : Vec<T>{}) + s * horner<T>(Coefficients<T>::atanh, s * s);
}

}  // namespace
}  // namespace commissure
