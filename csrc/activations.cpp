// Statistics of activations on the CPU: sums over a residual stream that its moments, channel sizes, outliers and token
// similarities are made of, and the number of neurons that are not zero.
//
// Activations are float32 (type 0) or bfloat16 (type 1), contiguous; sums are float64, and made in one order whatever
// the number of threads. Plain C functions on plain pointers: the library depends on neither Python nor torch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include "elements.h"

namespace {

typedef double Doubles __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(32)));

constexpr int64_t LANES = 8;  // sums that are made side by side, so that none waits for the one before it

inline Doubles doubled(Floats vector) {
#if defined(__AVX512BW__)
    return (Doubles)_mm512_cvtps_pd((__m256)vector);  // one instruction, of which GCC makes four
#else
    return __builtin_convertvector(vector, Doubles);
#endif
}

// Eight numbers as float64.
inline Doubles load(const float* from) {
    Floats vector;
    std::memcpy(&vector, from, sizeof vector);
    return doubled(vector);
}

inline Doubles load(const bfloat16* from) {
    Halves vector;
    std::memcpy(&vector, from, sizeof vector);
    return doubled((Floats)(__builtin_convertvector(vector, Words) << 16));
}

inline Doubles load(const double* from) {
    Doubles vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

inline void store(double* to, Doubles vector) { std::memcpy(to, &vector, sizeof vector); }

inline double sum(Doubles x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// The magnitudes of a token, as numbers that rise with them: the bits of a float without its sign do. Their upper halves,
// in which most magnitudes differ, are looked through first: twice as many of them fit a vector.
struct Magnitudes {
    std::vector<uint16_t> upper, lower;
    uint32_t largest = 0;
    int64_t last = 0;  // the upper half of the last token's median, to which the next one's is near

    static constexpr int64_t GROUP = 32;  // numbers that are looked at together

    explicit Magnitudes(int64_t d) : upper(d), lower(d) {}

    void read(const float* x) {
        largest = 0;
        for (size_t i = 0; i < upper.size(); ++i) {
            uint32_t bits;
            std::memcpy(&bits, x + i, sizeof bits);
            bits &= 0x7fffffffu;
            upper[i] = static_cast<uint16_t>(bits >> 16);
            largest = bits > largest ? bits : largest;
        }
    }

    void read(const bfloat16* x) {
        uint16_t most = 0;
        for (size_t i = 0; i < upper.size(); ++i) {
            upper[i] = x[i].bits & 0x7fffu;
            most = upper[i] > most ? upper[i] : most;
        }
        largest = static_cast<uint32_t>(most) << 16;
    }

#if defined(__AVX512BW__)
    int64_t upper_below(uint16_t limit) const {
        const int64_t d = upper.size();
        const __m512i limits = _mm512_set1_epi16(static_cast<int16_t>(limit));
        int64_t count = 0;
        for (int64_t i = 0; i < d; i += GROUP) {
            const __mmask32 some = d - i < GROUP ? (1u << (d - i)) - 1 : ~0u;
            const __m512i group = _mm512_maskz_loadu_epi16(some, upper.data() + i);
            count += __builtin_popcount(_mm512_mask_cmplt_epu16_mask(some, group, limits));
        }
        return count;
    }

    bool holds(int64_t start, uint16_t half) const {
        const __m512i group = _mm512_loadu_si512(upper.data() + start);
        return _mm512_cmpeq_epi16_mask(group, _mm512_set1_epi16(static_cast<int16_t>(half))) != 0;
    }
#else
    int64_t upper_below(uint16_t limit) const {
        constexpr int64_t BLOCK = 1 << 14;  // what a counter as small as the numbers, which vectors are made of, can hold
        const int64_t d = upper.size();
        int64_t count = 0;
        for (int64_t start = 0; start < d; start += BLOCK) {
            const int64_t stop = start + BLOCK < d ? start + BLOCK : d;
            uint16_t here = 0;
            for (int64_t i = start; i < stop; ++i) here += upper[i] < limit;
            count += here;
        }
        return count;
    }

    bool holds(int64_t start, uint16_t half) const {
        uint16_t any = 0;
        for (int64_t i = start; i < start + GROUP; ++i) any |= upper[i] == half;
        return any != 0;
    }
#endif

    // The median, of an even number of magnitudes the lower of the two in the middle.
    uint32_t median(const float* x) {
        int64_t rank = (static_cast<int64_t>(upper.size()) - 1) / 2;
        const uint16_t half = upper_of_rank(rank);
        int64_t n = 0;
        const int64_t d = upper.size();
        for (int64_t start = 0; start < d; start += GROUP) {
            const int64_t stop = start + GROUP < d ? start + GROUP : d;
            if (stop - start == GROUP && !holds(start, half)) continue;
            for (int64_t i = start; i < stop; ++i) {
                uint32_t bits;
                std::memcpy(&bits, x + i, sizeof bits);
                lower[n] = static_cast<uint16_t>(bits);
                n += upper[i] == half;
            }
        }
        std::nth_element(lower.begin(), lower.begin() + rank, lower.begin() + n);
        return static_cast<uint32_t>(half) << 16 | lower[rank];
    }

    uint32_t median(const bfloat16*) {
        int64_t rank = (static_cast<int64_t>(upper.size()) - 1) / 2;
        return static_cast<uint32_t>(upper_of_rank(rank)) << 16;
    }

    // The upper half that `rank` of them are before in order; `rank` becomes its rank among those that are alike.
    uint16_t upper_of_rank(int64_t& rank) {
        // low: at most rank are below it; high: more are
        int64_t low = 0, high = (largest >> 16) + 1, below = 0, step = 8;
        for (int64_t limit = last - step; 0 < limit && limit < high; limit -= step *= 4) {
            const int64_t count = upper_below(static_cast<uint16_t>(limit));
            if (count <= rank) {
                low = limit, below = count;
                break;
            }
            high = limit;
        }
        for (int64_t limit = low + 2 * step; limit < high; limit += step *= 4) {
            const int64_t count = upper_below(static_cast<uint16_t>(limit));
            if (count > rank) {
                high = limit;
                break;
            }
            low = limit, below = count;
        }
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2, count = upper_below(static_cast<uint16_t>(middle));
            if (count <= rank)
                low = middle, below = count;
            else
                high = middle;
        }
        rank -= below;
        last = low;
        return static_cast<uint16_t>(low);
    }
};

inline double as_number(uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

struct Sums {
    double total = 0, direction = 0, ratio = 0, m2 = 0, m3 = 0, m4 = 0;
    int64_t nan = 0, inf = 0;
};

// Of the tokens x [T, d] of one sequence: Σ x, Σ x² by channel, |Σ x / |x||², Σ max |x| / median |x|, and the numbers
// that are not finite.
template <class T>
void add_sequence(const T* x, int64_t n_token, int64_t d, double* channel_squares, Sums& sums) {
    const int64_t whole = d / LANES * LANES;
    std::vector<double> direction(d);
    Magnitudes magnitudes(d);
    for (int64_t t = 0; t < n_token; ++t, x += d) {
        Doubles totals = {}, squares = {};
        for (int64_t i = 0; i < whole; i += LANES) {
            const Doubles value = load(x + i), square = value * value;
            totals += value;
            squares += square;
            store(channel_squares + i, load(channel_squares + i) + square);
        }
        double total = sum(totals), norm_squared = sum(squares);
        for (int64_t i = whole; i < d; ++i) {
            const double value = widen(x[i]), square = value * value;
            total += value;
            norm_squared += square;
            channel_squares[i] += square;
        }
        sums.total += total;
        magnitudes.read(x);
        sums.ratio += as_number(magnitudes.largest) / as_number(magnitudes.median(x));
        const double inverse_norm = 1 / std::sqrt(norm_squared);
        for (int64_t i = 0; i < whole; i += LANES)
            store(direction.data() + i, load(direction.data() + i) + load(x + i) * inverse_norm);
        for (int64_t i = whole; i < d; ++i) direction[i] += widen(x[i]) * inverse_norm;
        if (!std::isfinite(norm_squared))
            for (int64_t i = 0; i < d; ++i) {
                sums.nan += std::isnan(widen(x[i]));
                sums.inf += std::isinf(widen(x[i]));
            }
    }
    for (const double each : direction) sums.direction += each * each;
}

template <class T>
void add_moments(const T* x, int64_t n, double mean, Sums& sums) {
    const int64_t whole = n / LANES * LANES, pairs = n / (2 * LANES) * (2 * LANES);
    Doubles m2[2] = {}, m3[2] = {}, m4[2] = {};
    const auto add = [&](int64_t i, int which) {
        const Doubles deviation = load(x + i) - mean, square = deviation * deviation;
        m2[which] += square;
        m3[which] += square * deviation;
        m4[which] += square * square;
    };
    for (int64_t i = 0; i < pairs; i += 2 * LANES) add(i, 0), add(i + LANES, 1);  // no sum waits for the one before it
    if (pairs < whole) add(pairs, 0);
    sums.m2 = sum(m2[0] + m2[1]), sums.m3 = sum(m3[0] + m3[1]), sums.m4 = sum(m4[0] + m4[1]);
    for (int64_t i = whole; i < n; ++i) {
        const double deviation = widen(x[i]) - mean, square = deviation * deviation;
        sums.m2 += square;
        sums.m3 += square * deviation;
        sums.m4 += square * square;
    }
}

template <class T>
void stream_sums(const T* x, int64_t n_sequence, int64_t n_token, int64_t d, double* to, int threads) {
    const int64_t size = n_token * d;
    std::vector<Sums> sums(n_sequence);
    std::vector<double> squares(n_sequence * d);
    double mean = 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t i = 0; i < n_sequence; ++i)
            add_sequence(x + i * size, n_token, d, squares.data() + i * d, sums[i]);
#pragma omp single
        {
            for (const Sums& each : sums) mean += each.total;
            mean /= n_sequence * size;
        }
#pragma omp for
        for (int64_t i = 0; i < n_sequence; ++i) add_moments(x + i * size, size, mean, sums[i]);
    }
    Sums all;
    for (const Sums& each : sums) {
        all.direction += each.direction, all.ratio += each.ratio;
        all.m2 += each.m2, all.m3 += each.m3, all.m4 += each.m4;
        all.nan += each.nan, all.inf += each.inf;
    }
    const double n_pair = static_cast<double>(n_token) * (n_token - 1);
    const double similarities = n_pair > 0 ? (all.direction - n_sequence * n_token) / n_pair : NAN;
    for (const double each : {double(n_sequence), double(n_sequence * n_token), all.ratio, similarities, double(all.nan),
                              double(all.inf), double(n_sequence * size), mean, all.m2, all.m3, all.m4})
        *to++ = each;
    for (int64_t j = 0; j < d; ++j) {
        to[j] = 0;
        for (int64_t i = 0; i < n_sequence; ++i) to[j] += squares[i * d + j];
    }
}

