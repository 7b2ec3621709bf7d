// The active pairs of a bank, sorted by expert and then by token, and which of them learn.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "lanes.h"

namespace {

static_assert(std::endian::native == std::endian::little);

// Calls `f(e)` for each of E weights that is not 0, in order.
template <class T, class F>
void each_active(const T* weights, int64_t E, F&& f) {
  using A = Sum<T>;
  constexpr int64_t size = 32, L = Lanes<A>::number;
  typedef int8_t Flags __attribute__((vector_size(L)));
  for (int64_t first = 0; first < E; first += size) {
    alignas(8) int8_t flags[size];
    for (int64_t k = 0; k < size; k += L) {
      const Flags some_flags = __builtin_convertvector(some(weights + first + k, E - first - k) != 0, Flags);
      std::memcpy(flags + k, &some_flags, sizeof some_flags);
    }
    for (int64_t k = 0; k < size; k += 8) {
      uint64_t bits;
      std::memcpy(&bits, flags + k, sizeof bits);
      for (bits &= 0x0101010101010101; bits; bits &= bits - 1) f(first + k + std::countr_zero(bits) / 8);
    }
  }
}

// Of weights [T, E] that are not 0: where the pairs of each expert end, where those of each block of tokens begin
// among them, [blocks, E], and how many a token has at most.
template <class T>
void count(const T* weights, int64_t tokens, int64_t E, int64_t blocks, int64_t* starts, int64_t* ends, int64_t* most) {
  std::vector<int64_t> mosts(blocks);
#pragma omp parallel for
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t* counts = starts + b * E;
    std::fill(counts, counts + E, 0);
    for (int64_t t = b * tokens / blocks; t < (b + 1) * tokens / blocks; ++t) {
      int64_t own = 0;
      each_active(weights + t * E, E, [&](int64_t e) { ++counts[e], ++own; });
      mosts[b] = std::max(mosts[b], own);
    }
  }
  int64_t number = 0;
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t b = 0; b < blocks; ++b) number += std::exchange(starts[b * E + e], number);
    ends[e] = number;
  }
  *most = *std::max_element(mosts.begin(), mosts.end());
}

// The token [R] and the weight [R] of each pair; `starts` is used up.
template <class T>
void list(const T* weights, int64_t tokens, int64_t E, int64_t blocks, int64_t* starts, int64_t* token,
          Sum<T>* weight) {
#pragma omp parallel for
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t* next = starts + b * E;
    for (int64_t t = b * tokens / blocks; t < (b + 1) * tokens / blocks; ++t)
      each_active(weights + t * E, E, [&](int64_t e) {
        token[next[e]] = t;
        weight[next[e]++] = widened(weights[t * E + e]);
      });
  }
}

// The values [R] of the pairs, each into its place of [T, E].
template <class A>
void spread(const A* values, const int64_t* token, const int64_t* ends, int64_t E, A* out) {
#pragma omp parallel for
  for (int64_t e = 0; e < E; ++e)
    for (int64_t r = e ? ends[e - 1] : 0; r < ends[e]; ++r) out[token[r] * E + e] = values[r];
}

// The pairs among the `most` of least surprise of their token, in order: ties by place, what is not finite last.
template <class A>
void least(const A* surprise, const int64_t* token, const int64_t* ends, int64_t E, int64_t tokens, int64_t most,
           int64_t* kept, int64_t* kept_token, int64_t* kept_ends) {
  const int64_t R = E ? ends[E - 1] : 0;
  std::vector<int64_t> stops(tokens + 1);
  std::vector<std::pair<A, int64_t>> pairs(R);
  std::vector<uint8_t> keep(R);
  for (int64_t r = 0; r < R; ++r) ++stops[token[r] + 1];
  for (int64_t t = 0; t < tokens; ++t) stops[t + 1] += stops[t];
  std::vector<int64_t> next(stops.begin(), stops.end() - 1);
  for (int64_t r = 0; r < R; ++r)
    pairs[next[token[r]]++] = {std::isfinite(surprise[r]) ? surprise[r] : std::numeric_limits<A>::infinity(), r};
#pragma omp parallel for
  for (int64_t t = 0; t < tokens; ++t) {
    const auto first = pairs.begin() + stops[t], last = pairs.begin() + stops[t + 1];
    const auto end = first + std::min<int64_t>(most, last - first);
    if (end < last) std::nth_element(first, end, last);
    for (auto pair = first; pair < end; ++pair) keep[pair->second] = 1;
  }
  int64_t number = 0;
  for (int64_t e = 0, r = 0; e < E; ++e) {
    for (; r < ends[e]; ++r)
      if (keep[r]) kept[number] = r, kept_token[number++] = token[r];
    kept_ends[e] = number;
  }
}

}  // namespace
