// Splitting a range over a few short-lived threads. pthreads directly, so that no C++ runtime is needed.
#pragma once

#include <pthread.h>
#include <stdint.h>

namespace lmc {

constexpr int MAX_THREADS = 64;

// Call work(begin, end) for consecutive ranges that cover [0, count), on up to `threads` threads.
// A thread that cannot be started has its range done by the caller.
template <class Work>
void parallel_ranges(int64_t count, int threads, const Work &work) {
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > count) threads = static_cast<int>(count);
    if (threads < 2) {
        if (count > 0) work(int64_t{0}, count);
        return;
    }
    struct Range {
        const Work *work;
        int64_t begin, end;
        pthread_t thread;
        bool started;
    } ranges[MAX_THREADS];
    const auto body = [](void *argument) -> void * {
        const Range *range = static_cast<Range *>(argument);
        (*range->work)(range->begin, range->end);
        return nullptr;
    };
    for (int i = 0; i < threads; ++i) {
        Range &range = ranges[i];
        range.work = &work;
        range.begin = count * i / threads;
        range.end = count * (i + 1) / threads;
        range.started = i > 0 && pthread_create(&range.thread, nullptr, body, &range) == 0;
    }
    for (int i = 0; i < threads; ++i) {
        if (!ranges[i].started) work(ranges[i].begin, ranges[i].end);
    }
    for (int i = 0; i < threads; ++i) {
        if (ranges[i].started) pthread_join(ranges[i].thread, nullptr);
    }
}

}  // namespace lmc
