// forget_mult.cu as a shared library: -DSOURCE names it, -DSCALAR its element type. A kernel is found by
// its symbol; the two functions here need to know only which of the two parameter lists it has.
#include "cuda_shim.h"
#include SOURCE

using Forward = decltype(&forget_mult_forward);
using Backward = decltype(&forget_mult_backward);

extern "C" const char *kernel_parameters(int backward) {
    return backward ? parameter_kinds(Backward()) : parameter_kinds(Forward());
}

extern "C" void launch_kernel(int backward, void *kernel, unsigned grid, unsigned block,
                              void **arguments) {
    if (backward)
        launch(reinterpret_cast<Backward>(kernel), grid, block, arguments);
    else
        launch(reinterpret_cast<Forward>(kernel), grid, block, arguments);
}
