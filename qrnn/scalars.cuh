// The element type of the kernels, -DSCALAR=double | float | Float16 | BFloat16, and State, the type
// of their arithmetic: double for double, else float. qrnn/cuda.py replaces the #include by this
// text, so that NVRTC needs no headers. CuPy compiles with -ftz=true: a float or bfloat16 below
// 1.2e-38 counts as 0.

struct Float16 {
    unsigned short bits;
};

struct BFloat16 {
    unsigned short bits;
};

#ifdef __CUDACC__

__device__ __forceinline__ float half_to_float(unsigned short bits) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
    return wide;
}

__device__ __forceinline__ unsigned short float_to_half(float wide) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(wide));
    return bits;
}

__device__ __forceinline__ unsigned float_to_bits(float v) { return __float_as_uint(v); }

__device__ __forceinline__ float bits_to_float(unsigned bits) { return __uint_as_float(bits); }

#endif  // a C++ build supplies these four functions

__device__ __forceinline__ double widen(double v) { return v; }

__device__ __forceinline__ float widen(float v) { return v; }

__device__ __forceinline__ float widen(Float16 v) { return half_to_float(v.bits); }

__device__ __forceinline__ float widen(BFloat16 v) { return bits_to_float((unsigned)v.bits << 16); }

__device__ __forceinline__ void narrow(double wide, double &v) { v = wide; }

__device__ __forceinline__ void narrow(float wide, float &v) { v = wide; }

__device__ __forceinline__ void narrow(float wide, Float16 &v) { v.bits = float_to_half(wide); }

// Rounds to nearest, ties to even; the instruction for it needs compute capability 8.0.
__device__ __forceinline__ void narrow(float wide, BFloat16 &v) {
    const unsigned bits = float_to_bits(wide);
    const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    v.bits = (unsigned short)(wide == wide ? rounded : 0x7fc0u);
}

template <typename T>
struct StateOf {
    typedef float type;
};

template <>
struct StateOf<double> {
    typedef double type;
};

typedef SCALAR Scalar;
typedef StateOf<Scalar>::type State;