// How many of the floats with these bits are not zero; -1 where one is not finite. Small counters, of the numbers' own
// size, are what compilers make vectors of.
template <class Bits>
int64_t count_nonzero(const Bits* x, int64_t n, Bits exponent, int threads) {
    constexpr int64_t BLOCK = 1 << 14;
    int64_t count = 0, bad = 0;
#pragma omp parallel for reduction(+ : count, bad) num_threads(threads)
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t stop = start + BLOCK < n ? start + BLOCK : n;
        Bits here = 0, bad_here = 0;
        for (int64_t i = start; i < stop; ++i) {
            here += static_cast<Bits>(x[i] << 1) != 0;
            bad_here |= (x[i] & exponent) == exponent;
        }
        count += here;
        bad += bad_here;
    }
    return bad ? -1 : count;
}

}  // namespace

// What the functions below take: one more for each change of it. Python compares it with its own number.
EXPORT int normfree_interface() { return 2; }

// Of x [n_sequence, n_token, d], 11 + d sums: n_sequence, n_sequence · n_token, Σ over tokens of max |x| / median |x| (any
// number after a token with a NaN), Σ over sequences of the mean cosine between two different tokens, the numbers of NaN
// and of infinite entries, the number of all, their mean μ, Σ (x - μ)^p for p = 2, 3, 4, and Σ x² of each channel.
EXPORT void normfree_stream_sums(int type, const void* x, int64_t n_sequence, int64_t n_token, int64_t d, double* sums,
                                 int threads) {
    const auto run = [&](auto element) {
        stream_sums(static_cast<const decltype(element)*>(x), n_sequence, n_token, d, sums, threads);
    };
    type == 0 ? run(float()) : run(bfloat16());
}

// How many of n numbers are not zero; -1 where one is not finite.
EXPORT int64_t normfree_count_nonzero(int type, const void* x, int64_t n, int threads) {
    if (type == 0) return count_nonzero<uint32_t>(static_cast<const uint32_t*>(x), n, 0x7f800000u, threads);
    return count_nonzero<uint16_t>(static_cast<const uint16_t*>(x), n, 0x7f80u, threads);
}
