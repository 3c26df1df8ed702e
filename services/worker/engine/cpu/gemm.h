// Products of a few rows with a packed weight: out[m, n] (+)= x[m, k] · weight[n, k] + bias[n], in float32.
//
// The weight is cut into panels of 32 output columns, each stored in the order in which it is read:
// for every k the panel's 32 numbers. In bfloat16 two columns share a word, column j in the lower half
// and j + 16 in the upper, so that 64 bytes become 32 floats with one shift and one mask. A model
// stored in bfloat16 is so read at half the bytes of float32 and multiplied without any loss.
#pragma once

#include "pool.h"
#include "vec.h"

namespace tokenloom {

constexpr int PANEL = 2 * LANES;
// Rows whose sums stay in registers.
#if defined(__AVX512F__)
constexpr int ROWS_TILE = 12;
#else
constexpr int ROWS_TILE = 3;
#endif
constexpr int ITEMS_PER_THREAD = 8;
// From so many tiles on it pays to put x into the order in which it is read.
constexpr int TILES_PACKED = 12;
// So many inputs ahead of the product, memory is asked for the weight.
constexpr int PREFETCHED = 128;
// A panel and a tile of so many inputs stay in the innermost cache together.
constexpr int INPUTS_BLOCK = 320;

inline int panels(int columns) { return (columns + PANEL - 1) / PANEL; }

struct Panels16 {
    using Word = uint32_t;
    static constexpr int WORDS = LANES;
    static inline void read(const Word* p, vf& low, vf& high) {
        const vu words = *reinterpret_cast<const vu_any*>(p);
        low = (vf)(words << 16);
        high = (vf)(words & 0xffff0000u);
    }
};

struct Panels32 {
    using Word = float;
    static constexpr int WORDS = PANEL;
    static inline void read(const Word* p, vf& low, vf& high) {
        low = load(p);
        high = load(p + LANES);
    }
};

struct Product {
    const float* x;
    int64_t x_stride;
    float* out;
    int64_t out_stride;
    const float* bias;
    int rows, inputs, outputs;
    bool add;
    float* space;  // rows · inputs floats, or null
};

// Rows of x as they lie, or the rows of one tile packed so that those of one k are neighbours.
struct Plain {
    const float* x;
    int64_t stride;
    template <int ROWS>
    float at(int r, int k) const {
        return x[r * stride + k];
    }
};

struct Tiled {
    const float* x;
    template <int ROWS>
    float at(int r, int k) const {
        return x[k * ROWS + r];
    }
};

template <class Panels, int ROWS, class Rows>
inline void tile(const Product& p, const Rows& x, const typename Panels::Word* panel, int row, int column,
                 int from, int to) {
    vf low[ROWS], high[ROWS];
    for (int r = 0; r < ROWS; ++r) low[r] = high[r] = vf{};
    for (int k = from; k < to; ++k) {
        const typename Panels::Word* words = panel + static_cast<int64_t>(k) * Panels::WORDS;
        for (int w = 0; w < Panels::WORDS; w += LANES) __builtin_prefetch(words + PREFETCHED * Panels::WORDS + w);
        vf a, b;
        Panels::read(words, a, b);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const vf value = splat(x.template at<ROWS>(r, k));
            low[r] += value * a;
            high[r] += value * b;
        }
    }
    const bool fresh = from == 0 && !p.add;
    const bool biased = from == 0 && p.bias;
    if (p.outputs - column >= PANEL) {
        const vf bias_low = biased ? load(p.bias + column) : vf{};
        const vf bias_high = biased ? load(p.bias + column + LANES) : vf{};
        for (int r = 0; r < ROWS; ++r) {
            float* out = p.out + (row + r) * p.out_stride + column;
            store(out, (fresh ? bias_low : bias_low + load(out)) + low[r]);
            store(out + LANES, (fresh ? bias_high : bias_high + load(out + LANES)) + high[r]);
        }
        return;
    }
    for (int r = 0; r < ROWS; ++r) {
        float* out = p.out + (row + r) * p.out_stride + column;
        float sums[PANEL];
        store(sums, low[r]);
        store(sums + LANES, high[r]);
        for (int c = 0; c < p.outputs - column; ++c)
            out[c] = (fresh ? 0.0f : out[c]) + (biased ? p.bias[column + c] : 0.0f) + sums[c];
    }
}

// Calls f with the number of rows, 1 to ROWS_TILE, as a compile-time constant.
template <int MOST = ROWS_TILE, class F>
inline void with_rows(int rows, F&& f) {
    if constexpr (MOST > 1) {
        if (rows < MOST) return with_rows<MOST - 1>(rows, f);
    }
    f.template operator()<MOST>();
}

// Tiles of even height: 32 rows are 11 + 11 + 10.
inline int tile_start(int rows, int tiles, int number) {
    return static_cast<int>(static_cast<int64_t>(rows) * number / tiles);
}

inline void pack_rows(const Product& p, int row, int rows, float* packed) {
    for (int r = 0; r < rows; ++r) {
        const float* x = p.x + (row + r) * p.x_stride;
        for (int k = 0; k < p.inputs; ++k) packed[static_cast<int64_t>(k) * rows + r] = x[k];
    }
}

template <class Panels>
void multiply(Pool& pool, const Product& p, const typename Panels::Word* weight) {
    if (p.rows < 1 || p.outputs < 1) return;
    const int columns = panels(p.outputs);
    const int tiles = (p.rows + ROWS_TILE - 1) / ROWS_TILE;
    const int64_t panel_words = static_cast<int64_t>(p.inputs) * Panels::WORDS;
    const int block = tiles > 1 ? INPUTS_BLOCK : p.inputs;
    float* packed = nullptr;
    if (p.space && tiles >= TILES_PACKED) {
        packed = p.space;
        parallel(pool, tiles, [&](int number) {
            const int row = tile_start(p.rows, tiles, number);
            pack_rows(p, row, tile_start(p.rows, tiles, number + 1) - row,
                      packed + static_cast<int64_t>(row) * p.inputs);
        });
    }
    // Several items for each thread, so that one that is held up does not hold up the others.
    const int wanted = ITEMS_PER_THREAD * pool.threads();
    const int group = columns > wanted ? columns / wanted : 1;
    const int groups = (columns + group - 1) / group;
    int tile_group = tiles;
    while (groups * ((tiles + tile_group - 1) / tile_group) < wanted && tile_group > 2)
        tile_group = (tile_group + 1) / 2;
    const int tile_groups = (tiles + tile_group - 1) / tile_group;
    parallel(pool, groups * tile_groups, [&](int item) {
        const int first = item % groups * group;
        const int last = first + group < columns ? first + group : columns;
        const int from = item / groups * tile_group;
        const int to = from + tile_group < tiles ? from + tile_group : tiles;
        for (int panel = first; panel < last; ++panel) {
            const auto* words = weight + panel * panel_words;
            for (int k = 0; k < p.inputs; k += block) {
                const int end = k + block < p.inputs ? k + block : p.inputs;
                for (int t = from; t < to; ++t) {
                    const int row = tile_start(p.rows, tiles, t);
                    with_rows(tile_start(p.rows, tiles, t + 1) - row, [&]<int ROWS>() {
                        const int column = panel * PANEL;
                        if (packed)
                            tile<Panels, ROWS>(p, Tiled{packed + static_cast<int64_t>(row) * p.inputs}, words,
                                               row, column, k, end);
                        else
                            tile<Panels, ROWS>(p, Plain{p.x + row * p.x_stride, p.x_stride}, words, row,
                                               column, k, end);
                    });
                }
            }
        }
    });
}

}  // namespace tokenloom
