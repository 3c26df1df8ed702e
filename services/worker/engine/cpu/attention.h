// Attention over a paged cache, read where it lies: no block is gathered, no head repeated.
//
// Layout of one layer, T being float or bf16; `lanes` is block_tokens and `width` is dim, each rounded
// up to 16:
//   keys   [blocks, kv_heads, dim, lanes]           sixteen tokens side by side, for products with a query
//   values [blocks, kv_heads, block_tokens, width]
// One item of work is a few tokens of one chunk and one head of keys: the query heads of the group are
// its rows, so keys and values are read once for all of them. The softmax runs along with the tokens
// (Dao et al., FlashAttention, 2022). A decode is a chunk of one token.
#pragma once

#include "gemm.h"
#include "pool.h"
#include "vec.h"

namespace tokenloom {

constexpr int DIM_MAX = 256;
constexpr int ITEM_ROWS_MAX = 4 * ROWS_TILE;
constexpr int STRIDE_VECTORS = 8;  // 128 tokens between two corrections of the softmax
constexpr float NOTHING = -1e30f;

inline int padded(int count) { return (count + LANES - 1) / LANES * LANES; }

template <class T>
struct Cache {
    T* keys;
    T* values;
    int kv_heads, dim, block_tokens;

    int lanes() const { return padded(block_tokens); }
    int width() const { return padded(dim); }
    T* key(int64_t block, int head) const {
        return keys + (block * kv_heads + head) * dim * lanes();
    }
    T* value(int64_t block, int head) const {
        return values + (block * kv_heads + head) * block_tokens * width();
    }
};

struct Chunk {
    int64_t row, count, position, table;
};

template <class T>
struct Attention {
    Cache<T> cache;
    const T* query;
    int64_t token_stride, head_stride;
    T* out;  // [tokens, heads, dim]
    const int64_t* tables;
    int64_t table_stride;
    const Chunk* chunks;
    int chunk_count, heads, window;
    float scale, softcap;
};

// Up to 128 tokens of one sequence, in vectors of 16.
template <class T>
struct Stride {
    const T* keys[STRIDE_VECTORS + 3];  // past `count` the last one again, for whoever reads in fours
    const T* values[STRIDE_VECTORS];
    int64_t token[STRIDE_VECTORS];
    int count = 0;
    int valid[STRIDE_VECTORS];
};

template <class T>
inline void find(const Attention<T>& a, const int64_t* table, int head, int64_t vector, int64_t end, int64_t last,
                 Stride<T>& s) {
    const Cache<T>& c = a.cache;
    const int vectors = c.lanes() / LANES;
    s.count = static_cast<int>(end - vector < STRIDE_VECTORS ? end - vector : STRIDE_VECTORS);
    for (int j = 0; j < s.count; ++j) {
        const int64_t index = (vector + j) / vectors;
        const int offset = static_cast<int>((vector + j) % vectors) * LANES;
        const int64_t block = table[index];
        s.keys[j] = c.key(block, head) + offset;
        s.values[j] = c.value(block, head) + static_cast<int64_t>(offset) * c.width();
        s.token[j] = index * c.block_tokens + offset;
        const int64_t held = c.block_tokens - offset, seen = last + 1 - s.token[j];
        const int64_t valid = held < seen ? held : seen;
        s.valid[j] = static_cast<int>(valid < 0 ? 0 : valid > LANES ? LANES : valid);
    }
    for (int j = s.count; j < s.count + 3; ++j) s.keys[j] = s.keys[s.count - 1];
}

// Few rows leave registers for more vectors at once, which hides how long each sum takes.
template <int ROWS>
constexpr int vectors_at_once() {
    return 2 * ROWS <= ROWS_TILE ? 4 : 2;
}

template <class T, int ROWS>
inline void score(const Stride<T>& s, int dim, int lanes, const float* query, float* scores) {
    constexpr int VECTORS = vectors_at_once<ROWS>();
    for (int j = 0; j < s.count; j += VECTORS) {
        vf sums[ROWS][VECTORS];
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = vf{};
        for (int d = 0; d < dim; ++d) {
            vf keys[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) keys[v] = load(s.keys[j + v] + static_cast<int64_t>(d) * lanes);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
                const vf value = splat(query[r * dim + d]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) sums[r][v] += value * keys[v];
            }
        }
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS && j + v < s.count; ++v)
                store(scores + (r * STRIDE_VECTORS + j + v) * LANES, sums[r][v]);
    }
}

