// The middle of Mix-FFN: SiLU, a depthwise 3x3 convolution on the grid, a SiLU gate. See linearsr/depthwise.py; method.md 2.5.
//
// Maps are (batch, height, width, channels) in memory. Channels do not meet, so a tile of them goes down the grid by itself and keeps
// the three rows that a convolution reads in the cache. 2 F channels come in, F of values and F of their gates; F come out.
#include "vector.hpp"

namespace {

constexpr long TILE = 64;  // Channels worked on at a time.
constexpr long TAPS = 9, BIAS = 9;

struct Grid {
    long batch, height, width, channels;  // `channels` is F.
    long halo;                            // Rows of neighbours at either side of each map that came in, 0 or 1; beyond them it is 0.

    long token(long y, long x) const { return y * width + x; }
    long map() const { return (height + 2 * halo) * width; }  // Tokens of one that came in.
    bool has(long y) const { return y >= -halo && y < height + halo; }
};

// Weights of a tile's channels by tap, (10, TILE), the bias as the last; weight is (channels, 9) in memory.
struct Taps {
    alignas(64) float values[10 * TILE];

    void read(const float* weight, const float* bias, long count) {
        for (long c = 0; c < TILE; c++) {
            for (long k = 0; k < TAPS; k++) values[k * TILE + c] = c < count ? weight[c * TAPS + k] : 0.0f;
            values[BIAS * TILE + c] = c < count ? bias[c] : 0.0f;
        }
    }
    Vector at(long tap, long c) const { return load(values + tap * TILE + c); }
};

// The rows y - 1, y and y + 1 of some maps, (width + 2, TILE) each, with a column of zeros at either side.
class Rows {
  public:
    Rows(const Grid& grid, long maps) : size_((grid.width + 2) * TILE), grid_(grid), values_(3 * maps * size_), zeros_(size_) {}

    float* row(long map, long y) { return grid_.has(y) ? values_.data() + (3 * map + (y + 3) % 3) * size_ : zeros_.data(); }
    static long at(long x) { return (x + 1) * TILE; }

  private:
    long size_;
    Grid grid_;
    std::vector<float> values_, zeros_;
};

// Write SiLU of a row of `count` channels, and its slope if that is wanted.
template <class Value>
void activate(const Value* hidden, const Grid& grid, long count, float* active, float* slope) {
    for (long x = 0; x < grid.width; x++) {
        fetch(hidden + (x + AHEAD) * 2 * grid.channels, count);
        for (long c = 0; c < count; c += LANES) {
            Vector value = load(hidden + x * 2 * grid.channels + c, count - c), share = sigmoid(value);
            store(active + Rows::at(x) + c, value * share);
            if (slope) store(slope + Rows::at(x) + c, silu_slope(value, share));
        }
    }
}

INLINE Vector convolved(const float* const rows[3], const Taps& taps, long x, long c) {
    Vector sum = taps.at(BIAS, c);
    for (long k = 0; k < TAPS; k++) sum += load(rows[k / 3] + Rows::at(x + k % 3 - 1) + c) * taps.at(k, c);
    return sum;
}

template <class Value>
void forward(const Value* hidden, const float* weight, const float* bias, Value* out, const Grid& grid, long first, long last) {
    Rows active(grid, 2);
    Taps taps[2];
    for (long start = first * TILE; start < std::min(last * TILE, grid.channels); start += TILE) {
        long count = std::min(TILE, grid.channels - start);
        for (long part = 0; part < 2; part++) {
            long channel = part * grid.channels + start;
            taps[part].read(weight + channel * TAPS, bias + channel, count);
        }
        for (long b = 0; b < grid.batch; b++) {
            const Value* map = hidden + (b * grid.map() + grid.halo * grid.width) * 2 * grid.channels + start;
            auto fill = [&](long y) {
                if (!grid.has(y)) return;
                for (long part = 0; part < 2; part++)
                    activate(map + grid.token(y, 0) * 2 * grid.channels + part * grid.channels, grid, count, active.row(part, y), nullptr);
            };
            fill(-1);
            fill(0);
            for (long y = 0; y < grid.height; y++) {
                fill(y + 1);
                const float* rows[2][3];
                for (long k = 0; k < 6; k++) rows[k / 3][k % 3] = active.row(k / 3, y + k % 3 - 1);
                for (long x = 0; x < grid.width; x++) {
                    Value* to = out + (b * grid.height * grid.width + grid.token(y, x)) * grid.channels + start;
                    fetch(to + AHEAD * grid.channels, count);
                    for (long c = 0; c < count; c += LANES) {
                        Vector value = convolved(rows[0], taps[0], x, c), gate = convolved(rows[1], taps[1], x, c);
                        store(to + c, value * gate * sigmoid(gate), count - c);
                    }
                }
            }
        }
    }
}

// What the backward pass of one tile of channels of one sample keeps, and its steps by row.
template <class Value>
class Backward {
  public:
    Backward(const Grid& grid) : grid_(grid), active_(grid, 2), slope_(grid, 2), grad_(grid, 2) {}

