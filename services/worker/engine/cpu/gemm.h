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
// From so many tiles on the panels move and the tiles stay.
constexpr int TILES_MANY = 6;
// So many inputs ahead of the product, memory is asked for the weight.
constexpr int PREFETCHED = 128;
// A tile of so many inputs stays in the innermost cache, and so many panels in the one behind it.
constexpr int INPUTS_BLOCK = 768;
constexpr int PANELS_GROUP = 12;

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
};

template <class Panels, int ROWS>
inline void tile(const Product& p, const typename Panels::Word* panel, int row, int column, int from, int to) {
    const float* x = p.x + row * p.x_stride;
    vf low[ROWS], high[ROWS];
    for (int r = 0; r < ROWS; ++r) low[r] = high[r] = vf{};
    for (int k = from; k < to; ++k) {
        const typename Panels::Word* words = panel + static_cast<int64_t>(k) * Panels::WORDS;
        for (int w = 0; w < Panels::WORDS; w += LANES) __builtin_prefetch(words + PREFETCHED * Panels::WORDS + w);
        vf a, b;
        Panels::read(words, a, b);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const vf value = splat(x[r * p.x_stride + k]);
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

// Panels `first` to `last` for tiles `from` to `to`.
struct Piece {
    int first, last, from, to;
};

// Few rows: each panel comes from memory once and meets all of them.
template <class Panels>
inline void by_panels(const Product& p, const typename Panels::Word* weight, int tiles, const Piece& piece) {
    const int64_t panel_words = static_cast<int64_t>(p.inputs) * Panels::WORDS;
    for (int panel = piece.first; panel < piece.last; ++panel)
        for (int t = piece.from; t < piece.to; ++t) {
            const int row = tile_start(p.rows, tiles, t);
            with_rows(tile_start(p.rows, tiles, t + 1) - row, [&]<int ROWS>() {
                tile<Panels, ROWS>(p, weight + panel * panel_words, row, panel * PANEL, 0, p.inputs);
            });
        }
}

// Many rows: a tile stays in the innermost cache while the panels of the piece pass by from the next one.
template <class Panels>
inline void by_tiles(const Product& p, const typename Panels::Word* weight, int tiles, const Piece& piece) {
    const int64_t panel_words = static_cast<int64_t>(p.inputs) * Panels::WORDS;
    for (int k = 0; k < p.inputs; k += INPUTS_BLOCK) {
        const int end = k + INPUTS_BLOCK < p.inputs ? k + INPUTS_BLOCK : p.inputs;
        for (int t = piece.from; t < piece.to; ++t) {
            const int row = tile_start(p.rows, tiles, t);
            with_rows(tile_start(p.rows, tiles, t + 1) - row, [&]<int ROWS>() {
                for (int panel = piece.first; panel < piece.last; ++panel)
                    tile<Panels, ROWS>(p, weight + panel * panel_words, row, panel * PANEL, k, end);
            });
        }
    }
}

template <class Panels>
void multiply(Pool& pool, const Product& p, const typename Panels::Word* weight) {
    if (p.rows < 1 || p.outputs < 1) return;
    const int columns = panels(p.outputs);
    const int tiles = (p.rows + ROWS_TILE - 1) / ROWS_TILE;
    const bool many = tiles >= TILES_MANY;
    // Several items for each thread, so that one that is held up does not hold up the others.
    const int wanted = ITEMS_PER_THREAD * pool.threads();
    int group = columns > wanted ? columns / wanted : 1;
    if (many) group = columns < PANELS_GROUP ? columns : PANELS_GROUP;
    const int groups = (columns + group - 1) / group;
    int tile_group = tiles;
    while (groups * ((tiles + tile_group - 1) / tile_group) < wanted && tile_group > 2)
        tile_group = (tile_group + 1) / 2;
    const int tile_groups = (tiles + tile_group - 1) / tile_group;
    parallel(pool, groups * tile_groups, [&](int item) {
        const int panel = item % groups * group, t = item / groups * tile_group;
        const Piece piece{panel, panel + group < columns ? panel + group : columns, t,
                          t + tile_group < tiles ? t + tile_group : tiles};
        if (many)
            by_tiles<Panels>(p, weight, tiles, piece);
        else
            by_panels<Panels>(p, weight, tiles, piece);
    });
}

}  // namespace tokenloom
