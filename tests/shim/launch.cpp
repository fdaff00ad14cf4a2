// A CUDA source as a shared library: -DSOURCE names it, -DENTRIES its kernels.
#include "cuda_shim.h"
#include SOURCE

struct Entry {
    const char *name, *kinds;
    const std::size_t *sizes;
    void (*run)(unsigned grid, unsigned block, void **arguments);
};

#define KERNEL_ENTRY(NAME)                                                                         \
    {#NAME, parameter_kinds(&NAME), parameter_sizes(&NAME),                                        \
     [](unsigned grid, unsigned block, void **arguments) {                                         \
         launch(&NAME, grid, block, arguments);                                                    \
     }},

static const Entry entries[] = {ENTRIES};

static const Entry &entry(const char *name) {
    const Entry *found = entries;
    while (std::strcmp(found->name, name)) ++found;
    return *found;
}

extern "C" const char *kernel_parameters(const char *name) { return entry(name).kinds; }

extern "C" const std::size_t *kernel_sizes(const char *name) { return entry(name).sizes; }

extern "C" void launch_kernel(const char *name, unsigned grid, unsigned block, void **arguments) {
    entry(name).run(grid, block, arguments);
}
