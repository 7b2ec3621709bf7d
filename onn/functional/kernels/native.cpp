// The three products of a bank and what is done to its activations between them, of the active pairs alone.
//
// Rows of tokens are read where they are; no sum depends on how the work is shared among threads.
// Letters: T tokens, H hidden, E experts, I expert intermediate size, R pairs sorted by expert and then by token.
// `token` [R] names the row of each pair, `ends` [E] where the pairs of each expert end.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "activations.h"
#include "lanes.h"
#include "pairs.h"
#include "work.h"
#if defined(__AMX_BF16__) && defined(__linux__)
#define ONN_TILES
#include "amx.h"
#endif

namespace {

constexpr int64_t kDeep = 128;  // rows that are packed at once for a weight gradient

// Sums over a multiple of the lanes of x[m] w[n], both at `h`; how many numbers were summed is returned.
template <class T, int M, int N>
int64_t dot_lanes(const T* const* x, const T* w, int64_t H, Vector<Sum<T>> (&sums)[M][N]) {
  constexpr int L = Lanes<Sum<T>>::number;
  int64_t h = 0;
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, bfloat16>) {
    const auto pairs = [](const bfloat16* from) { return (__m512bh)_mm512_loadu_si512(from); };
    for (; h + 2 * L <= H; h += 2 * L) {
      __m512bh right[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) right[n] = pairs(w + n * H + h);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const __m512bh left = pairs(x[m] + h);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[m][n] = (Vector<float>)_mm512_dpbf16_ps((__m512)sums[m][n], left, right[n]);
      }
    }
  }
#endif
  for (; h + L <= H; h += L) {
    Vector<Sum<T>> right[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) right[n] = load(w + n * H + h);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vector<Sum<T>> left = load(x[m] + h);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sums[m][n] += left * right[n];
    }
  }
  return h;
}

// out[m][n] = sum over h of x[m][h] w[n][h].
template <class T, int M, int N>
void dot_block(const T* const* x, const T* w, int64_t H, T* const* out) {
  using A = Sum<T>;
  constexpr int L = Lanes<A>::number;
  Vector<A> sums[M][N] = {}, flat[M * N];
  const int64_t done = dot_lanes<T, M, N>(x, w, H, sums);
#pragma GCC unroll 32
  for (int j = 0; j < M * N; ++j) flat[j] = sums[j / N][j % N];
  A dots[(M * N + L - 1) / L * L];
  put_totals<A, M * N>(flat, dots);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      A dot = dots[m * N + n];
      for (int64_t h = done; h < H; ++h) dot += widened(x[m][h]) * widened(w[n * H + h]);
      out[m][n] = narrowed<T>(dot);
    }
}

// out[j][r] = w[j][e] x[token[r]] of each of `number` matrices: [E, I, H] and [T, H] to [R, I].
template <class T>
void project(int64_t number, const T* x, const T* const* w, const int64_t* token, const int64_t* ends, int64_t E,
             int64_t I, int64_t H, T* const* out) {
#ifdef ONN_TILES
  if constexpr (std::is_same_v<T, bfloat16>)
    if (tiles::allowed()) return tiles::project(number, x, w, token, ends, E, I, H, out);
#endif
  const std::vector<Task> tasks = tasks_of(ends, E, kChunk);
#pragma omp parallel for schedule(dynamic)
  for (size_t k = 0; k < tasks.size(); ++k) {
    const auto [e, start, stop] = tasks[k];
    for (int64_t j = 0; j < number; ++j)
      for (int64_t i = 0; i < I; i += kNeurons)
        for (int64_t r = start; r < stop; r += kRows)
          sized<kRows>(std::min<int64_t>(kRows, stop - r), [&](auto rows) {
            constexpr int M = decltype(rows)::value;
            const T* from[M];
            T* to[M];
            for (int m = 0; m < M; ++m) from[m] = x + token[r + m] * H, to[m] = out[j] + (r + m) * I + i;
            sized<kNeurons>(std::min<int64_t>(kNeurons, I - i), [&](auto neurons) {
              dot_block<T, M, decltype(neurons)::value>(from, w[j] + (e * I + i) * H, H, to);
            });
          });
  }
}

// sums[m] += sum over k of left[m * across + k * along] right[k], which are blocks of columns.
template <class A, int M>
void add_products(const A* left, int64_t across, int64_t along, const A* right, int64_t K,
                  Vector<A> (&sums)[M][kWide]) {
  constexpr int L = Lanes<A>::number;
  for (int64_t k = 0; k < K; ++k) {
    Vector<A> row[kWide];
#pragma GCC unroll 16
    for (int c = 0; c < kWide; ++c) row[c] = load(right + (k * kWide + c) * L);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const A one = left[m * across + k * along];
#pragma GCC unroll 16
      for (int c = 0; c < kWide; ++c) sums[m][c] += one * row[c];
    }
  }
}

