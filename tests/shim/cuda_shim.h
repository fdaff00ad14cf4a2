// Enough of CUDA C++ to compile the kernels as C++ and run them, one thread after another.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

// Kernels whose threads wait for one another: compile with -DFIBERS.
#ifdef FIBERS
#include "fibers.h"
#endif

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::exp;
using std::log;

struct Dim3 {
    unsigned x, y, z;
};

static Dim3 threadIdx, blockIdx, blockDim, gridDim;

// The special functions have the largest error that the hardware allows, with a sign that varies with
// the argument, so that a tolerance that holds here also holds on a GPU. They flush subnormal results,
// as the hardware does.
inline float with_error(double exact, float argument, double bound) {
    unsigned bits;
    std::memcpy(&bits, &argument, sizeof bits);
    const double sign = (bits * 2654435761u) >> 31 ? 1.0 : -1.0;
    const float result = (float)(exact * (1.0 + sign * bound));
    return std::fabs(result) < 1.17549435e-38f ? 0.0f : result;
}

inline float fast_exp2(float v) { return with_error(std::exp2((double)v), v, 0x1p-22); }

inline float fast_reciprocal(float v) { return with_error(1.0 / (double)v, v, 0x1p-23); }

inline unsigned float_to_bits(float v) {
    unsigned bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
}

inline float bits_to_float(unsigned bits) {
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

inline float half_to_float(unsigned short bits) {
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    float size;
    if (exponent == 31)
        size = fraction ? NAN : INFINITY;
    else
        size = std::ldexp((float)(exponent ? fraction + 1024 : fraction),
                          (exponent ? exponent : 1) - 25);
    return bits >> 15 ? -size : size;
}

inline unsigned short float_to_half(float v) {
    const unsigned short sign = (unsigned short)((float_to_bits(v) >> 16) & 0x8000u);
    const float size = std::fabs(v);
    if (!(size == size)) return sign | 0x7e00;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < 0x1p-14f) return (unsigned short)(sign | (int)std::nearbyint(size * 0x1p24f));
    int exponent;
    const float mantissa = std::frexp(size, &exponent);  // in [0.5, 1), times 2^exponent
    // A mantissa that rounds up to 1 correctly carries into the exponent.
    const int fraction = (int)std::nearbyint(mantissa * 2048.0f) - 1024;
    return (unsigned short)(sign | (((exponent + 14) << 10) + fraction));
}

// A parameter's kind: 'p' for a pointer, 'i' for long long, 'd' for double, '?' for any other type.
template <typename T>
constexpr char kind_of() {
    return std::is_pointer<T>::value           ? 'p'
           : std::is_same<T, long long>::value ? 'i'
           : std::is_same<T, double>::value    ? 'd'
                                               : '?';
}

template <typename... Parameters>
const char *parameter_kinds(void (*)(Parameters...)) {
    static const char kinds[] = {kind_of<Parameters>()..., 0};
    return kinds;
}

#ifdef FIBERS

// A block's shared memory, the size that the launch requested, and the size of the whole buffer.
static unsigned char *shared_begin;
static std::size_t shared_size, shared_capacity;

template <typename Work>
const char *run_block(unsigned threads, Work work) {
    // NaN makes unwritten elements show in the result; bytes 0x3f guard the rest of the buffer.
    std::memset(shared_begin, 0xff, shared_size);
    std::memset(shared_begin + shared_size, 0x3f, shared_capacity - shared_size);
    const char *failure = fibers::run(threads, work, [](std::size_t t) {
        threadIdx = {(unsigned)t, 0, 0};
    });
    for (std::size_t i = shared_size; i < shared_capacity; ++i)
        if (shared_begin[i] != 0x3f) return "a write beyond the shared memory of the launch";
    return failure;
}

#else

template <typename Work>
const char *run_block(unsigned threads, Work work) {
    for (unsigned t = 0; t < threads; ++t) {
        threadIdx = {t, 0, 0};
        work();
    }
    return nullptr;
}

#endif

template <typename... Parameters, std::size_t... I>
const char *launch(void (*kernel)(Parameters...), unsigned grid, unsigned block, void **arguments,
                   std::index_sequence<I...>) {
    blockDim = {block, 1, 1};
    gridDim = {grid, 1, 1};
    const char *failure = nullptr;
    for (unsigned b = 0; b < grid && !failure; ++b) {
        blockIdx = {b, 0, 0};
        failure = run_block(block, [&] { kernel(*static_cast<Parameters *>(arguments[I])...); });
    }
    return failure;
}

// Like the driver, takes one address per parameter and reads the parameter's declared size. Returns an
// error message or null.
template <typename... Parameters>
const char *launch(void (*kernel)(Parameters...), unsigned grid, unsigned block, void **arguments) {
    return launch(kernel, grid, block, arguments, std::index_sequence_for<Parameters...>());
}
