// Softmax cross-entropy of every row of a matrix of logits, which its gradient overwrites:
//
//     v_j = logits_j + bias_j,   loss = log(sum_j exp(v_j)) - v_target,
//     d loss / d v_j = exp(v_j) / sum_k exp(v_k) - (1 if j is the target, else 0).
//
// Traffic. A block reads each row from memory once. For the gradient it reads the row again at once,
// from the caches, and writes the gradient. The separate operations read and write the row nine
// times. The gradient of the bias is the sum of the gradients over rows: each block sums its rows in
// shared memory and writes one row of sums.
//
// Softmax. Each thread keeps the largest value so far and the sum of exp(v - largest), and rescales
// the sum when a larger value comes. These pairs are combined across a warp by shuffles, and across
// warps through shared memory.
//
// Work. In both passes a thread owns every THREADS-th vector of 16 bytes of a row, so no thread waits
// for another's columns. A block takes every gridDim.x-th row, with one barrier per row.
//
// Compiled once per element type: -DSCALAR=double | float | Float16 | BFloat16 -DTHREADS=threads per
// block. All arithmetic is in State: double for double, else float.

#include "../qrnn/scalars.cuh"

constexpr int PER_VECTOR = 16 / sizeof(Scalar);
constexpr int PER_WIDE = 16 / sizeof(State);
constexpr int WARPS = THREADS / 32;

// One load or store of 16 bytes: of logits (Vector) and of numbers in State (Wide).
struct alignas(16) Vector {
    Scalar values[PER_VECTOR];
};

struct alignas(16) Wide {
    State values[PER_WIDE];
};

// The warps' pairs for two alternating rows, 4 * WARPS numbers. With bias_sums one sum per column
// follows, padded to a full vector.
extern __shared__ State shared_memory[];

__device__ __forceinline__ State minus_infinity() { return State(bits_to_float(0xff800000u)); }

// The number subtracted before exp: the largest value, or 0 if all are -infinity, to avoid NaN.
__device__ __forceinline__ State base_of(State top) { return top == minus_infinity() ? State(0) : top; }

struct Softmax {
    State top, mass;  // the largest value, and the sum of exp(v - base_of(top))

    __device__ __forceinline__ void add(State other_top, State other_mass) {
        const State larger = other_top > top ? other_top : top;
        const State base = base_of(larger);
        mass = mass * exp(top - base) + other_mass * exp(other_top - base);
        top = larger;
    }

    __device__ __forceinline__ void add_lanes() {
#pragma unroll
        for (int lanes = 16; lanes; lanes /= 2)
            add(__shfl_xor_sync(0xffffffffu, top, lanes), __shfl_xor_sync(0xffffffffu, mass, lanes));
    }
};

// One row of logits; reads and writes its columns, a full vector at once.
struct RowOfLogits {
    Scalar *begin;
    const State *bias;
    int columns;

    __device__ __forceinline__ Vector fetch(int at) const {
        if (at + PER_VECTOR <= columns) return *(const Vector *)(begin + at);
        Vector vector = {};
        for (int i = 0; i < PER_VECTOR; ++i)
            if (at + i < columns) vector.values[i] = begin[at + i];
        return vector;
    }

    __device__ __forceinline__ void store(int at, const Vector &vector) const {
        if (at + PER_VECTOR <= columns) {
            *(Vector *)(begin + at) = vector;
            return;
        }
        for (int i = 0; i < PER_VECTOR; ++i)
            if (at + i < columns) begin[at + i] = vector.values[i];
    }

    // A vector's values plus the bias; -infinity, which adds nothing, beyond the row's end.
    __device__ __forceinline__ void values(const Vector &vector, int at, State *v) const {
        const bool inside = at + PER_VECTOR <= columns;
#pragma unroll
        for (int n = 0; n < PER_VECTOR; n += PER_WIDE) {
            Wide added = {};
            if (inside)
                added = *(const Wide *)(bias + at + n);
            else
                for (int i = 0; i < PER_WIDE; ++i)
                    if (at + n + i < columns) added.values[i] = bias[at + n + i];
#pragma unroll
            for (int i = 0; i < PER_WIDE; ++i) {
                const bool exists = inside || at + n + i < columns;
                const State logit = exists ? widen(vector.values[n + i]) : minus_infinity();
                v[n + i] = logit + added.values[i];
            }
        }
    }
};