    // Add to the gradients of weights and biases of `count` channels from `start` on, and write that of what came in.
    void run(const Value* hidden, const Value* grad_out, const float* weight, const float* bias, Value* grad_hidden, float* grad_weight,
             float* grad_bias, long start, long count) {
        count_ = count;
        for (long part = 0; part < 2; part++) {
            long channel = part * grid_.channels + start;
            taps_[part].read(weight + channel * TAPS, bias + channel, count);
            std::fill(sums_[part].values, sums_[part].values + 10 * TILE, 0.0f);
        }
        for (long b = 0; b < grid_.batch; b++) {
            long double_width = 2 * grid_.channels, maps = b * grid_.height * grid_.width;
            one(hidden + maps * double_width + start, grad_out + maps * grid_.channels + start, grad_hidden + maps * double_width + start);
        }
        for (long part = 0; part < 2; part++)
            for (long c = 0; c < count; c++) {
                long channel = part * grid_.channels + start + c;
                for (long k = 0; k < TAPS; k++) grad_weight[channel * TAPS + k] = sums_[part].values[k * TILE + c];
                grad_bias[channel] = sums_[part].values[BIAS * TILE + c];
            }
    }

  private:
    void one(const Value* hidden, const Value* grad_out, Value* grad_hidden) {
        auto fill = [&](long y) {
            for (long part = 0; part < 2 && grid_.has(y); part++)
                activate(hidden + grid_.token(y, 0) * 2 * grid_.channels + part * grid_.channels, grid_, count_, active_.row(part, y),
                         slope_.row(part, y));
        };
        fill(0);
        for (long y = 0; y < grid_.height; y++) {
            fill(y + 1);
            through_gate(grad_out + grid_.token(y, 0) * grid_.channels, y);
            for (long part = 0; part < 2; part++) add_to_weights(part, y);
            if (y > 0) finish(grad_hidden, y - 1);
        }
        finish(grad_hidden, grid_.height - 1);
    }

    // Gradients of both convolutions' results in row y.
    void through_gate(const Value* grad_out, long y) {
        const float* rows[2][3];
        for (long k = 0; k < 6; k++) rows[k / 3][k % 3] = active_.row(k / 3, y + k % 3 - 1);
        float *to_value = grad_.row(0, y), *to_gate = grad_.row(1, y);
        for (long x = 0; x < grid_.width; x++) {
            fetch(grad_out + (x + AHEAD) * grid_.channels, count_);
            for (long c = 0; c < count_; c += LANES) {
                Vector value = convolved(rows[0], taps_[0], x, c), gate = convolved(rows[1], taps_[1], x, c), share = sigmoid(gate);
                Vector grad = load(grad_out + x * grid_.channels + c, count_ - c);
                store(to_value + Rows::at(x) + c, grad * gate * share);
                store(to_gate + Rows::at(x) + c, grad * value * silu_slope(gate, share));
            }
        }
    }

