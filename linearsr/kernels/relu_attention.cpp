// ReLU linear attention, head by head. See `relu_attention` in linearsr/fused.py; method.md 2.3.
//
// Queries, keys and values lie side by side, (batch, tokens, 3 heads D). What queries meet, the state, is sum_n relu(k_n) v_n^T (D, D) and
// sum_n relu(k_n) (D). Both passes go over the tokens twice, in blocks that stay in the nearest cache as float32.
#include "vector.hpp"

namespace {

constexpr long D = 32;  // Width of a head, SANA's.
constexpr long VECTORS = D / LANES;
constexpr long BLOCK = 64;  // Tokens worked on at a time.
enum Part { QUERY, KEY, VALUE };

struct Shape {
    long tokens, heads, width;  // `width` is heads * D.
    float eps;
};

// A block of rows of D float32.
struct Rows {
    alignas(64) float values[BLOCK * D];

    float* row(long n) { return values + n * D; }
    const float* row(long n) const { return values + n * D; }

    template <class Value>
    void read(const Value* from, long stride, long count) {
        for (long n = 0; n < count; n++) {
            fetch(from + (n + AHEAD) * stride, D);
            for (long j = 0; j < D; j += LANES) store(row(n) + j, load(from + n * stride + j));
        }
    }
    template <class Value>
    void read_active(const Value* from, long stride, long count) {
        for (long n = 0; n < count; n++) {
            fetch(from + (n + AHEAD) * stride, D);
            for (long j = 0; j < D; j += LANES) {
                Vector value = load(from + n * stride + j);
                store(row(n) + j, value < 0.0f ? Vector{} : value);
            }
        }
    }
    template <class Value>
    void write(Value* to, long stride, long count) const {
        for (long n = 0; n < count; n++) {
            fetch(to + (n + AHEAD) * stride, D);
            for (long j = 0; j < D; j += LANES) store(to + n * stride + j, load(row(n) + j));
        }
    }
    // Where the ReLU's result was not positive, its input has no gradient.
    template <class Value>
    void write_where_active(Value* to, long stride, long count, const Rows& active) const {
        for (long n = 0; n < count; n++) {
            fetch(to + (n + AHEAD) * stride, D);
            for (long j = 0; j < D; j += LANES) {
                Vector value = load(row(n) + j);
                store(to + n * stride + j, load(active.row(n) + j) <= 0.0f ? Vector{} : value);
            }
        }
    }
};

// In memory (D + 1, D): the matrix, and the total as its last row.
struct State {
    alignas(64) float matrix[D * D];
    alignas(64) float total[D];

    static constexpr long SIZE = (D + 1) * D;
    void read(const float* from) {
        std::copy(from, from + D * D, matrix);
        std::copy(from + D * D, from + SIZE, total);
    }
    void write(float* to) const { std::copy(total, total + D, std::copy(matrix, matrix + D * D, to)); }

