// Compiles a CUDA source as a shared library: -DSOURCE is its path, -DENTRIES lists its kernels.
#include "cuda_shim.h"
#include SOURCE

struct Entry {
    const char *name, *kinds;
    const char *(*run)(unsigned grid, unsigned block, void **arguments);
};

#define KERNEL_ENTRY(NAME)                                                                         \
    {#NAME, parameter_kinds(&NAME),                                                                \
     [](unsigned grid, unsigned block, void **arguments) {                                         \
         return launch(&NAME, grid, block, arguments);                                             \
     }},

static const Entry entries[] = {ENTRIES};

static const Entry &entry(const char *name) {
    const Entry *found = entries;
    while (std::strcmp(found->name, name)) ++found;
    return *found;
}

extern "C" const char *kernel_parameters(const char *name) { return entry(name).kinds; }

#ifdef FIBERS
alignas(16) State shared_memory[1 << 14];
#endif

// Returns an error message or null.
extern "C" const char *launch_kernel(const char *name, unsigned grid, unsigned block,
                                     std::size_t shared, void **arguments) {
#ifdef FIBERS
    shared_begin = (unsigned char *)shared_memory;
    shared_capacity = sizeof(shared_memory);
    shared_size = shared;
#else
    if (shared) return "this source is compiled without shared memory";
#endif
    return entry(name).run(grid, block, arguments);
}
