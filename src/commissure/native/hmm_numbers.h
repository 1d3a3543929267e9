// What the exact filter of HMMs asks of numbers and memory: range, subnormals, a logarithm, storage left as it is.
// Included by translation units compiled once per instruction set: everything is static or in an unnamed namespace.
#pragma once

#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "linear.h"

namespace commissure {
namespace {

template <class T>
struct Range;
template <>
struct Range<float> {
    static constexpr double low = 0x1p-40, high = 0x1p100, negligible = 1e-13;
    static constexpr int bias = 127;
};
template <>
struct Range<double> {
    static constexpr double low = 0x1p-400, high = 0x1p900, negligible = 1e-21;
    static constexpr int bias = 1023;
};

// Numbers below the normal range count as zero while this lives: they are slow, and 2^-126 of the whole at most.
class FlushSubnormals {
   public:
#if defined(__SSE2__)
    FlushSubnormals() : kept_(_mm_getcsr()) { _mm_setcsr(kept_ | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(kept_); }

   private:
    unsigned kept_;
#endif
};

// log x for normal x > 0: x = 2^n m, 1/sqrt 2 <= m < sqrt 2, log m = 2 atanh((m - 1) / (m + 1)).  Zero gives about
// the log of the smallest normal number, which is fine in x log x.
template <class T>
COMMISSURE_INLINE Vec<T> log_v(Vec<T> x) {
    using S = Simd<T>;
    constexpr T tiny = std::numeric_limits<T>::min(), root = T(0.70710678118654752440);
    x = x < tiny ? splat<T>(tiny) : x;
    const IntVec<T> half = bits<T>(splat<T>(root));
    const IntVec<T> shifted = bits<T>(x) - half;
    const IntVec<T> n = shifted >> S::kMantissa;
    const Vec<T> m = from_bits<T>(bits<T>(x) - (n << S::kMantissa));
    const Vec<T> s = (m - T(1)) / (m + T(1));
    const Vec<T> whole = from_bits<T>(bits<T>(splat<T>(S::kRound)) + n) - S::kRound;
    return whole * S::kLn2High + (s * horner<T>(Coefficients<T>::atanh, s * s) + whole * S::kLn2Low);
}

// Storage that is neither filled nor touched before it is used.
template <class T>
class Untouched {
   public:
    ~Untouched() { std::free(data_); }
    T* get(size_t n) {
        if (!data_) data_ = static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64));
        if (!data_) throw std::bad_alloc();
        return data_;
    }

   private:
    T* data_ = nullptr;
};

}  // namespace
}  // namespace commissure
