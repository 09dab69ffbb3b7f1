// Vectors of float32 as wide as the CPU's own, loads and stores of them, and e^x.
//
// They are those of GCC and Clang, so one source serves AVX-512, AVX2, NEON and machines without any.

#pragma once

#include <cstdint>
#include <cstring>

#include "elements.h"

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));

constexpr int64_t LANES = VECTOR_BYTES / sizeof(float);
constexpr float SMALLEST_EXPONENT = -87.0f;  // e^x below is no normal number, and nothing beside the largest term, 1

inline Floats load(const float* from) {
    Floats vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

inline Floats load(const bfloat16* from) {
    Halves vector;
    std::memcpy(&vector, from, sizeof vector);
    return (Floats)(__builtin_convertvector(vector, Words) << 16);
}

inline void store(float* to, Floats vector) { std::memcpy(to, &vector, sizeof vector); }

// To the nearest bfloat16, of two as near the even one; NaN stays NaN.
inline void store(bfloat16* to, Floats vector) {
    const Words bits = (Words)vector, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Halves halves = __builtin_convertvector(vector == vector ? rounded : Words{} + 0x7fc0, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

inline void put(float* to, float x) { *to = x; }

inline void put(bfloat16* to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to->bits = x == x ? static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// A vector folded onto one half of itself again and again, until one number is left.
template <int BYTES>
struct Vector {
    typedef float Type __attribute__((vector_size(BYTES)));
};

template <int BYTES, class Fold>
inline float folded(typename Vector<BYTES>::Type x, Fold fold) {
    if constexpr (BYTES == 2 * sizeof(float)) {
        return fold(x[0], x[1]);
    } else {
        typename Vector<BYTES / 2>::Type halves[2];
        std::memcpy(halves, &x, sizeof x);
        return folded<BYTES / 2>(fold(halves[0], halves[1]), fold);
    }
}

inline float sum(Floats x) {
    return folded<VECTOR_BYTES>(x, [](auto a, auto b) { return a + b; });
}

inline float largest(Floats x) {
    return folded<VECTOR_BYTES>(x, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x for x in [-87, 0], within 2 units in the last place: 2^n times a polynomial in x - n ln 2 (of Cephes).
inline Floats exponential(Floats x) {
    constexpr float ROUNDS = 12582912.0f;  // 1.5 · 2²³: what is added to it is rounded to a whole number
    const Floats shifted = x * 1.44269504088896341f + ROUNDS;
    const Floats n = shifted - ROUNDS;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Ints exponent = ((Ints)shifted << 23);  // the last bits of `shifted` are those of n
    return (Floats)((Ints)p + exponent);
}

}  // namespace
