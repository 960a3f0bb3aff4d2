// Vectors of float32 as wide as the processor's, values in memory as float32 or bfloat16, and threads.
//
// GCC and Clang's vector extension: the same source for SSE, AVX2 and AVX-512; arithmetic is always float32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr long LANES = 16;
#elif defined(__AVX__)
constexpr long LANES = 8;
#else
constexpr long LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct bfloat16 {
    uint16_t bits;
};

INLINE Vector load(const float* from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

INLINE Vector load(const bfloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Vector)(__builtin_convertvector(halves, Bits) << 16);
}

INLINE void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

// To the nearest, ties to even, as torch rounds; a NaN stays one.
INLINE void store(bfloat16* to, Vector value) {
    Bits bits = (Bits)value;
    Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Halves halves = __builtin_convertvector(value == value ? rounded : Bits{} + 0x7fc0, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

template <long BY, long... LANE>
INLINE Vector rotated(Vector value, std::integer_sequence<long, LANE...>) {
#if defined(__clang__)
    return __builtin_shufflevector(value, value, ((LANE + BY) % LANES)...);
#else
    return __builtin_shuffle(value, Integers{((LANE + BY) % LANES)...});
#endif
}

// Lane i gets what lane i + BY had, and the last lanes what the first had.
template <long BY>
INLINE Vector rotated(Vector value) {
    return rotated<BY>(value, std::make_integer_sequence<long, LANES>());
}

// The last `count` values of an axis, which may not fill a vector; the rest of it is 0.
template <class Value>
INLINE Vector load(const Value* from, long count) {
    if (count >= LANES) return load(from);
    Value values[LANES] = {};
    std::memcpy(values, from, count * sizeof(Value));
    return load(values);
}

template <class Value>
INLINE void store(Value* to, Vector value, long count) {
    if (count >= LANES) return store(to, value);
    Value values[LANES];
    store(values, value);
    std::memcpy(to, values, count * sizeof(Value));
}

// How many tokens ahead memory is fetched: some channels of one token are too far from those of the next for a processor to foresee.
// Half of the time of a convolution on 32 x 32 tokens was waiting for them.
constexpr long AHEAD = 4;

template <class Value>
INLINE void fetch(const Value* from, long count) {
    for (long c = 0; c < count; c += 64 / static_cast<long>(sizeof(Value))) __builtin_prefetch(from + c);
}

// 1 / (1 + exp(-x)) within 2.5 ulp for |x| up to 80. exp by 2^n times a polynomial in the rest, as Cephes' expf (S. Moshier, 1992).
INLINE Vector sigmoid(Vector x) {
    constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the lowest bits.
    Vector y = -x;
    y = y < -87.0f ? Vector{} - 87.0f : y;
    y = y > 88.0f ? Vector{} + 88.0f : y;
    Vector shifted = y * 1.44269504f + ROUNDING, n = shifted - ROUNDING;
    y = y - n * 0.693359375f;
    y = y + n * 2.12194440e-4f;
    Vector p = y * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * y + 8.3334519073e-3f;
    p = p * y + 4.1665795894e-2f;
    p = p * y + 1.6666665459e-1f;
    p = p * y + 5.0000001201e-1f;
    p = p * y * y + y + 1.0f;
    Vector power = (Vector)(((Integers)shifted + 127) << 23);
    return 1.0f / (1.0f + p * power);
}

// Derivative of x sigmoid(x), given both.
INLINE Vector silu_slope(Vector x, Vector sigmoid_of_x) { return sigmoid_of_x * (1.0f + x * (1.0f - sigmoid_of_x)); }

// Call work(first, last) for even parts of `count` units, one a thread. What it computes of a unit may not depend on the part.
template <class Work>
void in_parallel(long count, long threads, Work work) {
    threads = std::max(1L, std::min(threads, count));
    std::vector<std::thread> others;
    for (long part = 1; part < threads; part++) others.emplace_back(work, count * part / threads, count * (part + 1) / threads);
    work(0, count / threads);
    for (std::thread& other : others) other.join();
}
