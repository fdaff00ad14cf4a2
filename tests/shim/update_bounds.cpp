// Runs the update over awkward sizes, with buffers of exactly the needed size. Built with
// -fsanitize=address,undefined, so that any access outside a buffer aborts the program.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "cuda_shim.h"
#include SOURCE

// Exactly `count` elements, which begin `shift` elements after a multiple of 16 bytes.
struct Buffer {
    std::unique_ptr<Scalar[]> data;
    Scalar *begin;

    Buffer(long long count, int shift) : data(new Scalar[count + shift]()), begin(&data[shift]) {}
};

int main() {
    const long long counts[] = {1, 3, 4, 5, 1023, 1024, 1025, 2047, 2048, 2049, CHUNK + 1};
    for (int options = 0; options < 24; ++options) {
        const bool with_gradient = options % 3 != 0, with_average = options % 3 != 1;
        const int shift = options / 3 % 4;
        std::unique_ptr<Buffer> buffers[3][sizeof(counts) / sizeof(*counts)];
        Table table = {};
        long long rows = 0;
        for (const long long count : counts) {
            for (int which = 0; which < 3; ++which)
                buffers[which][rows].reset(
                    new Buffer(count, options < 12 || which == shift % 3 ? shift : 0));
            table.rows[rows] = {buffers[0][rows]->begin,
                                      with_gradient ? buffers[1][rows]->begin : nullptr,
                                      with_average ? buffers[2][rows]->begin : nullptr, count};
            ++rows;
        }
        // In its own allocation, so that a read of more than four bytes is found.
        const std::unique_ptr<float> number(new float(0.5f));
        const float *at = number.get(), *none = nullptr;
        double value = 0.25;
        void *arguments[] = {&table, &rows, &at,    &value, &none,
                             &value, &at,      &value, &value};
        launch(update, 1 + options % 4, THREADS, arguments);
    }
    std::puts("within bounds");
}
