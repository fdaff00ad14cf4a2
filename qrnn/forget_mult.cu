// The QRNN recurrence (arXiv 1611.01576, section 2.1), forwards and backwards, alone (ForgetMult) or
// fused with a layer's tanh, sigmoids, zoneout and output gate.
//
// F is one minus the paper's forget gate. A step of the walk is
//
//     c_s = f_s * z_s + (1 - f_s) * c_{s-1},        h_s = o_s * c_s   (o_s = 1 without a gate)
//
// and its reverse, with g the gradient that reaches c_s,
//
//     g = dh_s * o_s + carry,   do = dh_s * c_s,   dz = g * f_s,   df = g * (z_s - c_{s-1}),
//     carry = g * (1 - f_s).
//
// Layout. Every tensor is a stack of rows, one per (time, column of the batch); row (t, b) begins
// at (t * batch + b) * row, so a tensor may be a slice of a wider one: Z | F | O side by side, or
// one direction's half of a bidirectional output's gradient. One thread owns one (b, j) column and
// walks time; neighbouring threads own neighbouring j, so every access is coalesced.
//
// Traffic. The layer reads Z, F, O and writes H (4 N), then reads Z, F, O, dH and writes dZ, dF, dO
// (7 N): 11 N elements. Only one state c in CHUNK is written and read again, 2 N / CHUNK more. The
// backward kernel recomputes the other states of a chunk from it, walking forwards; it recomputes the
// gates anyway, because special functions and multiplications cost less than loads. (Without stored
// states, c_{s-1} would need a division of c_s by 1 - f, or of h_s by o: both lose every digit as
// the gate closes.)
//
// Latency. 31,000 columns (batch 20, 1550 wide) are 7 warps on each multiprocessor of a large GPU,
// far too few to hide memory latency by switching between them. So each thread fetches a whole chunk
// of steps while it computes the chunk before. About 3 TB/s * 700 ns = 2.1 MB must be in flight:
// 31,000 threads with 8 steps of three float streams are 3 MB. More is not possible: all loads of a
// chunk share one scoreboard, so a thread waits for the whole chunk before it fetches the next.
//
// Compiled once per element type and variant, -DSCALAR=double | float | Float16 | BFloat16
// -DCHUNK=steps and, each 0 or 1, -DFUSED (a layer's tanh and sigmoids; else ForgetMult, whose z is
// x), -DGATE (the output gate) and -DMASK (zoneout by a mask). All arithmetic is in State.

#include "scalars.cuh"

#ifdef __CUDACC__

// One special-function instruction each: relative error at most 2^-22 and 2^-23.
__device__ __forceinline__ float fast_exp2(float v) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
    return power;
}

__device__ __forceinline__ float fast_reciprocal(float v) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(v));
    return inverse;
}

#endif  // a C++ build supplies these two functions

// 1 / (1 + 2^(-v log2 e)): two special functions. By the bounds above the error is below 2.5e-7 for
// every v. If the power overflows, the reciprocal of infinity is the correct result, 0.
__device__ __forceinline__ float sigmoid(float v) {
    return fast_reciprocal(1.0f + fast_exp2(-1.4426950408889634f * v));
}

__device__ __forceinline__ double sigmoid(double v) { return 1.0 / (1.0 + exp(-v)); }

// 1 - 2 / (1 + e^2|v|), also two special functions; for small v, where that loses relative precision,
// an odd polynomial (a minimax fit to 4.4e-8 on |v| <= 0.5625). Both are computed and one is
// selected, because a branch would keep the steps of a chunk from overlapping. The error is below
// 3e-7. (The hardware's own tanh.approx has an error of 5e-4.)
__device__ __forceinline__ float tanh_of(float v) {
    const float size = fabsf(v);
    const float large = 1.0f - 2.0f * fast_reciprocal(1.0f + fast_exp2(2.8853900817779268f * size));
    const float u = v * v;
    const float p = ((0.016255677f * u - 0.052578982f) * u + 0.13319334f) * u - 0.3333289f;
    return size > 0.5625f ? copysignf(large, v) : v + v * (u * p);
}

