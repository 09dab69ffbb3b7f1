// Statistics of activations on the CPU: sums over a residual stream that its moments, channel sizes and token
// similarities are made of, and the number of neurons that are not zero.
//
// Activations are float32 (type 0) or bfloat16 (type 1), contiguous; sums are float64, and made in one order whatever
// the number of threads. Plain C functions on plain pointers: the library depends on neither Python nor torch.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "elements.h"

namespace {

typedef double Doubles __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(32)));

constexpr int64_t LANES = 8;  // sums that are made side by side, so that none waits for the one before it

// Eight numbers as float64.
inline Doubles load(const float* from) {
    Floats vector;
    std::memcpy(&vector, from, sizeof vector);
    return __builtin_convertvector(vector, Doubles);
}

inline Doubles load(const bfloat16* from) {
    Halves vector;
    std::memcpy(&vector, from, sizeof vector);
    return __builtin_convertvector((Floats)(__builtin_convertvector(vector, Words) << 16), Doubles);
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

struct Sums {
    double total = 0, direction = 0, m2 = 0, m3 = 0, m4 = 0;
    int64_t nan = 0, inf = 0;
};

// Of the tokens x [T, d] of one sequence: Σ x, Σ x² by channel, |Σ x / |x||², and the numbers that are not finite.
template <class T>
void add_sequence(const T* x, int64_t n_token, int64_t d, double* channel_squares, Sums& sums) {
    const int64_t whole = d / LANES * LANES;
    std::vector<double> direction(d);
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
    const int64_t whole = n / LANES * LANES;
    Doubles m2 = {}, m3 = {}, m4 = {};
    for (int64_t i = 0; i < whole; i += LANES) {
        const Doubles deviation = load(x + i) - mean, square = deviation * deviation;
        m2 += square;
        m3 += square * deviation;
        m4 += square * square;
    }
    sums.m2 = sum(m2), sums.m3 = sum(m3), sums.m4 = sum(m4);
    for (int64_t i = whole; i < n; ++i) {
        const double deviation = widen(x[i]) - mean, square = deviation * deviation;
        sums.m2 += square;
        sums.m3 += square * deviation;
        sums.m4 += square * square;
    }
}

template <class T>
void stream_sums(const T* x, int64_t n_sequence, int64_t n_token, int64_t d, double* channel_squares,
                 double* directions, double* moments, int64_t* nonfinite, int threads) {
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
    for (int64_t i = 0; i < n_sequence; ++i) {
        for (int64_t j = 0; j < d; ++j) channel_squares[j] += squares[i * d + j];
        directions[i] = sums[i].direction;
        all.m2 += sums[i].m2, all.m3 += sums[i].m3, all.m4 += sums[i].m4;
        all.nan += sums[i].nan, all.inf += sums[i].inf;
    }
    moments[0] = mean, moments[1] = all.m2, moments[2] = all.m3, moments[3] = all.m4;
    nonfinite[0] = all.nan, nonfinite[1] = all.inf;
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
EXPORT int normfree_interface() { return 1; }

// Of x [n_sequence, n_token, d]: Σ x² of each channel [d], added to what is there; |Σ_t x_t / |x_t||² of each sequence
// [n_sequence]; the mean μ of all entries and Σ (x - μ)^p for p = 2, 3, 4 [4]; the numbers of NaN and infinite ones [2].
EXPORT void normfree_stream_sums(int type, const void* x, int64_t n_sequence, int64_t n_token, int64_t d,
                                 double* channel_squares, double* directions, double* moments, int64_t* nonfinite,
                                 int threads) {
    const auto run = [&](auto element) {
        using T = decltype(element);
        stream_sums<T>(static_cast<const T*>(x), n_sequence, n_token, d, channel_squares, directions, moments, nonfinite,
                       threads);
    };
    type == 0 ? run(float()) : run(bfloat16());
}

// How many of n numbers are not zero; -1 where one is not finite.
EXPORT int64_t normfree_count_nonzero(int type, const void* x, int64_t n, int threads) {
    if (type == 0) return count_nonzero<uint32_t>(static_cast<const uint32_t*>(x), n, 0x7f800000u, threads);
    return count_nonzero<uint16_t>(static_cast<const uint16_t*>(x), n, 0x7f80u, threads);
}
