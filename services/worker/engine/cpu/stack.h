// A run of plain decoder layers as one call: x [tokens, width] is what they read and what they leave.
//
// Plain: RMS norm, attention with rotary positions, residual, RMS norm, gated product, residual.
#pragma once

#include <optional>

#include "attention.h"
#include "elementwise.h"
#include "gemm.h"

namespace tokenloom {

struct Weight {
    const void* words;
    const float* bias;
    int64_t narrow, outputs, inputs;
};

struct LayerWeights {
    const float* before;
    Weight qkv;
    const float* query_norm;
    const float* key_norm;
    Weight o;
    const float* after;
    Weight gate_up, down;
    float* keys;
    float* values;
    int64_t window;
};

struct StackShape {
    int64_t layers, heads, kv_heads, dim, block_tokens, gate;
    float norm_eps, head_norm_eps, scale;
};

struct StackStep {
    int64_t tokens;
    const float* cosines;
    const float* sines;
    int64_t turned;
    const int64_t* slots;
    const int64_t* tables;
    int64_t table_stride;
    const Chunk* chunks;
    int64_t chunk_count;
};

inline void multiply(Pool& pool, const float* x, const Weight& w, float* out, int64_t rows, bool add) {
    const Product product{x,
                          w.inputs,
                          out,
                          w.outputs,
                          w.bias,
                          static_cast<int>(rows),
                          static_cast<int>(w.inputs),
                          static_cast<int>(w.outputs),
                          add};
    const Spent spent(pool, Pool::PRODUCTS);
    if (w.narrow)
        multiply<Panels16>(pool, product, static_cast<const uint32_t*>(w.words));
    else
        multiply<Panels32>(pool, product, static_cast<const float*>(w.words));
}

// Norms of query and key where the family has them, rotary positions, keys and values into the cache,
// for heads that lie as [tokens, heads + 2 · kv_heads, dim] behind one product.
template <class T>
void place(Pool& pool, T* qkv, const T* cosines, const T* sines, int turned, const T* query_norm,
           const T* key_norm, float eps, const int64_t* slots, int64_t tokens, int heads, const Cache<T>& cache) {
    const int dim = cache.dim;
    const int64_t stride = static_cast<int64_t>(heads + 2 * cache.kv_heads) * dim;
    const Fresh<T> fresh{qkv + heads * dim, stride, dim, qkv + (heads + cache.kv_heads) * dim, stride, dim, slots};
    each_row(pool, tokens, stride, [&](int64_t token) {
        for (int head = 0; head < heads + cache.kv_heads; ++head) {
            T* x = qkv + token * stride + static_cast<int64_t>(head) * dim;
            const T* norm = head < heads ? query_norm : key_norm;
            if (norm) normalise(x, norm, eps, x, dim);
            rotate(x, cosines + token * turned, sines + token * turned, turned);
        }
        remember(cache, fresh, token);
    });
}

// `space`: tokens · (width + qkv outputs + heads · dim + 3 · inner) floats.
inline void run_layer(Pool& pool, const StackShape& s, const LayerWeights& l, const StackStep& step, float* x,
                      float* space) {
    const int64_t tokens = step.tokens;
    const int width = static_cast<int>(l.qkv.inputs), inner = static_cast<int>(l.down.inputs);
    const int heads = static_cast<int>(s.heads), dim = static_cast<int>(s.dim);
    float* normed = space;
    float* qkv = normed + tokens * width;
    float* mixed = qkv + tokens * l.qkv.outputs;
    float* both = mixed + tokens * heads * dim;
    float* gated_rows = both + tokens * 2 * inner;
    const Cache<float> cache{l.keys, l.values, static_cast<int>(s.kv_heads), dim, static_cast<int>(s.block_tokens)};
    const auto norm = [&](const float* weight) {
        const Spent spent(pool, Pool::NORMS);
        each_row(pool, tokens, width, [&](int64_t row) {
            normalise(x + row * width, weight, s.norm_eps, normed + row * width, width);
        });
    };
    norm(l.before);
    multiply(pool, normed, l.qkv, qkv, tokens, false);
    std::optional<Spent> spent(std::in_place, pool, Pool::PLACE);
    place(pool, qkv, step.cosines, step.sines, static_cast<int>(step.turned), l.query_norm, l.key_norm,
          s.head_norm_eps, step.slots, tokens, heads, cache);
    spent.emplace(pool, Pool::ATTENTION);
    attend(pool, Attention<float>{cache, qkv, l.qkv.outputs, dim, mixed, step.tables, step.table_stride, step.chunks,
                                  static_cast<int>(step.chunk_count), heads, static_cast<int>(l.window), s.scale,
                                  0.0f});
    spent.reset();
    multiply(pool, mixed, l.o, x, tokens, true);
    norm(l.after);
    multiply(pool, normed, l.gate_up, both, tokens, false);
    spent.emplace(pool, Pool::GATES);
    each_row(pool, tokens, 4 * inner, [&](int64_t row) {
        gate_row(both + row * 2 * inner, gated_rows + row * inner, inner, static_cast<int>(s.gate));
    });
    spent.reset();
    multiply(pool, gated_rows, l.down, x, tokens, true);
}

}  // namespace tokenloom
