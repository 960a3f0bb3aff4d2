// PSNR of luminance in one pass over both pictures. See linearsr/similarity.py.
#include <cmath>

#include "vector.hpp"

namespace {

constexpr long BLOCK = 1024;  // Pixels whose squares are summed in float32; a multiple of LANES.

INLINE double total(Vector sum) {
    double result = 0;
    for (long lane = 0; lane < LANES; lane++) result += sum[lane];
    return result;
}

// The sum over some pixels of (weights . (x - y))^2, of planes that are `apart` from each other.
double sum_of_planes(const float* x, const float* y, const float* weights, long apart, long count) {
    Vector sums[2] = {};
    for (long i = 0; i < count; i += LANES) {
        Vector error = {};
        for (long c = 0; c < 3; c++) error += (load(x + c * apart + i, count - i) - load(y + c * apart + i, count - i)) * weights[c];
        sums[i / LANES % 2] += error * error;
    }
    return total(sums[0] + sums[1]);
}

// Of three vectors of pixels one after the other, the values of one channel, in turn from all three: 3 divides no number of lanes, so that
// each lane has the channel once.
template <long CHANNEL, long... LANE>
INLINE Vector values_of(const Vector* pixels, std::integer_sequence<long, LANE...>) {
    constexpr Integers FIRST = {(LANE % 3 == CHANNEL ? -1 : 0)...}, SECOND = {((LANE + LANES) % 3 == CHANNEL ? -1 : 0)...};
    return FIRST ? pixels[0] : SECOND ? pixels[1] : pixels[2];
}

// The square of (weights . pixel). A pixel's three values lie in lanes side by side, the last beside the first.
INLINE Vector square_of_pixels(const Vector* pixels, const float* weights) {
    constexpr std::make_integer_sequence<long, LANES> LANE;
    Vector error = values_of<0>(pixels, LANE) * weights[0] + rotated<1>(values_of<1>(pixels, LANE)) * weights[1] +
                   rotated<2>(values_of<2>(pixels, LANE)) * weights[2];
    return error * error;
}

// The same sum of pixels one after the other.
double sum_of_pixels(const float* x, const float* y, const float* weights, long count) {
    Vector sum = {};
    long i = 0, values = 3 * count;
    for (; i + 3 * LANES <= values; i += 3 * LANES) {
        Vector apart[3];
        for (long k = 0; k < 3; k++) apart[k] = load(x + i + k * LANES) - load(y + i + k * LANES);
        sum += square_of_pixels(apart, weights);
    }
    Vector apart[3] = {};
    for (long k = 0; i < values; k++, i += LANES) apart[k] = load(x + i, values - i) - load(y + i, values - i);
    return total(sum + square_of_pixels(apart, weights));
}

}  // namespace

// `x`, `y` (batch, 3, pixels), or (batch, pixels, 3) if interleaved -> `psnr` (batch) in dB, at most `limit`, of red x_0 + green x_1 +
// blue x_2 and the same of y, whose highest value is `peak`. Weights are numbers, as a call of torch for each tensor costs as much as a
// quarter of the pass over 512 x 512 pixels when all of it, their code too, comes from memory.
extern "C" void luminance_psnr(const float* x, const float* y, double* psnr, float red, float green, float blue, float peak, float limit,
                               long batch, long pixels, long interleaved) {
    const float weights[3] = {red, green, blue};
    for (long b = 0; b < batch; b++) {
        double sum = 0;
        for (long first = 0; first < pixels; first += BLOCK) {
            long count = std::min(BLOCK, pixels - first), at = 3 * b * pixels + (interleaved ? 3 * first : first);
            sum += interleaved ? sum_of_pixels(x + at, y + at, weights, count) : sum_of_planes(x + at, y + at, weights, pixels, count);
        }
        psnr[b] = std::min(10 * std::log10(static_cast<double>(peak) * peak * pixels / sum), static_cast<double>(limit));
    }
}