__device__ __forceinline__ double tanh_of(double v) { return tanh(v); }

// A thread's position in a stack of rows, and the distance of one step of its walk, in elements.
struct Cursor {
    long long at, step;

    __device__ __forceinline__ Cursor(long long t, long long b, long long j, long long batch,
                                      long long row, int direction)
        : at((t * batch + b) * row + j), step(direction * batch * row) {}
};

// The steps of the walk that lie inside the sequence of this thread's batch column.
struct Window {
    int begin, count;

    // `from_end`: the walk meets the padding before the sequence, not after it.
    __device__ __forceinline__ Window(const long long *lengths, long long b, int steps,
                                      bool from_end) {
        count = steps;
        if (lengths) {
            const long long length = lengths[b];
            count = length < 0 ? 0 : (length < steps ? (int)length : steps);
        }
        begin = from_end ? steps - count : 0;
    }

    __device__ __forceinline__ bool contains(int s) const {
        return (unsigned)(s - begin) < (unsigned)count;
    }
};

template <int STEPS>
struct Chunk {
    Scalar values[STEPS];

    // Steps outside `live` are not read and count as zeros. With `back` the cursor walks from the
    // chunk's last step to its first.
    template <typename Live>
    __device__ __forceinline__ void fetch(const Scalar *__restrict__ source, Cursor &cursor,
                                          int first, Live live, bool back = false) {
#pragma unroll
        for (int n = 0; n < STEPS; ++n) {
            const int i = back ? STEPS - 1 - n : n;
            Scalar value = {};
            if (live(first + i)) value = source[cursor.at];
            values[i] = value;
            cursor.at += cursor.step;
        }
    }
};

// The first parameters of both kernels: Z, F, O with one row stride (ForgetMult: x and f), the zoneout
// mask or scale, the lengths of the batch columns (or null), and the biases of Z, F and O end to end
// (or null; ForgetMult has none).
#define INPUTS                                                                                     \
    const Scalar *__restrict__ z, const Scalar *__restrict__ f, const Scalar *__restrict__ o,      \
        long long in_row, const Scalar *__restrict__ mask, double scale,                           \
        const long long *__restrict__ lengths, const State *__restrict__ bias

#define SIZES long long seq_len, long long batch, long long hidden, long long reverse

// A number for each of Z, F and O: the bias of this thread's column, or the sums of its gradients.
struct Gates {
    State z, f, o;
};

__device__ __forceinline__ Gates bias_of(const State *__restrict__ bias, long long j,
                                         long long hidden) {
    if (!bias) return {State(0), State(0), State(0)};
    return {bias[j], bias[hidden + j], GATE ? bias[2 * hidden + j] : State(0)};
}

// One chunk of every stream; a variant leaves the streams that it does not need unused.
template <int STEPS>
struct Streams {
    Chunk<STEPS> z, f, o, mask, grad;
};

// Blocks of at most 64 threads: 31,000 columns make 485 blocks, work for every multiprocessor. Six
// resident blocks leave a thread 168 registers: enough, without spilling, for two chunks of five
// streams and the numbers that a chunk is reduced to. Six blocks' chunks in flight saturate the
// memory.
#define KERNEL extern "C" __global__ void __launch_bounds__(64, 6)

