// The threads of a block as fibers, which can wait for one another. Each warp runs to its next barrier
// before the next warp starts; the order of the warps is reversed after each barrier. So if a barrier
// is missing, a warp writes before others have read, or reads before others have written.
#pragma once

#include <ucontext.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __shared__

namespace fibers {

enum Waiting { READY, AT_BARRIER, AT_SHUFFLE, DONE };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    Waiting waiting;
    double given, taken;  // this lane's value in a shuffle: as given, and as the others see it

    static constexpr std::size_t STACK = 1 << 16;
};

static std::vector<Fiber> all;
static ucontext_t scheduler;
static std::size_t current, count;
static std::function<void()> body;

inline void wait(Waiting what) {
    all[current].waiting = what;
    swapcontext(&all[current].context, &scheduler);
}

inline void start() {
    body();
    wait(DONE);
}

// Whether fibers [begin, end) all wait for `what`; if so, releases them.
inline bool release(std::size_t begin, std::size_t end, Waiting what) {
    for (std::size_t t = begin; t < end; ++t)
        if (all[t].waiting != what) return false;
    for (std::size_t t = begin; t < end; ++t) {
        all[t].taken = all[t].given;
        all[t].waiting = READY;
    }
    return true;
}

// Runs `work` in `threads` fibers; calls `enter(t)` before thread t continues. Returns an error
// message or null.
template <typename Enter>
const char *run(std::size_t threads, const std::function<void()> &work, Enter enter) {
    if (all.size() < threads) all = std::vector<Fiber>(threads);
    body = work;
    count = threads;
    for (std::size_t t = 0; t < threads; ++t) {
        getcontext(&all[t].context);
        all[t].context.uc_stack.ss_sp = all[t].stack.get();
        all[t].context.uc_stack.ss_size = Fiber::STACK;
        all[t].context.uc_link = nullptr;
        makecontext(&all[t].context, start, 0);
        all[t].waiting = READY;
    }
    const auto at = [threads](std::size_t n, bool backwards) {
        return backwards ? threads - 1 - n : n;
    };
    for (bool backwards = false;; backwards = !backwards) {
        for (std::size_t n = 0; n < threads; n += 32) {
            const std::size_t begin = at(n, backwards) & ~(std::size_t)31;
            const std::size_t end = begin + 32 < threads ? begin + 32 : threads;
            do {
                for (std::size_t m = begin; m < end; ++m) {
                    current = backwards ? end - 1 - (m - begin) : m;
                    if (all[current].waiting != READY) continue;
                    enter(current);
                    swapcontext(&scheduler, &all[current].context);
                }
            } while (release(begin, end, AT_SHUFFLE));
        }
        if (!release(0, threads, AT_BARRIER)) break;
    }
    for (std::size_t t = 0; t < threads; ++t)
        if (all[t].waiting != DONE) return "a barrier or a shuffle that not all threads reach";
    return nullptr;
}

}  // namespace fibers

inline void __syncthreads() { fibers::wait(fibers::AT_BARRIER); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
    const std::size_t self = fibers::current;
    fibers::all[self].given = (double)value;
    fibers::wait(fibers::AT_SHUFFLE);
    const std::size_t other = (self & ~(std::size_t)31) + ((self ^ (std::size_t)lanes) & 31);
    return other < fibers::count ? (T)fibers::all[other].taken : (T)NAN;
}
