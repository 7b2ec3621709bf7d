// The products of native.cpp in bfloat16 on CPUs that multiply tiles: [16, 32] by [32, 16], summed in float.
//
// What is multiplied is packed into tiles of 1 KiB, filled up with zeros: `left` ones hold 16 rows of 32 numbers,
// `right` ones 16 rows of 16 pairs, the numbers 2k and 2k + 1 of the summed dimension for each column.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "lanes.h"
#include "work.h"

namespace {
namespace tiles {

constexpr int kSide = 16, kDepth = 32, kSize = kSide * kDepth;

// The kernel gives the tile registers to a process that asks for them.
bool allowed() {
  constexpr int request_permission = 0x1023, tile_data = 18;
  static const bool given = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return given;
}

// Tile registers of full size for as long as it lives.
class Registers {
 public:
  Registers() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) config.bytes[t] = 64, config.rows[t] = kSide;
    _tile_loadconfig(&config);
  }
  ~Registers() { _tile_release(); }
};

// sums [M, N] tiles of 16 x 16 = left [M, depth] times right [N, depth].
template <int M, int N>
void multiply(const bfloat16* left, const bfloat16* right, int64_t depth, float* sums) {
  constexpr int bytes = 64;
  const int64_t next = depth * kSize;
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (M > 1) _tile_zero(2);
  if constexpr (M > 1 && N > 1) _tile_zero(3);
  for (int64_t k = 0; k < depth; ++k, left += kSize, right += kSize) {
    _tile_loadd(4, left, bytes);
    _tile_loadd(6, right, bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(7, right + next, bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M > 1) {
      _tile_loadd(5, left + next, bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, bytes);
  if constexpr (N > 1) _tile_stored(1, sums + 256, bytes);
  if constexpr (M > 1) _tile_stored(2, sums + N * 256, bytes);
  if constexpr (M > 1 && N > 1) _tile_stored(3, sums + 3 * 256, bytes);
}

// Calls `take(m, n, wide, sums)` for every `wide` tiles side by side, one or two, of [rows, columns] tiles.
template <class Take>
void multiply_all(const bfloat16* left, const bfloat16* right, int64_t rows, int64_t columns, int64_t depth,
                  Take&& take) {
  alignas(64) float sums[4 * 256];
  for (int64_t m = 0; m < rows; m += 2)
    for (int64_t n = 0; n < columns; n += 2)
      sized<2>(std::min<int64_t>(2, rows - m), [&](auto tall) {
        sized<2>(std::min<int64_t>(2, columns - n), [&](auto wide) {
          constexpr int M = decltype(tall)::value, N = decltype(wide)::value;
          multiply<M, N>(left + m * depth * kSize, right + n * depth * kSize, depth, sums);
          for (int k = 0; k < M; ++k) take(m + k, n, wide, sums + k * N * 256);
        });
      });
}

typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(64)));

// Up to 32 numbers, filled up with zeros.
Halves loaded(const bfloat16* from, int64_t size) {
  if (size >= kDepth) {
    Halves all;
    std::memcpy(&all, from, sizeof all);
    return all;
  }
  return (Halves)_mm512_maskz_loadu_epi16(size > 0 ? (__mmask32(1) << size) - 1 : 0, from);
}

template <int S, int... J>
void transpose_step(Words (&rows)[kSide], std::integer_sequence<int, J...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i)
    if (!(i & S)) {
      const Words a = rows[i], b = rows[i + S];
      rows[i] = __builtin_shufflevector(a, b, (J & S ? kSide + J - S : J)...);
      rows[i + S] = __builtin_shufflevector(a, b, (J & S ? kSide + J : J + S)...);
    }
}
void transpose(Words (&rows)[kSide]) {
  const auto lanes = std::make_integer_sequence<int, kSide>{};
  transpose_step<8>(rows, lanes);
  transpose_step<4>(rows, lanes);
  transpose_step<2>(rows, lanes);
  transpose_step<1>(rows, lanes);
}

// Left tiles [1, depth] of up to 16 rows of numbers, from `row(m)`.
template <class Row>
void pack_rows(int64_t rows, int64_t width, int64_t depth, Row&& row, bfloat16* to) {
  for (int64_t m = 0; m < kSide; ++m)
    for (int64_t k = 0; k < depth; ++k) {
      const Halves part = m < rows ? loaded(row(m) + k * kDepth, width - k * kDepth) : Halves{};
      std::memcpy(to + k * kSize + m * kDepth, &part, sizeof part);
    }
}

