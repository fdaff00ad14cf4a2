// NT-ASGD's step (nt_asgd.py) for all parameters of a group, in one pass over memory:
//
//     p -= lr * (scale * gradient + decay * p),        average += weight * (p - average).
//
// Traffic. p and the gradient are read, p is written, and an average is read and written. The
// gradients keep their values.
//
// Work. The parameters are cut into chunks of CHUNK elements; no chunk spans two parameters. A block
// takes every gridDim.x-th chunk, so that the blocks' numbers of chunks differ by at most one,
// however unequal the parameters are. A thread fetches its part of a chunk, 32 bytes of each tensor,
// before it computes.
//
// Arithmetic. fmaf and fma fix the rounding: each product within a sum is exact. PyTorch computes in
// double and rounds once per operation. In float32 the result agrees with PyTorch's except in the
// last digit or two, without double arithmetic for each element.
//
// Compiled once per element type: -DSCALAR=float | double -DROWS=parameters per launch
// -DCHUNK=elements -DTHREADS=threads per block. No header is included: NVRTC needs no CUDA toolkit.

#if !defined(SCALAR) || !defined(ROWS) || !defined(CHUNK) || !defined(THREADS)
#error "define SCALAR as float or double, and ROWS, CHUNK and THREADS as numbers"
#endif

typedef SCALAR Scalar;

constexpr int PER_VECTOR = 16 / sizeof(Scalar);
constexpr int VECTORS = CHUNK / (THREADS * PER_VECTOR);  // per thread and chunk

static_assert(VECTORS * THREADS * PER_VECTOR == CHUNK, "a chunk is as many vectors for each thread");

// One load or store of 16 bytes.
struct alignas(16) Vector {
    Scalar values[PER_VECTOR];
};

struct Row {
    Scalar *p;
    const Scalar *gradient;  // null: p keeps its value
    Scalar *average;         // or null
    long long count;
};

// Passed by value, as an argument of the launch.
struct Table {
    Row rows[ROWS];
};

struct Factors {
    Scalar lr, decay, scale, weight;
};

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <bool GRADIENT, bool AVERAGE>
__device__ __forceinline__ void step(Scalar &p, Scalar gradient, Scalar &average,
                                     const Factors &by) {
    if (GRADIENT)
        p = multiply_add(-by.lr, multiply_add(by.decay, p, by.scale * gradient), p);
    if (AVERAGE) {
        // As in torch.lerp, computed from the nearer end: a weight of 1 gives p exactly.
        const Scalar way = p - average;
        average = by.weight < Scalar(0.5) ? multiply_add(by.weight, way, average)
                                          : multiply_add(by.weight - Scalar(1), way, p);
    }
}

__device__ __forceinline__ bool aligned(const void *address) {
    return (unsigned long long)address % sizeof(Vector) == 0;  // null is
}

template <bool GRADIENT, bool AVERAGE>
__device__ __forceinline__ void update_chunk(const Row &row, long long begin,
                                             const Factors &by) {
    const long long left = row.count - begin;
    const int size = left < CHUNK ? (int)left : CHUNK;
    Scalar *p = row.p + begin;
    const Scalar *gradient = GRADIENT ? row.gradient + begin : nullptr;
    Scalar *average = AVERAGE ? row.average + begin : nullptr;

    const bool whole = aligned(p) && aligned(gradient) && aligned(average);
    const int vectors = whole ? size / PER_VECTOR : 0;
    Vector ps[VECTORS] = {}, gradients[VECTORS] = {}, averages[VECTORS] = {};
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        const int at = (int)threadIdx.x + n * THREADS;
        if (at >= vectors) continue;
        ps[n] = ((const Vector *)p)[at];
        if (GRADIENT) gradients[n] = ((const Vector *)gradient)[at];
        if (AVERAGE) averages[n] = ((const Vector *)average)[at];
    }
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        const int at = (int)threadIdx.x + n * THREADS;
        if (at >= vectors) continue;
#pragma unroll
        for (int i = 0; i < PER_VECTOR; ++i)
            step<GRADIENT, AVERAGE>(ps[n].values[i], gradients[n].values[i],
                                    averages[n].values[i], by);
        if (GRADIENT) ((Vector *)p)[at] = ps[n];
        if (AVERAGE) ((Vector *)average)[at] = averages[n];
    }
    // The elements after the last whole vector, or all if an address is not aligned.
    for (int at = vectors * PER_VECTOR + (int)threadIdx.x; at < size; at += THREADS) {
        Scalar value = p[at], mean = AVERAGE ? average[at] : Scalar(0);
        step<GRADIENT, AVERAGE>(value, GRADIENT ? gradient[at] : Scalar(0), mean, by);
        if (GRADIENT) p[at] = value;
        if (AVERAGE) average[at] = mean;
    }
}

// The number at `address` (a replayed graph reads its current value), or `value` if that is null.
__device__ __forceinline__ Scalar factor(const float *address, double value) {
    return address ? Scalar(*address) : Scalar(value);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    update(Table table, long long rows, const float *lr_at, double lr, const float *scale_at,
           double scale, const float *weight_at, double weight, double decay) {
    const Factors by = {factor(lr_at, lr), Scalar(decay), factor(scale_at, scale),
                        factor(weight_at, weight)};
    long long chunk = blockIdx.x;  // index within the row
    for (int n = 0; n < (int)rows; ++n) {
        const Row &row = table.rows[n];
        const long long chunks = (row.count + CHUNK - 1) / CHUNK;
        for (; chunk < chunks; chunk += gridDim.x) {
            if (!row.gradient)
                update_chunk<false, true>(row, chunk * CHUNK, by);
            else if (!row.average)
                update_chunk<true, false>(row, chunk * CHUNK, by);
            else
                update_chunk<true, true>(row, chunk * CHUNK, by);
        }
        chunk -= chunks;
    }
}