// Writes every row of h, with zeros beyond a column's length; to states, unless null, the state before
// each chunk of the walk, (chunks, batch, hidden); to c_last, unless null, the last state. c_init may
// be null.
KERNEL qrnn_forward(INPUTS, const Scalar *__restrict__ c_init, Scalar *__restrict__ h,
                    State *__restrict__ states, Scalar *__restrict__ c_last, SIZES) {
    constexpr int STEPS = GATE || MASK ? CHUNK : 2 * CHUNK;  // 16 to 32 values are fetched at once
    const long long column = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long columns = batch * hidden;
    if (column >= columns) return;
    const long long b = column / hidden, j = column - b * hidden;
    const int steps = (int)seq_len, direction = reverse ? -1 : 1;
    const long long t = reverse ? seq_len - 1 : 0;
    const Window window(lengths, b, steps, reverse != 0);
    const auto live = [&](int s) { return window.contains(s); };

    Cursor z_cursor(t, b, j, batch, in_row, direction), f_cursor = z_cursor, o_cursor = z_cursor;
    Cursor m_cursor(t, b, j, batch, hidden, direction), h_cursor = m_cursor;
    if (states) states += column;
    Streams<STEPS> now = {}, next = {};
    const auto fetch = [&](int first) {
        next.z.fetch(z, z_cursor, first, live);
        next.f.fetch(f, f_cursor, first, live);
        if (GATE) next.o.fetch(o, o_cursor, first, live);
        if (MASK) next.mask.fetch(mask, m_cursor, first, live);
    };

    const State factor = State(scale);
    const Gates added = bias_of(bias, j, hidden);
    State state = c_init ? widen(c_init[column]) : State(0);
    // `full`: all of these steps lie before the end, so the stores need no branch and the steps overlap.
    const auto compute = [&](int first, bool full) {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const bool in_sequence = full || first + i < steps;
            if (i % CHUNK == 0 && states && in_sequence)
                states[(first + i) / CHUNK * columns] = state;
            State x = widen(now.z.values[i]), take = widen(now.f.values[i]);
            if (FUSED) {
                x = tanh_of(x + added.z);
                take = sigmoid(take + added.f) * (MASK ? widen(now.mask.values[i]) : factor);
            }
            const bool inside = window.contains(first + i);
            const State moved = take * x + (State(1) - take) * state;
            state = inside ? moved : state;
            const State out = GATE ? sigmoid(widen(now.o.values[i]) + added.o) * state : state;
            if (in_sequence) narrow(inside ? out : State(0), h[h_cursor.at]);
            h_cursor.at += h_cursor.step;
        }
    };

    fetch(0);
    for (int first = 0; first < steps; first += STEPS) {
        now = next;
        fetch(first + STEPS);
        if (first + STEPS <= steps)
            compute(first, true);
        else
            compute(first, false);
    }
    if (c_last) narrow(state, c_last[column]);
}

