// Matrix-vector products on packed weights, W x for one to six vectors x at a time.
//
// Rows (outputs) are cut into panels; inside a panel the weights lie input by input, so that a product streams through
// memory once while its accumulators stay in registers (axpy form): eight vectors for one x, enough to hide the latency
// of a multiply-add; two vectors for up to six x, which share each load of the weights.
#pragma once

#include <cstdlib>
#include <new>

#include "elementary.h"

namespace commissure {
namespace {

// Zeroed, 64-byte aligned storage; not std::vector, whose code could be shared between instruction sets by the linker.
template <class T>
class Buffer {
   public:
    Buffer() = default;
    explicit Buffer(size_t n) : size_(n) {
        const size_t bytes = ((n ? n : 1) * sizeof(T) + 63) / 64 * 64;
        data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
        if (!data_) throw std::bad_alloc();
        std::memset(static_cast<void*>(data_), 0, bytes);
    }
    Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr; }
    Buffer& operator=(Buffer&& other) noexcept {
        T* data = data_;
        data_ = other.data_, size_ = other.size_;
        other.data_ = data;
        return *this;
    }
    ~Buffer() { std::free(data_); }
    operator T*() { return data_; }
    operator const T*() const { return data_; }
    size_t size() const { return size_; }

   private:
    T* data_ = nullptr;
    size_t size_ = 0;
};

template <class T>
COMMISSURE_INLINE int padded(int n, int vectors = 1) {
    const int block = vectors * kLanes<T>;
    return (n + block - 1) / block * block;
}

constexpr int kMaxColumns = 6;  // 6 columns x 2 vectors + 2 weights + 1 broadcast = 15 of 16 registers

// `single`: always multiplied with one vector, in panels of eight vectors; `several`: with 1 to 6, in panels of two.
enum class Use { single, several };

template <class T>
class Matrix {
    static constexpr int kPair = 2 * kLanes<T>;

   public:
    Matrix() = default;
    // weight(row, column) gives the entries; rows are padded with zeros to a multiple of four vectors.
    template <class Weight>
    Matrix(int rows, int columns, Weight weight, Use use = Use::single)
        : columns_(columns), rows_(padded<T>(rows, 4)), use_(use), data_(size_t(rows_) * columns) {
        T* to = data_;
        for (int start = 0; start < rows_; start += width(start))
            for (int j = 0; j < columns; ++j)
                for (int i = start; i < start + width(start); ++i) *to++ = i < rows ? T(weight(i, j)) : T(0);
    }
    int rows() const { return rows_; }  // padded

    // y = start + W x; start may be y itself.
    void apply(const T* x, const T* start, T* y) const { columns<4, 1>(x, 0, start, 0, y, 0); }
    // The same for n columns x[b * ldx], y[b * ldy], start[b * lds].
    void apply(int n, const T* x, int ldx, const T* start, int lds, T* y, int ldy) const {
        switch (n) {
            case 1: return columns<4, 1>(x, ldx, start, lds, y, ldy);
            case 2: return columns<2, 2>(x, ldx, start, lds, y, ldy);
            case 3: return columns<2, 3>(x, ldx, start, lds, y, ldy);
            case 4: return columns<1, 4>(x, ldx, start, lds, y, ldy);
            case 5: return columns<1, 5>(x, ldx, start, lds, y, ldy);
            default: return columns<1, 6>(x, ldx, start, lds, y, ldy);
        }
    }

   private:
    int width(int row) const {  // of the panel that starts here
        if (use_ == Use::several) return kPair;
        return rows_ - row >= 4 * kPair ? 4 * kPair : 2 * kPair;
    }
    // NP pairs of vectors for NB columns; what is left over in two pairs.
    template <int NP, int NB>
    void columns(const T* x, int ldx, const T* start, int lds, T* y, int ldy) const {
        int row = 0;
        for (; row + NP * kPair <= rows_; row += NP * kPair) pairs<NP, NB>(row, x, ldx, start + row, lds, y + row, ldy);
        if (row < rows_) pairs<2, NB>(row, x, ldx, start + row, lds, y + row, ldy);
    }
    template <int NP, int NB>
    COMMISSURE_INLINE void pairs(int row, const T* x, int ldx, const T* start, int lds, T* y, int ldy) const {
        constexpr int L = kLanes<T>;
        const size_t stride = width(row), next = use_ == Use::single ? kPair : size_t(kPair) * columns_;
        const T* w = data_ + size_t(row) * columns_;
        Vec<T> total[NB][2 * NP];
        for (int b = 0; b < NB; ++b)
            for (int v = 0; v < 2 * NP; ++v) total[b][v] = load(start + b * lds + v * L);
        for (int j = 0; j < columns_; ++j, w += stride) {
            Vec<T> weight[2 * NP];
            for (int p = 0; p < NP; ++p) weight[2 * p] = load(w + p * next), weight[2 * p + 1] = load(w + p * next + L);
            for (int b = 0; b < NB; ++b) {
                const Vec<T> input = splat<T>(x[b * ldx + j]);
                for (int v = 0; v < 2 * NP; ++v) total[b][v] += weight[v] * input;
            }
        }
        for (int b = 0; b < NB; ++b)
            for (int v = 0; v < 2 * NP; ++v) store(y + b * ldy + v * L, total[b][v]);
    }

    int columns_ = 0, rows_ = 0;
    Use use_ = Use::single;
    Buffer<T> data_;
};

template <class T>
Buffer<T> copied(const double* values, int n, int padding_to = 0) {
    Buffer<T> out(padding_to > n ? padding_to : n);
    for (int i = 0; i < n; ++i) out[i] = T(values[i]);
    return out;
}

}  // namespace
}  // namespace commissure