// `rows` as numbers that are summed: where they are, or widened into `room`.
template <class T>
const Sum<T>* wide(const T* rows, int64_t size, [[maybe_unused]] Sum<T>* room) {
  if constexpr (std::is_same_v<T, Sum<T>>) {
    return rows;
  } else {
    constexpr int L = Lanes<Sum<T>>::number;
    for (int64_t k = 0; k < size; k += L) store_some(some(rows + k, size - k), size - k, room + k);
    return room;
  }
}

// out[t] = sum over j and the pairs r of token t of rows[j][r] w[j][e]: [R, I] and [E, I, H] to [T, H].
template <class T>
void combine(int64_t number, const T* const* rows, const T* const* w, const int64_t* token, const int64_t* ends,
             int64_t E, int64_t I, int64_t H, int64_t tokens, T* out) {
#ifdef ONN_TILES
  if constexpr (std::is_same_v<T, bfloat16>)
    if (tiles::allowed()) return tiles::combine(number, rows, w, token, ends, E, I, H, tokens, out);
#endif
  using A = Sum<T>;
  constexpr int C = Lanes<A>::columns, L = Lanes<A>::number;
  const int64_t blocks = covering(H, C);
  const Split split(tokens, blocks, C * sizeof(A));
#pragma omp parallel for schedule(dynamic) collapse(2)
  for (int64_t n = 0; n < split.batches; ++n)
    for (int64_t s = 0; s < split.spans; ++s) {
      const int64_t early = n * split.batch, late = std::min(tokens, early + split.batch);
      const int64_t first = s * split.span, here = std::min(blocks, first + split.span) - first;
      A* sums = scratch<A, Slot::sums>((late - early) * here * C);
      A* packed = scratch<A, Slot::right>(number * I * here * C);
      A* room = scratch<A, Slot::left>(number * kTall * I);
      const A** left = scratch<const A*, Slot::pointers>(number);
      std::fill(sums, sums + (late - early) * here * C, A(0));
      const auto sum_of = [&](int64_t t, int64_t b) { return sums + (b * (late - early) + t - early) * C; };
      const auto width = [&](int64_t b) { return H - (first + b) * C; };
      for (int64_t e = 0, begin = 0; e < E; begin = ends[e++]) {
        const int64_t start = std::lower_bound(token + begin, token + ends[e], early) - token;
        const int64_t stop = std::lower_bound(token + start, token + ends[e], late) - token;
        if (start == stop) continue;
        for (int64_t j = 0; j < number; ++j)
          for (int64_t i = 0; i < I; ++i)
            for (int64_t b = 0; b < here; ++b)
              pack(w[j] + (e * I + i) * H + (first + b) * C, width(b), packed + ((b * number + j) * I + i) * C);
        for (int64_t r = start; r < stop; r += kTall) {
          const int64_t many = std::min<int64_t>(kTall, stop - r);
          for (int64_t j = 0; j < number; ++j) left[j] = wide<T>(rows[j] + r * I, many * I, room + j * kTall * I);
          for (int64_t b = 0; b < here; ++b)
            sized<kTall>(many, [&](auto tall) {
              constexpr int M = decltype(tall)::value;
              Vector<A> block[M][kWide] = {};
              for (int m = 0; m < M; ++m)
                for (int c = 0; c < C; c += 64 / int(sizeof(A))) __builtin_prefetch(sum_of(token[r + m], b) + c, 1);
              for (int64_t j = 0; j < number; ++j)
                add_products<A, M>(left[j], I, 1, packed + (b * number + j) * I * C, I, block);
#pragma GCC unroll 16
              for (int m = 0; m < M; ++m) {
                A* sum = sum_of(token[r + m], b);
#pragma GCC unroll 16
                for (int c = 0; c < kWide; ++c) store(sum + c * L, load(sum + c * L) + block[m][c]);
              }
            });
        }
      }
      for (int64_t t = early; t < late; ++t)
        for (int64_t b = 0; b < here; ++b) unpack<T>(sum_of(t, b), width(b), out + t * H + (first + b) * C);
    }
}

