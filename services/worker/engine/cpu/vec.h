// Sixteen floats at once, in the compilers' own vector types: one source for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace tokenloom {

constexpr int LANES = 16;

typedef float vf __attribute__((vector_size(64)));
typedef float vf_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint32_t vu_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef uint16_t vh_any __attribute__((vector_size(32), aligned(2), may_alias));

// A bfloat16 is the upper half of a float.
struct bf16 {
    uint16_t bits;
};

inline vf splat(float x) { return vf{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }

inline vf load(const bf16* p) {
    const vh half = *reinterpret_cast<const vh_any*>(p);
    return (vf)(__builtin_convertvector(half, vu) << 16);
}

// Rounds to nearest, ties to even; not-a-numbers stay so.
inline void store(bf16* p, vf x) {
    const vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    rounded = (x != x) ? ((bits >> 16) | 0x40) : rounded;
    *reinterpret_cast<vh_any*>(p) = __builtin_convertvector(rounded, vh);
}

inline float get(const float* p) { return *p; }
inline float get(const bf16* p) {
    const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    p->bits = x != x ? static_cast<uint16_t>(bits >> 16 | 0x40)
                     : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Each lane with its partner so many lanes away, in turn: the result stands in lane 0.
template <class F>
inline float across(vf x, F&& f) {
    x = f(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = f(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    x = f(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    x = f(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return x[0];
}

inline float sum(vf x) {
    return across(x, [](vf a, vf b) { return a + b; });
}

inline vf larger(vf a, vf b) { return a > b ? a : b; }
inline float largest(vf x) {
    return across(x, [](vf a, vf b) { return larger(a, b); });
}
inline vf smaller(vf a, vf b) { return a < b ? a : b; }

// e to the x within 2 units in the last place, 0 below -87: a power of two times a polynomial on
// [-ln 2 / 2, ln 2 / 2].
inline vf exp(vf x) {
    const vf bounded = larger(smaller(x, splat(88.0f)), splat(-87.3f));
    const vf shifted = bounded * 1.44269504088896341f + 12582912.0f;
    const vf n = shifted - 12582912.0f;
    const vf r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    vf y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    return x < -87.3f ? vf{} : y * (vf)power;
}

}  // namespace tokenloom