// Right tiles [1, depth] whose columns are up to 16 rows of numbers, one after the other.
void pack_columns(const bfloat16* from, int64_t rows, int64_t width, int64_t depth, bfloat16* to) {
  for (int64_t k = 0; k < depth; ++k) {
    Words block[kSide];
#pragma GCC unroll 16
    for (int n = 0; n < kSide; ++n)
      block[n] = n < rows ? (Words)loaded(from + n * width + k * kDepth, width - k * kDepth) : Words{};
    transpose(block);
    std::memcpy(to + k * kSize, block, sizeof block);
  }
}

// The halves of two rows from `F` on, number by number in turn.
template <int F, int... J>
Halves mixed(Halves even, Halves odd, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(even, odd, (J % 2 ? kDepth + F + J / 2 : F + J / 2)...);
}

// Right tiles [columns, depth] of rows of `width` numbers; there are no more where a pointer is null.
void pack_pairs(const bfloat16* const* rows, int64_t width, int64_t columns, int64_t depth, bfloat16* to) {
  const auto lanes = std::make_integer_sequence<int, kDepth>{};
  for (int64_t k = 0; k < depth * kSide; ++k) {
    const bfloat16 *first = rows[2 * k], *second = rows[2 * k + 1];
    bfloat16* tile = to + k / kSide * kSize + k % kSide * kDepth;
    for (int64_t n = 0; n < columns; n += 2, tile += 2 * depth * kSize) {
      const int64_t left = width - n * kSide;
      const Halves even = first ? loaded(first + n * kSide, left) : Halves{};
      const Halves odd = second ? loaded(second + n * kSide, left) : Halves{};
      const Halves low = mixed<0>(even, odd, lanes), high = mixed<kSide>(even, odd, lanes);
      std::memcpy(tile, &low, sizeof low);
      if (n + 1 < columns) std::memcpy(tile + depth * kSize, &high, sizeof high);
    }
  }
}

// Up to 16 sums as bfloat16.
void put(Vector<float> sums, int64_t size, bfloat16* to) {
  const __m256i narrow = (__m256i)_mm512_cvtneps_pbh((__m512)sums);
  _mm256_mask_storeu_epi16(to, size >= kSide ? 0xffff : (1 << size) - 1, narrow);
}

// Up to 32 sums as bfloat16: where there are as many, a whole line of a cache at once.
void put(Vector<float> low, Vector<float> high, int64_t size, bfloat16* to) {
  const __m512i narrow = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  _mm512_mask_storeu_epi16(to, size >= kDepth ? ~__mmask32(0) : (__mmask32(1) << size) - 1, narrow);
}

// Up to 16 numbers from `from` to `to`.
void move(const bfloat16* from, int64_t size, bfloat16* to) {
  if (size == kSide)
    std::memcpy(to, from, kSide * sizeof(bfloat16));
  else
    std::memcpy(to, from, size * sizeof(bfloat16));
}

// Left tiles [1, depth] of up to 16 rows from `first` on, each the numbers of all products [., I] one after the other.
void pack_products(const bfloat16* const* products, int64_t number, int64_t I, int64_t first, int64_t rows,
                   int64_t depth, bfloat16* to) {
  if (rows < kSide || number * I % kDepth) std::memset(to, 0, depth * kSize * sizeof(bfloat16));
  for (int64_t m = 0; m < std::min<int64_t>(kSide, rows); ++m)
    for (int64_t j = 0, at = 0; j < number; ++j)
      for (int64_t i = 0; i < I;) {
        const int64_t size = std::min(I - i, kSide - at % kSide);
        move(products[j] + (first + m) * I + i, size, to + at / kDepth * kSize + m * kDepth + at % kDepth);
        i += size, at += size;
      }
}

// Up to 16 numbers in the lower half of 16 words.
Words spaced(const bfloat16* from, int64_t size) {
  const __mmask16 there = size >= kSide ? 0xffff : (1 << size) - 1;
  return (Words)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from));
}

