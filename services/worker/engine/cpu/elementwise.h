// What a decoder layer does between its products, one pass over the data each. Sums are in float32.
#pragma once

#include <cmath>

#include "attention.h"
#include "pool.h"
#include "vec.h"

namespace tokenloom {

// Below so many elements a second thread costs more than it saves.
constexpr int64_t ALONE_MAX = 16 * 1024;
constexpr int ROWS_ITEM = 4;

template <class F>
void each_row(Pool& pool, int64_t rows, int64_t width, F&& f) {
    if (rows * width <= ALONE_MAX) {
        for (int64_t row = 0; row < rows; ++row) f(row);
        return;
    }
    const int items = static_cast<int>((rows + ROWS_ITEM - 1) / ROWS_ITEM);
    parallel(pool, items, [&](int item) {
        const int64_t end = static_cast<int64_t>(item + 1) * ROWS_ITEM;
        for (int64_t row = static_cast<int64_t>(item) * ROWS_ITEM; row < (end < rows ? end : rows); ++row) f(row);
    });
}

// out = x / sqrt(mean(x²) + eps) · weight
template <class T>
inline void normalise(const T* x, const T* weight, float eps, T* out, int width) {
    vf squares = vf{};
    int d = 0;
    float rest = 0;
    for (; d + LANES <= width; d += LANES) {
        const vf value = load(x + d);
        squares += value * value;
    }
    for (int tail = d; tail < width; ++tail) rest += get(x + tail) * get(x + tail);
    const float factor = 1.0f / std::sqrt((sum(squares) + rest) / static_cast<float>(width) + eps);
    for (d = 0; d + LANES <= width; d += LANES) store(out + d, load(x + d) * factor * load(weight + d));
    for (; d < width; ++d) put(out + d, get(x + d) * factor * get(weight + d));
}

// Rotary positions of one head; the halves of its first `turned` numbers are each other's partners.
template <class T>
inline void rotate(T* x, const T* cosines, const T* sines, int turned) {
    const int half = turned / 2;
    int d = 0;
    for (; d + LANES <= half; d += LANES) {
        const vf a = load(x + d), b = load(x + half + d);
        store(x + d, a * load(cosines + d) - b * load(sines + d));
        store(x + half + d, b * load(cosines + half + d) + a * load(sines + half + d));
    }
    for (; d < half; ++d) {
        const float a = get(x + d), b = get(x + half + d);
        put(x + d, a * get(cosines + d) - b * get(sines + d));
        put(x + half + d, b * get(cosines + half + d) + a * get(sines + half + d));
    }
}

enum Gate { SILU = 0, GELU_TANH = 1 };

inline vf gated(vf x, int gate) {
    if (gate == SILU) return x / (1.0f + exp(-x));
    // x · (1 + tanh(u)) / 2 = x / (1 + exp(-2u))
    const vf u = (x + x * x * x * 0.044715f) * 0.7978845608028654f;
    return x / (1.0f + exp(u * -2.0f));
}

// [rows, 2 · width], the gate first, to [rows, width]
template <class T>
inline void gate_row(const T* both, T* out, int width, int gate) {
    int d = 0;
    for (; d + LANES <= width; d += LANES) store(out + d, gated(load(both + d), gate) * load(both + width + d));
    for (; d < width; ++d) put(out + d, gated(splat(get(both + d)), gate)[0] * get(both + width + d));
}

}  // namespace tokenloom