// The softmax of a row, the same in every thread; `pairs` holds the warps' results.
__device__ __forceinline__ Softmax softmax_of(const RowOfLogits &row, State *pairs) {
    Softmax softmax = {minus_infinity(), State(0)};
    int at = (int)threadIdx.x * PER_VECTOR;
    Vector next = row.fetch(at);
    while (at < row.columns) {
        const Vector now = next;
        next = row.fetch(at + THREADS * PER_VECTOR);
        State values[PER_VECTOR], top = softmax.top;
        row.values(now, at, values);
#pragma unroll
        for (int i = 0; i < PER_VECTOR; ++i) top = values[i] > top ? values[i] : top;
        const State base = base_of(top);
        State mass = softmax.mass * exp(softmax.top - base);
#pragma unroll
        for (int i = 0; i < PER_VECTOR; ++i) mass += exp(values[i] - base);
        softmax = {top, mass};
        at += THREADS * PER_VECTOR;
    }
    softmax.add_lanes();
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    if (lane == 0) {
        pairs[warp] = softmax.top;
        pairs[WARPS + warp] = softmax.mass;
    }
    __syncthreads();
    softmax = {minus_infinity(), State(0)};
    if (lane < WARPS) softmax = {pairs[lane], pairs[WARPS + lane]};
    softmax.add_lanes();
    return softmax;
}

__device__ __forceinline__ void write_gradient(const RowOfLogits &row, const Softmax &softmax,
                                               long long target, State *sums) {
    const State base = base_of(softmax.top), inverse = State(1) / softmax.mass;
    for (int at = (int)threadIdx.x * PER_VECTOR; at < row.columns; at += THREADS * PER_VECTOR) {
        State values[PER_VECTOR];
        row.values(row.fetch(at), at, values);
        Vector gradients = {};
#pragma unroll
        for (int i = 0; i < PER_VECTOR; ++i) {
            const State share = exp(values[i] - base) * inverse;
            values[i] = at + i == target ? share - State(1) : share;
            narrow(values[i], gradients.values[i]);
        }
        if (sums) {
#pragma unroll
            for (int n = 0; n < PER_VECTOR; n += PER_WIDE) {
                Wide sum = *(Wide *)(sums + at + n);
#pragma unroll
                for (int i = 0; i < PER_WIDE; ++i) sum.values[i] += values[n + i];
                *(Wide *)(sums + at + n) = sum;
            }
        }
        row.store(at, gradients);
    }
}

// Row r of the logits begins at r * row_distance; the rows and `bias` begin at multiples of 16 bytes.
// `bias_sums`, one row per block, may be null and needs with_gradient. A target outside the row makes
// its loss NaN.
extern "C" __global__ void __launch_bounds__(THREADS, sizeof(State) == 8 ? 1 : 2)
    cross_entropy(Scalar *logits, long long row_distance, const State *bias,
                  const long long *targets, State *losses, State *bias_sums, long long rows,
                  long long columns, long long with_gradient) {
    State *sums = bias_sums ? shared_memory + 4 * WARPS : nullptr;
    // The barrier of the first row comes before the first use of the sums.
    const long long sums_end = (columns + PER_VECTOR - 1) / PER_VECTOR * PER_VECTOR;
    if (sums)
        for (long long j = threadIdx.x; j < sums_end; j += THREADS) sums[j] = State(0);
    // A warp may be one row ahead of others, never two: it must not overwrite the pairs they read.
    State *pairs = shared_memory, *other_pairs = shared_memory + 2 * WARPS;
    for (long long r = blockIdx.x; r < rows; r += gridDim.x) {
        Scalar *begin = logits + r * row_distance;
        const RowOfLogits row = {begin, bias, (int)columns};
        const long long target = targets[r];
        State chosen = State(0);
        // Read before the barrier: after it the gradient overwrites the logit.
        if (threadIdx.x == 0) {
            const bool known = (unsigned long long)target < (unsigned long long)columns;
            chosen = known ? widen(begin[target]) + bias[target] : State(bits_to_float(0x7fc00000u));
        }
        const Softmax softmax = softmax_of(row, pairs);
        if (threadIdx.x == 0) losses[r] = log(softmax.mass) + (softmax.top - chosen);
        if (with_gradient) write_gradient(row, softmax, target, sums);
        State *const now = pairs;
        pairs = other_pairs;
        other_pairs = now;
    }
    if (!sums) return;
    __syncthreads();
    for (long long j = threadIdx.x; j < columns; j += THREADS)
        bias_sums[blockIdx.x * columns + j] = sums[j];
}
