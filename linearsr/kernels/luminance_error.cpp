// Mean squared error of luminance, of which PSNR-Y is made, in one pass over both pictures. See linearsr/similarity.py.
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

// The same of pixels one after the other. Sums of three neighbours are made at every value, which needs no shuffling, and two of three of
// them are left out.
double sum_of_pixels(const float* x, const float* y, const float* weights, long count) {
    alignas(64) float weighted[3 * BLOCK + LANES], scales[3 * LANES], counts[3 * LANES];
    for (long i = 0; i < 3 * LANES; i++) {
        scales[i] = weights[i % 3];
        counts[i] = i % 3 == 0;
    }
    long values = 3 * count;
    for (long i = 0; i < values; i += 3 * LANES)
        for (long k = i; k < i + 3 * LANES; k += LANES)
            store(weighted + k, k < values ? (load(x + k, values - k) - load(y + k, values - k)) * load(scales + k - i) : Vector{});
    store(weighted + (values + 3 * LANES - 1) / (3 * LANES) * (3 * LANES), Vector{});
    Vector sums[3] = {};
    for (long i = 0; i < values; i += 3 * LANES)
        for (long k = 0; k < 3; k++) {
            const float* from = weighted + i + k * LANES;
            Vector error = (load(from) + load(from + 1) + load(from + 2)) * load(counts + k * LANES);
            sums[k] += error * error;
        }
    return total(sums[0] + sums[1] + sums[2]);
}

}  // namespace

// `x`, `y` (batch, 3, pixels), or (batch, pixels, 3) if interleaved -> `mean` (batch), the mean over pixels of (weights . (x - y))^2.
extern "C" void luminance_error(const float* x, const float* y, const float* weights, double* mean, long batch, long pixels,
                                long interleaved) {
    for (long b = 0; b < batch; b++) {
        double sum = 0;
        for (long first = 0; first < pixels; first += BLOCK) {
            long count = std::min(BLOCK, pixels - first), at = 3 * b * pixels + (interleaved ? 3 * first : first);
            sum += interleaved ? sum_of_pixels(x + at, y + at, weights, count) : sum_of_planes(x + at, y + at, weights, pixels, count);
        }
        mean[b] = sum / pixels;
    }
}