// out[j][e] = sum over the pairs r of e of the outer product of rows[j][r] and x[token[r]]: [R, I] to [E, I, H].
template <class T>
void outer(int64_t number, const T* const* rows, const T* x, const int64_t* token, const int64_t* ends, int64_t E,
           int64_t I, int64_t H, T* const* out) {
#ifdef ONN_TILES
  if constexpr (std::is_same_v<T, bfloat16>)
    if (tiles::allowed()) return tiles::outer(number, rows, x, token, ends, E, I, H, out);
#endif
  using A = Sum<T>;
  constexpr int C = Lanes<A>::columns, L = Lanes<A>::number;
  const int64_t blocks = covering(H, C), span = span_of(blocks, E), spans = covering(blocks, span);
#pragma omp parallel for schedule(dynamic) collapse(2)
  for (int64_t e = 0; e < E; ++e)
    for (int64_t s = 0; s < spans; ++s) {
      const int64_t first = s * span, here = std::min(blocks, first + span) - first;
      const int64_t start = e ? ends[e - 1] : 0, all = ends[e] - start;
      A* packed = scratch<A, Slot::right>(std::min(all, kDeep) * span * C);
      A* sums = scratch<A, Slot::sums>(all > kDeep ? number * I * span * C : 0);
      A* room = scratch<A, Slot::left>(std::min(all, kDeep) * I);
      int64_t r = start;
      do {
        const int64_t deep = std::min(kDeep, ends[e] - r);
        for (int64_t k = 0; k < deep; ++k)
          for (int64_t b = 0; b < here; ++b)
            pack(x + token[r + k] * H + (first + b) * C, H - (first + b) * C, packed + (b * deep + k) * C);
        for (int64_t j = 0; j < number; ++j) {
          const A* left = wide<T>(rows[j] + r * I, deep * I, room);
          for (int64_t i = 0; i < I; i += kTall)
            sized<kTall>(std::min<int64_t>(kTall, I - i), [&](auto tall) {
              constexpr int M = decltype(tall)::value;
              for (int64_t b = 0; b < here; ++b) {
                A* held = sums + ((j * I + i) * here + b * M) * C;
                Vector<A> block[M][kWide] = {};
                if (r > start) {
#pragma GCC unroll 32
                  for (int k = 0; k < M * kWide; ++k) block[k / kWide][k % kWide] = load(held + k * L);
                }
                add_products<A, M>(left + i, 1, I, packed + b * deep * C, deep, block);
                if (r + deep < ends[e]) {
#pragma GCC unroll 32
                  for (int k = 0; k < M * kWide; ++k) store(held + k * L, block[k / kWide][k % kWide]);
                } else {
#pragma GCC unroll 16
                  for (int m = 0; m < M; ++m)
                    unpack<T>(block[m], H - (first + b) * C, out[j] + (e * I + i + m) * H + (first + b) * C);
                }
              }
            });
        }
        r += deep;
      } while (r < ends[e]);
    }
}

}  // namespace

using Number = ONN_NUMBER;
using Wide = Sum<Number>;

// Each call tells with how many threads torch computes: a thread that torch has not seen would take all processors.
extern "C" {
void onn_count(int64_t crew, const Number* weights, int64_t tokens, int64_t E, int64_t blocks, int64_t* starts,
               int64_t* ends, int64_t* most) {
  use_threads(crew);
  count(weights, tokens, E, blocks, starts, ends, most);
}
void onn_list(int64_t crew, const Number* weights, int64_t tokens, int64_t E, int64_t blocks, int64_t* starts,
              int64_t* token, Wide* weight) {
  use_threads(crew);
  list(weights, tokens, E, blocks, starts, token, weight);
}
void onn_project(int64_t crew, int64_t number, const Number* x, const Number* const* w, const int64_t* token,
                 const int64_t* ends, int64_t E, int64_t I, int64_t H, Number* const* out) {
  use_threads(crew);
  project<Number>(number, x, w, token, ends, E, I, H, out);
}
void onn_combine(int64_t crew, int64_t number, const Number* const* rows, const Number* const* w,
                 const int64_t* token, const int64_t* ends, int64_t E, int64_t I, int64_t H, int64_t tokens,
                 Number* out) {
  use_threads(crew);
  combine<Number>(number, rows, w, token, ends, E, I, H, tokens, out);
}
void onn_outer(int64_t crew, int64_t number, const Number* const* rows, const Number* x, const int64_t* token,
               const int64_t* ends, int64_t E, int64_t I, int64_t H, Number* const* out) {
  use_threads(crew);
  outer<Number>(number, rows, x, token, ends, E, I, H, out);
}
void onn_activate(int64_t crew, const Number* h1, const Number* h3, const Wide* weight, int64_t R, int64_t I,
                  Number* out) {
  use_threads(crew);
  activate(h1, h3, weight, R, I, out);
}
void onn_local(int64_t crew, const Number* h1, const Number* h3, const Number* u, const Wide* weight,
               const int64_t* token, const int64_t* ends, int64_t E, int64_t I, Number* c1, Number* c3, Number* a,
               Number* d_weights, const Wide* of_x, const Wide* of_dy, Wide* surprise) {
  use_threads(crew);
  local<Number>(h1, h3, u, weight, token, ends, E, I, c1, c3, a, d_weights, of_x, of_dy, surprise);
}
void onn_spread(int64_t crew, const Wide* values, const int64_t* token, const int64_t* ends, int64_t E, Wide* out) {
  use_threads(crew);
  spread(values, token, ends, E, out);
}
void onn_lengths(int64_t crew, const Number* x, int64_t R, int64_t H, Wide* out) {
  use_threads(crew);
  lengths<Number>(x, R, H, out);
}
void onn_total(int64_t crew, const Number* rows, const Wide* scale, const int64_t* token, const int64_t* ends,
               int64_t E, int64_t I, Wide* out) {
  use_threads(crew);
  total<Number>(rows, scale, token, ends, E, I, out);
}
void onn_least(int64_t crew, const Wide* surprise, const int64_t* token, const int64_t* ends, int64_t E,
               int64_t tokens, int64_t most, int64_t* kept, int64_t* kept_token, int64_t* kept_ends) {
  use_threads(crew);
  least(surprise, token, ends, E, tokens, most, kept, kept_token, kept_ends);
}
}
