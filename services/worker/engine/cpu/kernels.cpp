// The C interface of the CPU kernels, as library.py calls it. Every pointer is to contiguous memory
// unless strides come with it; strides count elements. What does not fit is the caller's to refuse.
#include "attention.h"
#include "elementwise.h"
#include "gemm.h"
#include "pool.h"
#include "stack.h"
#include "vec.h"

using namespace tokenloom;

extern "C" {

int tl_version() { return 5; }
// `team`: null, or GOMP_parallel.
void* tl_pool_new(int threads, void* team) { return new Pool(threads, reinterpret_cast<Team>(team)); }
void tl_spent(void* pool, int64_t* ns) {
    for (int part = 0; part < Pool::PARTS; ++part) ns[part] = static_cast<Pool*>(pool)->spent_ns[part];
}
void tl_pool_free(void* pool) { delete static_cast<Pool*>(pool); }

// [outputs, inputs] bfloat16 to panels(outputs) · inputs · 16 words.
void tl_pack16(const uint16_t* weight, int outputs, int inputs, uint32_t* words) {
    for (int panel = 0; panel < panels(outputs); ++panel)
        for (int k = 0; k < inputs; ++k)
            for (int lane = 0; lane < LANES; ++lane) {
                const int a = panel * PANEL + lane, b = a + LANES;
                const uint32_t low = a < outputs ? weight[static_cast<int64_t>(a) * inputs + k] : 0;
                const uint32_t high = b < outputs ? weight[static_cast<int64_t>(b) * inputs + k] : 0;
                *words++ = low | high << 16;
            }
}

// [outputs, inputs] float32 to panels(outputs) · inputs · 32 floats.
void tl_pack32(const float* weight, int outputs, int inputs, float* words) {
    for (int panel = 0; panel < panels(outputs); ++panel)
        for (int k = 0; k < inputs; ++k)
            for (int lane = 0; lane < PANEL; ++lane) {
                const int column = panel * PANEL + lane;
                *words++ = column < outputs ? weight[static_cast<int64_t>(column) * inputs + k] : 0.0f;
            }
}

void tl_linear(void* pool, const float* x, const void* weight, int narrow, const float* bias, float* out, int rows,
               int inputs, int outputs, int add) {
    const Product product{x, inputs, out, outputs, bias, rows, inputs, outputs, add != 0};
    const Spent spent(*static_cast<Pool*>(pool), Pool::SINGLE_PRODUCTS);
    if (narrow)
        multiply<Panels16>(*static_cast<Pool*>(pool), product, static_cast<const uint32_t*>(weight));
    else
        multiply<Panels32>(*static_cast<Pool*>(pool), product, static_cast<const float*>(weight));
}

void tl_stack(void* pool, const StackShape* shape, const LayerWeights* layers, const StackStep* step, float* x,
              float* space) {
    for (int64_t layer = 0; layer < shape->layers; ++layer)
        run_layer(*static_cast<Pool*>(pool), *shape, layers[layer], *step, x, space);
}

#define TYPED(T, NAME)                                                                                              \
    void tl_norm_##NAME(void* pool, const T* x, const T* weight, float eps, T* out, int64_t rows, int width) {       \
        each_row(*static_cast<Pool*>(pool), rows, width,                                                            \
                 [&](int64_t row) { normalise(x + row * width, weight, eps, out + row * width, width); });          \
    }                                                                                                               \
    void tl_gate_##NAME(void* pool, const T* both, T* out, int64_t rows, int width, int gate) {                      \
        each_row(*static_cast<Pool*>(pool), rows, 4 * width,                                                        \
                 [&](int64_t row) { gate_row(both + row * 2 * width, out + row * width, width, gate); });           \
    }                                                                                                               \
    void tl_place_##NAME(void* pool, T* qkv, const T* cosines, const T* sines, int turned, const T* query_norm,      \
                         const T* key_norm, float eps, const int64_t* slots, int64_t tokens, int heads, T* keys,    \
                         T* values, int kv_heads, int dim, int block_tokens) {                                      \
        place(*static_cast<Pool*>(pool), qkv, cosines, sines, turned, query_norm, key_norm, eps, slots, tokens,     \
              heads, Cache<T>{keys, values, kv_heads, dim, block_tokens});                                          \
    }                                                                                                               \
    void tl_store_##NAME(void* pool, const T* new_keys, int64_t key_token, int64_t key_head, const T* new_values,    \
                         int64_t value_token, int64_t value_head, const int64_t* slots, int64_t tokens, T* keys,    \
                         T* values, int kv_heads, int dim, int block_tokens) {                                      \
        const Cache<T> cache{keys, values, kv_heads, dim, block_tokens};                                            \
        const Fresh<T> fresh{new_keys, key_token, key_head, new_values, value_token, value_head, slots};            \
        each_row(*static_cast<Pool*>(pool), tokens, 2 * kv_heads * dim,                                             \
                 [&](int64_t token) { remember(cache, fresh, token); });                                            \
    }                                                                                                               \
    void tl_attend_##NAME(void* pool, const T* query, int64_t token_stride, int64_t head_stride, T* out,             \
                          const int64_t* tables, int64_t table_stride, const Chunk* chunks, int chunk_count,        \
                          int heads, int window, float scale, float softcap, T* keys, T* values, int kv_heads,      \
                          int dim, int block_tokens) {                                                              \
        attend(*static_cast<Pool*>(pool),                                                                           \
               Attention<T>{Cache<T>{keys, values, kv_heads, dim, block_tokens}, query, token_stride, head_stride,  \
                            out, tables, table_stride, chunks, chunk_count, heads, window, scale, softcap});        \
    }

TYPED(float, f32)
TYPED(bf16, bf16)
#undef TYPED

}  // extern "C"