    State transposed() const {
        State other;
        for (long i = 0; i < D; i++)
            for (long j = 0; j < D; j++) other.matrix[j * D + i] = matrix[i * D + j];
        std::copy(total, total + D, other.total);
        return other;
    }
};

INLINE float dot(const float* left, const float* right) {
    Vector sum = {};
    for (long j = 0; j < D; j += LANES) sum += load(left + j) * load(right + j);
    float result = 0;
    for (long lane = 0; lane < LANES; lane++) result += sum[lane];
    return result;
}

// out_n = rows_n matrix, two rows at a time so that a row of the matrix is read once for both.
void multiply(const Rows& rows, const float* matrix, Rows& out, long count) {
    for (long n = 0; n < count; n += 2) {
        Vector first[VECTORS] = {}, second[VECTORS] = {};
        const float *left = rows.row(n), *right = rows.row(std::min(n + 1, count - 1));
        for (long i = 0; i < D; i++)
            for (long v = 0; v < VECTORS; v++) {
                Vector of_matrix = load(matrix + i * D + v * LANES);
                first[v] += left[i] * of_matrix;
                second[v] += right[i] * of_matrix;
            }
        for (long v = 0; v < VECTORS; v++) {
            store(out.row(n) + v * LANES, first[v]);
            if (n + 1 < count) store(out.row(n + 1) + v * LANES, second[v]);
        }
    }
}

// matrix += left^T right over a block; its sum is made in registers first, which also keeps long sums exact.
void add_outer(const Rows& left, const Rows& right, float* matrix, long count) {
    for (long i = 0; i < D; i += 2) {
        Vector first[VECTORS] = {}, second[VECTORS] = {};
        for (long n = 0; n < count; n++)
            for (long v = 0; v < VECTORS; v++) {
                Vector of_right = load(right.row(n) + v * LANES);
                first[v] += left.row(n)[i] * of_right;
                second[v] += left.row(n)[i + 1] * of_right;
            }
        for (long v = 0; v < VECTORS; v++) {
            float* to = matrix + i * D + v * LANES;
            store(to, load(to) + first[v]);
            store(to + D, load(to + D) + second[v]);
        }
    }
}

// total += sum_n weight_n rows_n; weights of 1 where there are none.
void add_rows(const Rows& rows, const float* weights, float* total, long count) {
    for (long j = 0; j < D; j += LANES) {
        Vector sum = {};
        for (long n = 0; n < count; n++) sum += load(rows.row(n) + j) * (weights ? weights[n] : 1.0f);
        store(total + j, load(total + j) + sum);
    }
}

template <class Value>
State summed(const Value* qkv, const Shape& shape) {
    State state{};
    Rows key, value;
    for (long start = 0; start < shape.tokens; start += BLOCK) {
        long count = std::min(BLOCK, shape.tokens - start), stride = 3 * shape.width;
        key.read_active(qkv + start * stride + KEY * shape.width, stride, count);
        value.read(qkv + start * stride + VALUE * shape.width, stride, count);
        add_outer(key, value, state.matrix, count);
        add_rows(key, nullptr, state.total, count);
    }
    return state;
}

template <class Value>
void forward_head(const Value* qkv, Value* out, float* normaliser, float* kept, const Shape& shape) {
    State state = summed(qkv, shape);
    state.write(kept);
    Rows query, mixed;
    for (long start = 0; start < shape.tokens; start += BLOCK) {
        long count = std::min(BLOCK, shape.tokens - start), stride = 3 * shape.width;
        query.read_active(qkv + start * stride + QUERY * shape.width, stride, count);
        multiply(query, state.matrix, mixed, count);
        for (long n = 0; n < count; n++) {
            normaliser[start + n] = dot(query.row(n), state.total);
            float inverse = 1.0f / (normaliser[start + n] + shape.eps);
            for (long j = 0; j < D; j += LANES) store(mixed.row(n) + j, load(mixed.row(n) + j) * inverse);
        }
        mixed.write(out + start * shape.width, shape.width, count);
    }
}

template <class Value>
void backward_head(const Value* qkv, const Value* out, const float* normaliser, const float* kept, const Value* grad_out, Value* grad_qkv,
                   const Shape& shape) {
    State state, grad_state{};
    state.read(kept);
    const State turned = state.transposed();
    Rows rows, grad, result;
    float grad_below[BLOCK];
    long stride = 3 * shape.width;
    for (long start = 0; start < shape.tokens; start += BLOCK) {
        long count = std::min(BLOCK, shape.tokens - start), at = start * stride + QUERY * shape.width;
        grad.read(grad_out + start * shape.width, shape.width, count);
        rows.read(out + start * shape.width, shape.width, count);
        // Of the numerator; and of the normaliser, -(grad . out) / (normaliser + eps).
        for (long n = 0; n < count; n++) {
            float inverse = 1.0f / (normaliser[start + n] + shape.eps);
            for (long j = 0; j < D; j += LANES) store(grad.row(n) + j, load(grad.row(n) + j) * inverse);
            grad_below[n] = -dot(grad.row(n), rows.row(n));
        }
        rows.read_active(qkv + at, stride, count);
        multiply(grad, turned.matrix, result, count);
        for (long n = 0; n < count; n++)
            for (long j = 0; j < D; j += LANES) store(result.row(n) + j, load(result.row(n) + j) + grad_below[n] * load(state.total + j));
        result.write_where_active(grad_qkv + at, stride, count, rows);
        add_outer(rows, grad, grad_state.matrix, count);
        add_rows(rows, grad_below, grad_state.total, count);
    }
    const State grad_turned = grad_state.transposed();
    for (long start = 0; start < shape.tokens; start += BLOCK) {
        long count = std::min(BLOCK, shape.tokens - start), at = start * stride;
        rows.read(qkv + at + VALUE * shape.width, stride, count);
        multiply(rows, grad_turned.matrix, result, count);
        for (long n = 0; n < count; n++)
            for (long j = 0; j < D; j += LANES) store(result.row(n) + j, load(result.row(n) + j) + load(grad_state.total + j));
        rows.read_active(qkv + at + KEY * shape.width, stride, count);
        result.write_where_active(grad_qkv + at + KEY * shape.width, stride, count, rows);
        multiply(rows, grad_state.matrix, result, count);
        result.write(grad_qkv + at + VALUE * shape.width, stride, count);
    }
}

// What a pass is given; `Value*` are void here, for both dtypes.
struct Pass {
    const void *qkv, *out, *grad_out;
    void *out_to, *grad_qkv;
    float *normaliser, *state;
    long batch, threads;
    Shape shape;
};

// Call work(unit, at, at_qkv) for every head of every sample: `unit` counts them, and their first values are at `at` of (batch, tokens,
// heads D) and at `at_qkv` of `qkv`.
template <class Work>
void for_each_head(const Pass& pass, Work work) {
    in_parallel(pass.batch * pass.shape.heads, pass.threads, [=](long first, long last) {
        for (long unit = first; unit < last; unit++) {
            long row = unit / pass.shape.heads * pass.shape.tokens * pass.shape.width, channel = unit % pass.shape.heads * D;
            work(unit, row + channel, 3 * row + channel);
        }
    });
}

template <class Value>
void forward(const Pass& pass) {
    for_each_head(pass, [=](long unit, long at, long at_qkv) {
        forward_head<Value>(static_cast<const Value*>(pass.qkv) + at_qkv, static_cast<Value*>(pass.out_to) + at,
                            pass.normaliser + unit * pass.shape.tokens, pass.state + unit * State::SIZE, pass.shape);
    });
}

template <class Value>
void backward(const Pass& pass) {
    for_each_head(pass, [=](long unit, long at, long at_qkv) {
        backward_head<Value>(static_cast<const Value*>(pass.qkv) + at_qkv, static_cast<const Value*>(pass.out) + at,
                             pass.normaliser + unit * pass.shape.tokens, pass.state + unit * State::SIZE,
                             static_cast<const Value*>(pass.grad_out) + at, static_cast<Value*>(pass.grad_qkv) + at_qkv, pass.shape);
    });
}

}  // namespace

// `qkv` (batch, tokens, 3 heads D) -> `out` (batch, tokens, heads D), `normaliser` (batch, heads, tokens) before eps, and `state`
// (batch, heads, D + 1, D), which the backward pass reads.
extern "C" void relu_attention(long is_bfloat16, const void* qkv, void* out, float* normaliser, float* state, long batch, long tokens,
                               long heads, float eps, long threads) {
    Pass pass{qkv, nullptr, nullptr, out, nullptr, normaliser, state, batch, threads, {tokens, heads, heads * D, eps}};
    (is_bfloat16 ? forward<bfloat16> : forward<float>)(pass);
}

extern "C" void relu_attention_backward(long is_bfloat16, const void* qkv, const void* out, float* normaliser, float* state,
                                        const void* grad_out, void* grad_qkv, long batch, long tokens, long heads, float eps,
                                        long threads) {
    Pass pass{qkv, out, grad_out, nullptr, grad_qkv, normaliser, state, batch, threads, {tokens, heads, heads * D, eps}};
    (is_bfloat16 ? backward<bfloat16> : backward<float>)(pass);
}