// Left tiles [1, depth] of up to 16 columns of `number` rows [., I].
void pack_transposed(const bfloat16* from, int64_t number, int64_t I, int64_t columns, int64_t depth, bfloat16* to) {
  for (int64_t k = 0; k < depth; ++k) {
    Words pairs[kSide];
#pragma GCC unroll 16
    for (int m = 0; m < kSide; ++m) {
      const int64_t r = k * kDepth + 2 * m;
      pairs[m] = r < number ? spaced(from + r * I, columns) : Words{};
      if (r + 1 < number) pairs[m] |= spaced(from + (r + 1) * I, columns) << 16;
    }
    transpose(pairs);
    std::memcpy(to + k * kSize, pairs, sizeof pairs);
  }
}

// As in native.cpp.
void project(int64_t number, const bfloat16* x, const bfloat16* const* w, const int64_t* token, const int64_t* ends,
             int64_t E, int64_t I, int64_t H, bfloat16* const* out) {
  const int64_t depth = covering(H, kDepth), neurons = covering(I, kSide);
  const std::vector<Task> tasks = tasks_of(ends, E, std::max<int64_t>(128, (E ? ends[E - 1] : 0) / (4 * threads())));
#pragma omp parallel for schedule(dynamic)
  for (size_t k = 0; k < tasks.size(); ++k) {
    const Registers registers;
    const auto [e, start, stop] = tasks[k];
    bfloat16* right = scratch<bfloat16, Slot::right>(number * neurons * depth * kSize);
    bfloat16* left = scratch<bfloat16, Slot::left>(2 * depth * kSize);
    for (int64_t j = 0; j < number; ++j)
      for (int64_t n = 0; n < neurons; ++n)
        pack_columns(w[j] + (e * I + n * kSide) * H, I - n * kSide, H, depth,
                     right + (j * neurons + n) * depth * kSize);
    for (int64_t r = start; r < stop; r += 2 * kSide) {
      const int64_t rows = std::min<int64_t>(2 * kSide, stop - r), tall = covering(rows, kSide);
      for (int64_t m = 0; m < tall; ++m) {
        const auto source = [&](int64_t row) { return x + token[r + m * kSide + row] * H; };
        pack_rows(rows - m * kSide, H, depth, source, left + m * depth * kSize);
      }
      multiply_all(left, right, tall, number * neurons, depth, [&](int64_t m, int64_t n, auto wide, const float* sums) {
        for (int64_t c = n; c < n + wide; ++c, sums += 256) {
          const int64_t j = c / neurons, i = c % neurons * kSide;
          for (int64_t row = 0; row < std::min<int64_t>(kSide, rows - m * kSide); ++row)
            put(load(sums + row * kSide), I - i, out[j] + (r + m * kSide + row) * I + i);
        }
      });
    }
  }
}