template <class T, int ROWS, int VECTORS>
inline void mix(const Stride<T>& s, int width, int column, const float* weights, float* sums) {
    vf mixed[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) mixed[r][v] = load(sums + r * width + column + v * LANES);
    for (int j = 0; j < s.count; ++j) {
        const T* value = s.values[j] + column;
        for (int t = 0; t < s.valid[j]; ++t, value += width) {
            vf values[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) values[v] = load(value + v * LANES);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
                const vf weight = splat(weights[(r * STRIDE_VECTORS + j) * LANES + t]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) mixed[r][v] += weight * values[v];
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) store(sums + r * width + column + v * LANES, mixed[r][v]);
}

// Rows of one item: query [rows, dim] already scaled, sums [rows, width], the running maximum and total.
struct Rows {
    float query[ITEM_ROWS_MAX * DIM_MAX];
    float sums[ITEM_ROWS_MAX * DIM_MAX];
    float peak[ITEM_ROWS_MAX];
    float total[ITEM_ROWS_MAX];
    int64_t position[ITEM_ROWS_MAX];
};

inline vi lane_numbers() { return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// Scores of one row become weights; returns what the sums so far are to be multiplied with.
template <class T>
inline float weigh(const Attention<T>& a, const Stride<T>& s, int64_t position, float* scores, float& peak,
                   float& total) {
    vf top = splat(NOTHING);
    for (int j = 0; j < s.count; ++j) {
        vf x = load(scores + j * LANES);
        if (a.softcap > 0) {
            const vf e = exp(x * (2.0f / a.softcap));
            x = (1.0f - 2.0f / (e + 1.0f)) * a.softcap;
        }
        const int64_t after = position + 1 - s.token[j];
        const int64_t before = a.window ? position - a.window + 1 - s.token[j] : 0;
        if (after < LANES || s.valid[j] < LANES || before > 0) {
            const int end = static_cast<int>(after < 0 ? 0 : after < s.valid[j] ? after : s.valid[j]);
            const int begin = static_cast<int>(before < 0 ? 0 : before < LANES ? before : LANES);
            const vi lane = lane_numbers();
            x = ((lane < end) & (lane >= begin)) ? x : splat(NOTHING);
        }
        store(scores + j * LANES, x);
        top = larger(top, x);
    }
    const float top_score = largest(top), highest = top_score > peak ? top_score : peak;
    vf sums = vf{};
    for (int j = 0; j < s.count; ++j) {
        const vf x = load(scores + j * LANES);
        const vf weight = x <= NOTHING ? vf{} : exp(x - highest);
        store(scores + j * LANES, weight);
        sums += weight;
    }
    const float kept = peak <= NOTHING ? 0.0f : exp(splat(peak - highest))[0];
    total = total * kept + sum(sums);
    peak = highest;
    return kept;
}

template <class T, int ROWS>
inline void advance(const Attention<T>& a, const Stride<T>& s, Rows& rows, int first) {
    float scores[ROWS * STRIDE_VECTORS * LANES];
    const int dim = a.cache.dim, width = a.cache.width();
    score<T, ROWS>(s, dim, a.cache.lanes(), rows.query + first * dim, scores);
    float* sums = rows.sums + first * width;
    for (int r = 0; r < ROWS; ++r) {
        const int row = first + r;
        const float kept = weigh(a, s, rows.position[row], scores + r * STRIDE_VECTORS * LANES, rows.peak[row],
                                 rows.total[row]);
        if (kept != 1.0f)
            for (int d = 0; d < width; d += LANES) store(sums + r * width + d, load(sums + r * width + d) * kept);
    }
    constexpr int VECTORS = vectors_at_once<ROWS>();
    int column = 0;
    for (; column + VECTORS * LANES <= width; column += VECTORS * LANES)
        mix<T, ROWS, VECTORS>(s, width, column, scores, sums);
    for (; column < width; column += LANES) mix<T, ROWS, 1>(s, width, column, scores, sums);
}

template <class From, class To>
inline void scale(const From* from, float factor, To* to, int count) {
    int d = 0;
    for (; d + LANES <= count; d += LANES) store(to + d, load(from + d) * factor);
    for (; d < count; ++d) put(to + d, get(from + d) * factor);
}

template <class T>
inline void attend_item(const Attention<T>& a, const Chunk& chunk, int64_t token, int tokens, int head) {
    const int group = a.heads / a.cache.kv_heads, dim = a.cache.dim, width = a.cache.width();
    const int count = tokens * group;
    static thread_local Rows rows;
    for (int r = 0; r < count; ++r) {
        const T* query = a.query + (chunk.row + token + r / group) * a.token_stride +
                         static_cast<int64_t>(head * group + r % group) * a.head_stride;
        scale(query, a.scale, rows.query + r * dim, dim);
        for (int d = 0; d < width; d += LANES) store(rows.sums + r * width + d, vf{});
        rows.peak[r] = NOTHING;
        rows.total[r] = 0;
        rows.position[r] = chunk.position + token + r / group;
    }
    const int64_t first = rows.position[0], last = rows.position[count - 1];
    const int vectors = a.cache.lanes() / LANES, size = a.cache.block_tokens;
    const int64_t begin = a.window && first >= a.window ? (first - a.window + 1) / size * vectors : 0;
    const int64_t end = last / size * vectors + last % size / LANES + 1;
    Stride<T> stride;
    for (int64_t vector = begin; vector < end; vector += STRIDE_VECTORS) {
        find(a, a.tables + chunk.table * a.table_stride, head, vector, end, last, stride);
        for (int row = 0; row < count; row += ROWS_TILE)
            with_rows(count - row < ROWS_TILE ? count - row : ROWS_TILE,
                      [&]<int ROWS>() { advance<T, ROWS>(a, stride, rows, row); });
    }
    for (int r = 0; r < count; ++r) {
        T* out = a.out + ((chunk.row + token + r / group) * a.heads + head * group + r % group) * dim;
        scale(rows.sums + r * width, 1.0f / rows.total[r], out, dim);
    }
}

template <class T>
void attend(Pool& pool, const Attention<T>& a) {
    const int kv_heads = a.cache.kv_heads, group = a.heads / kv_heads;
    const int tokens = group < ITEM_ROWS_MAX ? ITEM_ROWS_MAX / group : 1;
    // Item numbers of each chunk follow those of the one before it.
    static thread_local std::vector<int> ends;
    ends.clear();
    int items = 0;
    for (int c = 0; c < a.chunk_count; ++c) {
        items += static_cast<int>((a.chunks[c].count + tokens - 1) / tokens) * kv_heads;
        ends.push_back(items);
    }
    const int* found = ends.data();
    parallel(pool, items, [&](int item) {
        // The last tokens of a prompt see the most: they are begun first.
        item = items - 1 - item;
        int c = 0;
        while (found[c] <= item) ++c;
        const int inner = item - (c ? found[c - 1] : 0);
        const Chunk& chunk = a.chunks[c];
        const int64_t token = static_cast<int64_t>(inner / kv_heads) * tokens;
        const int64_t left = chunk.count - token;
        attend_item(a, chunk, token, static_cast<int>(left < tokens ? left : tokens), inner % kv_heads);
    });
}

// Keys and values [tokens, kv_heads, dim] of these strides, to slots (block · block_tokens + offset).
template <class T>
struct Fresh {
    const T* keys;
    int64_t key_token_stride, key_head_stride;
    const T* values;
    int64_t value_token_stride, value_head_stride;
    const int64_t* slots;
};

template <class T>
inline void remember(const Cache<T>& cache, const Fresh<T>& fresh, int64_t token) {
    const int64_t block = fresh.slots[token] / cache.block_tokens;
    const int offset = static_cast<int>(fresh.slots[token] % cache.block_tokens);
    const int lanes = cache.lanes();
    for (int head = 0; head < cache.kv_heads; ++head) {
        const T* key = fresh.keys + token * fresh.key_token_stride + head * fresh.key_head_stride;
        const T* value = fresh.values + token * fresh.value_token_stride + head * fresh.value_head_stride;
        T* keys = cache.key(block, head) + offset;
        T* values = cache.value(block, head) + static_cast<int64_t>(offset) * cache.width();
        for (int d = 0; d < cache.dim; ++d) keys[static_cast<int64_t>(d) * lanes] = key[d];
        for (int d = 0; d < cache.dim; ++d) values[d] = value[d];
    }
}

}  // namespace tokenloom