    void add_to_weights(long part, long y) {
        const float *grad = grad_.row(part, y), *rows[3] = {active_.row(part, y - 1), active_.row(part, y), active_.row(part, y + 1)};
        for (long c = 0; c < count_; c += LANES) {
            Vector sums[10] = {};
            for (long x = 0; x < grid_.width; x++) {
                Vector of_token = load(grad + Rows::at(x) + c);
                for (long k = 0; k < TAPS; k++) sums[k] += of_token * load(rows[k / 3] + Rows::at(x + k % 3 - 1) + c);
                sums[BIAS] += of_token;
            }
            for (long k = 0; k < 10; k++) store(sums_[part].values + k * TILE + c, sums_[part].at(k, c) + sums[k]);
        }
    }

    // Write the gradient of row y of what came in: all that reads it has its gradient.
    void finish(Value* grad_hidden, long y) {
        for (long part = 0; part < 2; part++) {
            const float *rows[3] = {grad_.row(part, y - 1), grad_.row(part, y), grad_.row(part, y + 1)}, *slope = slope_.row(part, y);
            for (long x = 0; x < grid_.width; x++) {
                Value* to = grad_hidden + grid_.token(y, x) * 2 * grid_.channels + part * grid_.channels;
                fetch(to + AHEAD * 2 * grid_.channels, count_);
                for (long c = 0; c < count_; c += LANES) {
                    Vector sum = {};
                    for (long k = 0; k < TAPS; k++) sum += load(rows[2 - k / 3] + Rows::at(x + 1 - k % 3) + c) * taps_[part].at(k, c);
                    store(to + c, sum * load(slope + Rows::at(x) + c), count_ - c);
                }
            }
        }
    }

    Grid grid_;
    Rows active_, slope_, grad_;
    Taps taps_[2], sums_[2];
    long count_ = 0;
};

template <class Value>
void backward(const Value* hidden, const Value* grad_out, const float* weight, const float* bias, Value* grad_hidden, float* grad_weight,
              float* grad_bias, const Grid& grid, long first, long last) {
    Backward<Value> pass(grid);
    for (long start = first * TILE; start < std::min(last * TILE, grid.channels); start += TILE)
        pass.run(hidden, grad_out, weight, bias, grad_hidden, grad_weight, grad_bias, start, std::min(TILE, grid.channels - start));
}

long tiles(const Grid& grid) { return (grid.channels + TILE - 1) / TILE; }

template <class Value>
void forward_in_parallel(const void* hidden, const float* weight, const float* bias, void* out, const Grid& grid, long threads) {
    in_parallel(tiles(grid), threads, [=](long first, long last) {
        forward(static_cast<const Value*>(hidden), weight, bias, static_cast<Value*>(out), grid, first, last);
    });
}

template <class Value>
void backward_in_parallel(const void* hidden, const void* grad_out, const float* weight, const float* bias, void* grad_hidden,
                          float* grad_weight, float* grad_bias, const Grid& grid, long threads) {
    in_parallel(tiles(grid), threads, [=](long first, long last) {
        backward(static_cast<const Value*>(hidden), static_cast<const Value*>(grad_out), weight, bias, static_cast<Value*>(grad_hidden),
                 grad_weight, grad_bias, grid, first, last);
    });
}

}  // namespace

// `hidden` (batch, height + 2 halo, width, 2 channels) -> `out` (batch, height, width, channels).
extern "C" void gated_depthwise(long is_bfloat16, const void* hidden, const float* weight, const float* bias, void* out, long batch,
                                long height, long width, long channels, long halo, long threads) {
    Grid grid{batch, height, width, channels, halo};
    (is_bfloat16 ? forward_in_parallel<bfloat16> : forward_in_parallel<float>)(hidden, weight, bias, out, grid, threads);
}

// Without a halo. `grad_weight` (2 channels, 9) and `grad_bias` (2 channels) are written, not added to.
extern "C" void gated_depthwise_backward(long is_bfloat16, const void* hidden, const void* grad_out, const float* weight,
                                         const float* bias, void* grad_hidden, float* grad_weight, float* grad_bias, long batch,
                                         long height, long width, long channels, long threads) {
    Grid grid{batch, height, width, channels, 0};
    (is_bfloat16 ? backward_in_parallel<bfloat16> : backward_in_parallel<float>)(hidden, grad_out, weight, bias, grad_hidden,
                                                                                 grad_weight, grad_bias, grid, threads);
}
