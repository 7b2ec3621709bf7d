// How the work of a product is cut up for threads and caches.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t kBatch = 4096;    // tokens whose sums are kept at once
constexpr int64_t kSums = 1 << 20;  // bytes of these sums
constexpr int64_t kChunk = 64;      // rows of a task: their tokens stay in a cache while all neurons pass

int64_t covering(int64_t number, int64_t size) { return (number + size - 1) / std::max<int64_t>(size, 1); }

void use_threads([[maybe_unused]] int64_t number) {
#ifdef _OPENMP
  omp_set_num_threads(int(number));
#endif
}

int64_t threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Memory that each thread keeps for its next call.
enum class Slot { sums, left, right, pointers };
template <class A, Slot slot>
A* scratch(int64_t size) {
  thread_local std::unique_ptr<void, decltype(&std::free)> held(nullptr, &std::free);
  thread_local size_t room = 0;
  const size_t bytes = covering(size * sizeof(A), 64) * 64;
  if (bytes > room) {
    held.reset(std::aligned_alloc(64, bytes));
    if (!held) throw std::bad_alloc();
    room = bytes;
  }
  return static_cast<A*>(held.get());
}

// Some rows of one expert.
struct Task {
  int64_t expert, start, stop;
};
std::vector<Task> tasks_of(const int64_t* ends, int64_t E, int64_t rows) {
  std::vector<Task> tasks;
  for (int64_t e = 0, start = 0; e < E; ++e)
    for (; start < ends[e]; start = tasks.back().stop) tasks.push_back({e, start, std::min(start + rows, ends[e])});
  return tasks;
}

// Sums of tokens by blocks of columns: as many of both at once as a cache holds, and something for every thread.
struct Split {
  int64_t batch, batches, span, spans;
  Split(int64_t tokens, int64_t blocks, int64_t bytes) {
    batch = std::min(tokens, kBatch);
    batches = covering(tokens, batch);
    span = std::max<int64_t>(1, std::min(kSums / bytes / std::max<int64_t>(batch, 1), blocks * batches / threads()));
    spans = covering(blocks, span);
  }
};

// How many blocks of columns of a weight gradient are made at once: all, where there are enough experts.
int64_t span_of(int64_t blocks, int64_t E) {
  return std::max<int64_t>(1, covering(blocks, std::min(blocks, covering(8 * threads(), E))));
}

}  // namespace
