// Matrix-vector products on packed weights, W x for one to six vectors x at a time.
//
// Rows (outputs) are cut into panels of eight vectors; inside a panel the weights lie input by input, so that a product
// streams through memory once while eight accumulators stay in registers (axpy form).  Several x share each load.
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

template <class T>
class Matrix {
   public:
    Matrix() = default;
    // weight(row, column) gives the entries of a rows x columns matrix; rows are padded with zeros to a multiple of four vectors.
    template <class Weight>
    Matrix(int rows, int columns, Weight weight) : columns_(columns), rows_(padded<T>(rows, 4)), data_(size_t(rows_) * columns) {
        for (int start = 0; start < rows_; start += width(start))
            for (int j = 0; j < columns; ++j)
                for (int i = 0; i < width(start); ++i)
                    if (start + i < rows) data_[size_t(start) * columns + size_t(j) * width(start) + i] = T(weight(start + i, j));
    }
    int rows() const { return rows_; }  // padded

    // y = start + W x; start may be y itself.
    void apply(const T* x, const T* start, T* y) const {
        for (int row = 0; row < rows_; row += width(row)) {
            const T* w = data_ + size_t(row) * columns_;
            if (width(row) == 8 * kLanes<T>)
                panel<8, 1>(w, width(row), x, 0, start + row, 0, y + row, 0);
            else
                panel<4, 1>(w, width(row), x, 0, start + row, 0, y + row, 0);
        }
    }
    // The same for n columns x[b * ldx], y[b * ldy], start[b * lds].
    void apply(int n, const T* x, int ldx, const T* start, int lds, T* y, int ldy) const {
        switch (n) {
            case 1: return apply(x, start, y);
            case 2: return columns<4, 2>(x, ldx, start, lds, y, ldy);
            case 3: return columns<4, 3>(x, ldx, start, lds, y, ldy);
            case 4: return columns<2, 4>(x, ldx, start, lds, y, ldy);
            case 5: return columns<2, 5>(x, ldx, start, lds, y, ldy);
            default: return columns<2, 6>(x, ldx, start, lds, y, ldy);
        }
    }

   private:
    int width(int row) const { return rows_ - row >= 8 * kLanes<T> ? 8 * kLanes<T> : 4 * kLanes<T>; }

    template <int NV, int NB>
    void columns(const T* x, int ldx, const T* start, int lds, T* y, int ldy) const {
        for (int row = 0; row < rows_; row += width(row))
            for (int part = 0; part < width(row); part += NV * kLanes<T>)
                panel<NV, NB>(data_ + size_t(row) * columns_ + part, width(row), x, ldx, start + row + part, lds,
                              y + row + part, ldy);
    }
    template <int NV, int NB>
    COMMISSURE_INLINE void panel(const T* w, int stride, const T* x, int ldx, const T* start, int lds, T* y, int ldy) const {
        Vec<T> total[NB][NV];
        for (int b = 0; b < NB; ++b)
            for (int v = 0; v < NV; ++v) total[b][v] = load(start + b * lds + v * kLanes<T>);
        for (int j = 0; j < columns_; ++j, w += stride) {
            Vec<T> weight[NV];
            for (int v = 0; v < NV; ++v) weight[v] = load(w + v * kLanes<T>);
            for (int b = 0; b < NB; ++b) {
                const Vec<T> input = splat<T>(x[b * ldx + j]);
                for (int v = 0; v < NV; ++v) total[b][v] += weight[v] * input;
            }
        }
        for (int b = 0; b < NB; ++b)
            for (int v = 0; v < NV; ++v) store(y + b * ldy + v * kLanes<T>, total[b][v]);
    }

    int columns_ = 0, rows_ = 0;
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
