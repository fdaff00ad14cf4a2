// Runs the update over awkward sizes with each buffer exactly as large as it must be. Built with
// -fsanitize=address,undefined, so that one element read or written outside a buffer ends it.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "cuda_shim.h"
#include SOURCE

// `count` elements that begin `shift` elements beyond a multiple of 16 bytes; nothing follows them.
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
        // A number of its own allocation: the kernel reads four bytes.
        const std::unique_ptr<float> number(new float(0.5f));
        const float *at = number.get(), *none = nullptr;
        double value = 0.25;
        void *arguments[] = {&table, &rows, &at,    &value, &none,
                             &value, &at,      &value, &value};
        launch(update, 1 + options % 4, THREADS, arguments);
    }
    std::puts("within bounds");
}