void combine(int64_t number, const bfloat16* const* rows, const bfloat16* const* w, const int64_t* token,
             const int64_t* ends, int64_t E, int64_t I, int64_t H, int64_t tokens, bfloat16* out) {
  const int64_t depth = covering(number * I, kDepth), columns = covering(H, kSide);
  const Split split(tokens, columns, kSide * sizeof(float));
#pragma omp parallel for schedule(dynamic) collapse(2)
  for (int64_t n = 0; n < split.batches; ++n)
    for (int64_t s = 0; s < split.spans; ++s) {
      const Registers registers;
      const int64_t early = n * split.batch, late = std::min(tokens, early + split.batch);
      const int64_t first = s * split.span, here = std::min(columns, first + split.span) - first;
      const int64_t width = std::min(H - first * kSide, here * kSide);
      float* sums = scratch<float, Slot::sums>((late - early) * here * kSide);
      bfloat16* right = scratch<bfloat16, Slot::right>(here * depth * kSize);
      bfloat16* left = scratch<bfloat16, Slot::left>(2 * depth * kSize);
      std::memset(sums, 0, (late - early) * here * kSide * sizeof(float));
      for (int64_t e = 0, begin = 0; e < E; begin = ends[e++]) {
        const int64_t start = std::lower_bound(token + begin, token + ends[e], early) - token;
        const int64_t stop = std::lower_bound(token + start, token + ends[e], late) - token;
        if (start == stop) continue;
        const bfloat16** neurons = scratch<const bfloat16*, Slot::pointers>(depth * kDepth);
        std::fill(neurons, neurons + depth * kDepth, nullptr);
        for (int64_t j = 0; j < number; ++j)
          for (int64_t i = 0; i < I; ++i) neurons[j * I + i] = w[j] + (e * I + i) * H + first * kSide;
        pack_pairs(neurons, width, here, depth, right);
        float *own[2 * kSide], *next[2 * kSide];
        const auto find = [&](int64_t r, float** rows_of_sums) {
          const int64_t many = std::clamp<int64_t>(stop - r, 0, 2 * kSide);
          for (int64_t k = 0; k < many; ++k) rows_of_sums[k] = sums + (token[r + k] - early) * here * kSide;
          return many;
        };
        int64_t many = find(start, next);
        for (int64_t r = start; r < stop; r += 2 * kSide) {
          const int64_t mine = many, tall = covering(mine, kSide);
          std::copy(next, next + mine, own);
          many = find(r + 2 * kSide, next);
          for (int64_t m = 0; m < tall; ++m)
            pack_products(rows, number, I, r + m * kSide, mine - m * kSide, depth, left + m * depth * kSize);
          multiply_all(left, right, tall, here, depth, [&](int64_t m, int64_t c, auto wide, const float* product) {
            const int64_t begin = m * kSide, end = begin + kSide;
            for (int64_t k = begin; k < std::min(many, end); ++k)
              for (int n = 0; n < wide; ++n) __builtin_prefetch(next[k] + (c + n) * kSide, 1);
            for (int64_t k = begin; k < std::min(mine, end); ++k, product += kSide)
              for (int n = 0; n < wide; ++n) {
                float* sum = own[k] + (c + n) * kSide;
                store(sum, load(sum) + load(product + n * 256));
              }
          });
        }
      }
      for (int64_t t = early; t < late; ++t)
        for (int64_t c = 0; c < width; c += kSide)
          put(load(sums + (t - early) * here * kSide + c), width - c, out + t * H + first * kSide + c);
    }
}

void outer(int64_t number, const bfloat16* const* rows, const bfloat16* x, const int64_t* token, const int64_t* ends,
           int64_t E, int64_t I, int64_t H, bfloat16* const* out) {
  int64_t deepest = 1;
  for (int64_t e = 0, start = 0; e < E; start = ends[e++])
    deepest = std::max(deepest, covering(ends[e] - start, kDepth));
  const int64_t neurons = covering(I, kSide), columns = covering(H, kSide);
  const int64_t span = std::min(span_of(columns, E), std::max<int64_t>(2, kSums / 1024 / deepest));
  const int64_t spans = covering(columns, span);
#pragma omp parallel for schedule(dynamic) collapse(2)
  for (int64_t e = 0; e < E; ++e)
    for (int64_t s = 0; s < spans; ++s) {
      const Registers registers;
      const int64_t first = s * span, here = std::min(columns, first + span) - first;
      const int64_t start = e ? ends[e - 1] : 0, depth = covering(ends[e] - start, kDepth);
      bfloat16* right = scratch<bfloat16, Slot::right>(span * depth * kSize);
      bfloat16* left = scratch<bfloat16, Slot::left>(number * neurons * depth * kSize);
      const bfloat16** sources = scratch<const bfloat16*, Slot::pointers>(depth * kDepth);
      std::fill(sources, sources + depth * kDepth, nullptr);
      for (int64_t k = 0; k < ends[e] - start; ++k) sources[k] = x + token[start + k] * H + first * kSide;
      pack_pairs(sources, H - first * kSide, here, depth, right);
      for (int64_t j = 0; j < number; ++j)
        for (int64_t i = 0; i < neurons; ++i)
          pack_transposed(rows[j] + start * I + i * kSide, ends[e] - start, I, I - i * kSide, depth,
                          left + (j * neurons + i) * depth * kSize);
      multiply_all(left, right, number * neurons, here, depth, [&](int64_t m, int64_t c, auto wide, const float* sums) {
        const int64_t j = m / neurons, i = m % neurons * kSide, h = (first + c) * kSide;
        for (int64_t row = 0; row < std::min<int64_t>(kSide, I - i); ++row, sums += kSide) {
          bfloat16* to = out[j] + (e * I + i + row) * H + h;
          if constexpr (wide() == 2)
            put(load(sums), load(sums + 256), H - h, to);
          else
            put(load(sums), H - h, to);
        }
      });
    }
}

}  // namespace tiles
}  // namespace
