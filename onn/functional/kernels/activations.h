// What is done to the activations of the active pairs between the products of native.cpp.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "lanes.h"
#include "work.h"

namespace {

template <class A>
Vector<A> sigmoid(Vector<A> x) {
  return 1 / (1 + exponential<A>(-x));
}

// out[r] = weight[r] silu(h1[r]) h3[r]: [R, I].
template <class T>
void activate(const T* h1, const T* h3, const Sum<T>* weight, int64_t R, int64_t I, T* out) {
  using A = Sum<T>;
  constexpr int L = Lanes<A>::number;
#pragma omp parallel for
  for (int64_t r = 0; r < R; ++r)
    for (int64_t k = r * I; k < (r + 1) * I; k += L) {
      const int64_t left = (r + 1) * I - k;
      const Vector<A> gate = some(h1 + k, left), up = some(h3 + k, left);
      store_some<T>(weight[r] * (gate * sigmoid<A>(gate) * up), left, out + k);
    }
}

// Of each pair the unit gradients and the activation times its weight, [R, I]; what its weight learns, into
// `d_weights` [T, E]; and, where there is room for it, its surprise [R], made with the lengths of `x` and `dy` [T].
// `c1` may be where `u` is, and `surprise` where `weight` is.
template <class T>
void local(const T* h1, const T* h3, const T* u, const Sum<T>* weight, const int64_t* token, const int64_t* ends,
           int64_t E, int64_t I, T* c1, T* c3, T* a, T* d_weights, const Sum<T>* of_x, const Sum<T>* of_dy,
           Sum<T>* surprise) {
  using A = Sum<T>;
  constexpr int L = Lanes<A>::number;
  const std::vector<Task> tasks = tasks_of(ends, E, kChunk);
#pragma omp parallel for
  for (size_t n = 0; n < tasks.size(); ++n)
    for (int64_t r = tasks[n].start; r < tasks[n].stop; ++r) {
      Vector<A> sums[4] = {};
      for (int64_t k = r * I; k < (r + 1) * I; k += L) {
        const int64_t left = (r + 1) * I - k;
        const Vector<A> gate = some(h1 + k, left), up = some(h3 + k, left), by = some(u + k, left);
        const Vector<A> open = sigmoid<A>(gate), gated = gate * open;
        const Vector<A> first = by * up * (open + gated * (1 - open)), second = by * gated, active = gated * up;
        store_some<T>(weight[r] * first, left, c1 + k);
        store_some<T>(weight[r] * second, left, c3 + k);
        store_some<T>(weight[r] * active, left, a + k);
        sums[0] += active * by;
        sums[1] += first * first;
        sums[2] += second * second;
        sums[3] += active * active;
      }
      A all[L < 4 ? 4 : L];
      put_totals<A, 4>(sums, all);
      d_weights[token[r] * E + tasks[n].expert] = narrowed<T>(all[0]);
      if (!surprise) continue;
      const A inner = std::hypot(std::sqrt(all[1]), std::sqrt(all[2])) * of_x[token[r]];
      const A outer = std::sqrt(all[3]) * of_dy[token[r]];
      surprise[r] = std::hypot(inner, outer) * std::abs(weight[r]);
    }
}

// ||x[r]|| of each row [R, H].
template <class T>
void lengths(const T* x, int64_t R, int64_t H, Sum<T>* out) {
  using A = Sum<T>;
  constexpr int L = Lanes<A>::number;
#pragma omp parallel for
  for (int64_t r = 0; r < R; ++r) {
    Vector<A> sums[4] = {};
    for (int64_t h = 0; h < H; h += 4 * L)
      for (int k = 0; k < 4; ++k) {
        const Vector<A> part = some(x + r * H + h + k * L, std::max<int64_t>(H - h - k * L, 0));
        sums[k] += part * part;
      }
    A all[L < 4 ? 4 : L];
    put_totals<A, 4>(sums, all);
    out[r] = std::sqrt((all[0] + all[1]) + (all[2] + all[3]));
  }
}

// Sums over the pairs of each expert of rows [R, I], or, where there is a `scale` [T], of the squares of rows times it.
template <class T>
void total(const T* rows, const Sum<T>* scale, const int64_t* token, const int64_t* ends, int64_t E, int64_t I,
           Sum<T>* out) {
  using A = Sum<T>;
  constexpr int L = Lanes<A>::number;
#pragma omp parallel for schedule(dynamic)
  for (int64_t e = 0; e < E; ++e)
    for (int64_t i = 0; i < I; i += L) {
      Vector<A> sum = {};
      for (int64_t r = e ? ends[e - 1] : 0; r < ends[e]; ++r) {
        const Vector<A> row = some(rows + r * I + i, I - i);
        const Vector<A> scaled = scale ? row * scale[token[r]] : row;
        sum += scale ? scaled * scaled : scaled;
      }
      store_some<A>(sum, I - i, out + e * I + i);
    }
}

}  // namespace
