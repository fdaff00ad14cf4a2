// Runs the cross-entropy over awkward sizes, with buffers of exactly the needed size. Built with
// -DFIBERS and -fsanitize=address,undefined, so that any access outside a buffer aborts the program.
#include <cstdio>
#include <memory>

#include "cuda_shim.h"
#include SOURCE

alignas(16) State shared_memory[1 << 12];

int main() {
    shared_begin = (unsigned char *)shared_memory;
    shared_capacity = sizeof(shared_memory);
    for (const long long columns : {2, 3, 4, 5, 255, 256, 257, 300, 511, 513})
        for (int options = 0; options < 4; ++options) {
            const long long rows = 3, blocks = 2, vectors = (columns + PER_VECTOR - 1) / PER_VECTOR;
            const long long distance = (vectors + options % 2) * PER_VECTOR;
            // The buffer ends with the last row.
            const std::unique_ptr<Scalar[]> logits(new Scalar[(rows - 1) * distance + columns]());
            const std::unique_ptr<State[]> bias(new State[columns]()), losses(new State[rows]);
            const std::unique_ptr<State[]> sums(new State[blocks * columns]);
            const long long targets[] = {0, columns - 1, columns};
            Scalar *logits_at = logits.get();
            const State *bias_at = bias.get();
            const long long *targets_at = targets;
            State *losses_at = losses.get(), *sums_at = options / 2 ? sums.get() : nullptr;
            long long sizes[] = {distance, rows, columns, 1};
            void *arguments[] = {&logits_at, &sizes[0], &bias_at,  &targets_at, &losses_at,
                                 &sums_at,   &sizes[1], &sizes[2], &sizes[3]};
            const long long floats = 4 * WARPS + (sums_at ? vectors * PER_VECTOR : 0);
            shared_size = floats * sizeof(State);
            const char *failure = launch(cross_entropy, (unsigned)blocks, THREADS, arguments);
            if (failure) return std::puts(failure), 1;
        }
    std::puts("within bounds");
}
