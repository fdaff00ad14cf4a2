// Runs both kernels over awkward shapes, with buffers of exactly the needed size. Built with
// -fsanitize=address,undefined, so that any access outside a buffer aborts the program.
#include <cstdio>
#include <memory>
#include <vector>

#include "cuda_shim.h"
#include SOURCE

struct Buffer {
    std::unique_ptr<Scalar[]> data;

    explicit Buffer(long long size) : data(new Scalar[size]()) {}

    // Rows of `hidden` elements with a stride of `row`; the buffer ends with the last row.
    Buffer(long long rows, long long row, long long hidden) : Buffer((rows - 1) * row + hidden) {}

    operator Scalar *() const { return data.get(); }
};

static_assert(std::is_same<Scalar, State>::value, "one kind of buffer serves both");

static void run(long long seq_len, long long batch, long long hidden, bool reverse, bool bare,
                const long long *lengths) {
    const long long rows = seq_len * batch, columns = batch * hidden;
    const long long in_row = 3 * hidden + 2, grad_h_row = hidden + 3;
    const Buffer z(rows, in_row, hidden), f(rows, in_row, hidden), o(rows, in_row, hidden);
    const Buffer initial(columns), keep(rows * hidden), h(rows * hidden);
    const Buffer states((seq_len + CHUNK - 1) / CHUNK * columns);
    const Buffer last(columns), grad_h(rows, grad_h_row, hidden), grad_last(columns);
    const Buffer grad_z(rows, in_row, hidden), grad_f(rows, in_row, hidden);
    const Buffer grad_o(rows, in_row, hidden), grad_initial(columns);
    const Buffer bias((2 + GATE) * hidden), grad_bias((2 + GATE) * columns);
    Scalar *const none = nullptr;
    const unsigned blocks = (unsigned)((columns + 63) / 64);
    long long sizes[] = {seq_len, batch, hidden, reverse};

    // The launch takes addresses of arguments, like the driver's launch.
    Scalar *z_at = z, *f_at = f, *o_at = GATE ? (Scalar *)o : none;
    Scalar *keep_at = MASK ? (Scalar *)keep : none, *initial_at = bare ? none : initial;
    Scalar *h_at = h, *states_at = states, *kept_at = bare ? none : states;
    Scalar *last_at = bare ? none : last;
    Scalar *grad_h_at = bare ? none : grad_h, *grad_last_at = bare ? none : grad_last;
    Scalar *grad_z_at = grad_z, *grad_f_at = grad_f, *grad_o_at = GATE ? (Scalar *)grad_o : none;
    Scalar *grad_initial_at = bare ? none : grad_initial;
    // ForgetMult has no bias.
    Scalar *bias_at = bare || !FUSED ? none : bias;
    Scalar *grad_bias_at = bare || !FUSED ? none : grad_bias;
    long long in = in_row, grad_h_step = grad_h_row;
    double scale = 0.75;

    void *forward_arguments[] = {&z_at,    &f_at,     &o_at,       &in,       &keep_at, &scale,
                                 &lengths, &bias_at,  &initial_at, &h_at,     &kept_at, &last_at,
                                 &sizes[0], &sizes[1], &sizes[2],  &sizes[3]};
    launch(qrnn_forward, blocks, 64, forward_arguments);
    void *backward_arguments[] = {&z_at,            &f_at,         &o_at,        &in,
                                  &keep_at,         &scale,        &lengths,     &bias_at,
                                  &states_at,       &grad_h_at,    &grad_h_step, &grad_last_at,
                                  &grad_z_at,       &grad_f_at,    &grad_o_at,   &in,
                                  &grad_initial_at, &grad_bias_at, &sizes[0],    &sizes[1],
                                  &sizes[2],        &sizes[3]};
    launch(qrnn_backward, blocks, 64, backward_arguments);
}

int main() {
    const long long shapes[][3] = {{1, 1, 1},  {2, 1, 3},  {5, 3, 7},  {7, 2, 32}, {8, 1, 65},
                                   {12, 1, 1}, {13, 2, 2}, {16, 1, 5}, {17, 3, 1}, {33, 1, 64}};
    for (const auto &shape : shapes)
        for (int options = 0; options < 8; ++options) {
            // Some lengths are outside [0, seq_len]: the kernels must clamp them.
            std::vector<long long> lengths;
            for (long long b = 0; b < shape[1]; ++b)
                lengths.push_back(b == 0 ? shape[0] / 2 : b == 1 ? -5 : shape[0] + 1000);
            run(shape[0], shape[1], shape[2], options & 1, options & 2,
                options & 4 ? lengths.data() : nullptr);
        }
    std::puts("within bounds");
}