// Takes the forward kernel's states, and walks from its last step to its first, chunk by chunk.
// grad_h, grad_last, grad_init and grad_bias may be null. Writes every row of grad_z, grad_f and, with
// a gate, grad_o, with zeros beyond a column's length; and to grad_bias their sums over time, (batch,
// 3 * hidden) or without a gate (batch, 2 * hidden).
KERNEL qrnn_backward(INPUTS, const State *__restrict__ states, const Scalar *__restrict__ grad_h,
                     long long grad_h_row, const Scalar *__restrict__ grad_last,
                     Scalar *__restrict__ grad_z, Scalar *__restrict__ grad_f,
                     Scalar *__restrict__ grad_o, long long grad_row, Scalar *__restrict__ grad_init,
                     State *__restrict__ grad_bias, SIZES) {
    const long long column = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long columns = batch * hidden;
    if (column >= columns) return;
    const long long b = column / hidden, j = column - b * hidden;
    const int steps = (int)seq_len, direction = reverse ? 1 : -1;
    const int last = (steps - 1) / CHUNK * CHUNK;  // the first step of the last chunk
    // The last step of the last chunk, as if that chunk were full.
    const long long t = reverse ? seq_len - CHUNK - last : last + CHUNK - 1;
    const Window window(lengths, b, steps, reverse != 0);
    const auto live = [&](int s) { return window.contains(s); };
    const auto has_grad = [&](int s) { return grad_h && window.contains(s); };

    Cursor z_cursor(t, b, j, batch, in_row, direction), f_cursor = z_cursor, o_cursor = z_cursor;
    Cursor m_cursor(t, b, j, batch, hidden, direction);
    Cursor g_cursor(t, b, j, batch, grad_h_row, direction);
    Cursor out_cursor(t, b, j, batch, grad_row, direction);
    Streams<CHUNK> now = {}, next = {};
    State state, next_state;
    const auto fetch = [&](int first) {
        next.z.fetch(z, z_cursor, first, live, true);
        next.f.fetch(f, f_cursor, first, live, true);
        if (GATE) next.o.fetch(o, o_cursor, first, live, true);
        if (MASK) next.mask.fetch(mask, m_cursor, first, live, true);
        next.grad.fetch(grad_h, g_cursor, first, has_grad, true);
        next_state = first >= 0 ? states[first / CHUNK * columns + column] : State(0);
    };

    const State factor = State(scale);
    const Gates added = bias_of(bias, j, hidden);
    Gates sums = {State(0), State(0), State(0)};
    State carry = grad_last ? widen(grad_last[column]) : State(0);
    // One chunk: a forward pass from the state before it reduces each step to four numbers, a backward
    // pass uses them. `out_cursor` starts at the chunk's last step and walks to its first.
    const auto compute = [&](int first, bool full) {
        State incoming[CHUNK], keep[CHUNK], slope_z[CHUNK], slope_f[CHUNK];
        long long at = out_cursor.at + (CHUNK - 1) * out_cursor.step;
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            const bool inside = window.contains(first + i);
            const State before = state;
            State x = widen(now.z.values[i]), take = widen(now.f.values[i]);
            slope_z[i] = slope_f[i] = State(1);
            if (FUSED) {
                const State open = sigmoid(take + added.f);
                x = tanh_of(x + added.z);
                take = open * (MASK ? widen(now.mask.values[i]) : factor);
                slope_z[i] = State(1) - x * x;
                slope_f[i] = take * (State(1) - open);
            }
            slope_z[i] *= take;
            slope_f[i] *= x - before;
            keep[i] = State(1) - take;
            state = inside ? take * x + keep[i] * before : before;
            incoming[i] = widen(now.grad.values[i]);
            if (GATE) {
                const State gate = sigmoid(widen(now.o.values[i]) + added.o);
                const State grad =
                    inside ? incoming[i] * state * gate * (State(1) - gate) : State(0);
                if (full || first + i < steps) narrow(grad, grad_o[at]);
                sums.o += grad;
                incoming[i] *= gate;
            }
            at -= out_cursor.step;
        }
#pragma unroll
        for (int i = CHUNK - 1; i >= 0; --i) {
            const bool inside = window.contains(first + i);
            const State grad = incoming[i] + carry;
            const State to_z = inside ? grad * slope_z[i] : State(0);
            const State to_f = inside ? grad * slope_f[i] : State(0);
            if (full || first + i < steps) {
                narrow(to_z, grad_z[out_cursor.at]);
                narrow(to_f, grad_f[out_cursor.at]);
            }
            if (FUSED) {
                sums.z += to_z;
                sums.f += to_f;
            }
            carry = inside ? grad * keep[i] : carry;
            out_cursor.at += out_cursor.step;
        }
    };

    fetch(last);
    for (int first = last; first >= 0; first -= CHUNK) {
        now = next;
        state = next_state;
        fetch(first - CHUNK);
        if (first + CHUNK <= steps)
            compute(first, true);
        else
            compute(first, false);
    }
    if (grad_init) narrow(carry, grad_init[column]);
    if (FUSED && grad_bias) {
        State *mine = grad_bias + b * (2 + GATE) * hidden + j;
        mine[0] = sums.z;
        mine[hidden] = sums.f;
        if (GATE) mine[2 * hidden] = sums.o;
    }
}
