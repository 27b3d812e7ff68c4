// ParallelFor implementations for tests: serial, or N threads with an even split.
#pragma once

#include <thread>
#include <vector>

#include "attnsieve/launch.h"

namespace attnsieve::test {

inline void run_serial(int64_t items, ParallelFor::Body body, void* context) {
  if (items > 0) body(context, 0, items);
}

template <int kThreads>
void run_threads(int64_t items, ParallelFor::Body body, void* context) {
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    const int64_t begin = items * t / kThreads;
    const int64_t end = items * (t + 1) / kThreads;
    if (begin < end) threads.emplace_back([=] { body(context, begin, end); });
  }
  for (std::thread& thread : threads) thread.join();
}

inline ParallelFor serial() { return {run_serial}; }

template <int kThreads>
ParallelFor threaded() {
  return {run_threads<kThreads>};
}

}  // namespace attnsieve::test
