// Numbers of three dtypes in vectors as long as this CPU has them: loads, stores, sums of lanes, e^x.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace {

// A block of sums is as large as the registers allow: [kRows, kNeurons] of dot products, [kTall, kWide] of vectors.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kRows = 4, kNeurons = 6, kTall = 6, kWide = 4;
#elif defined(__AVX__)
constexpr int kBytes = 32, kRows = 2, kNeurons = 4, kTall = 6, kWide = 2;
#elif defined(__aarch64__)
constexpr int kBytes = 16, kRows = 4, kNeurons = 6, kTall = 6, kWide = 4;
#else
constexpr int kBytes = 16, kRows = 2, kNeurons = 4, kTall = 6, kWide = 2;
#endif

struct bfloat16 {
  uint16_t bits;
};

// Numbers are computed and summed in `Sum`, float for everything narrower.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
struct Lanes {
  typedef A Vector __attribute__((vector_size(kBytes)));
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> Integer;
  typedef Integer Integers __attribute__((vector_size(kBytes)));
  static constexpr int number = kBytes / sizeof(A);
  static constexpr int columns = kWide * number;
};
template <class A>
using Vector = typename Lanes<A>::Vector;

float widened(bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
template <class A>
A widened(A value) {
  return value;
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <class T>
T narrowed(Sum<T> value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return {0x7fc0};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  } else {
    return value;
  }
}

template <class A>
Vector<A> load(const A* from) {
  Vector<A> vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}
Vector<float> load(const bfloat16* from) {
  typedef uint16_t Narrow __attribute__((vector_size(kBytes / 2)));
  typedef uint32_t Wide __attribute__((vector_size(kBytes)));
  Narrow narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  return (Vector<float>)(__builtin_convertvector(narrow, Wide) << 16);
}
template <class A>
void store(A* to, Vector<A> vector) {
  std::memcpy(to, &vector, sizeof vector);
}

void store(bfloat16* to, Vector<float> vector) {
  typedef uint16_t Narrow __attribute__((vector_size(kBytes / 2)));
  typedef uint32_t Wide __attribute__((vector_size(kBytes)));
  const Wide bits = (Wide)vector, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Narrow narrow = __builtin_convertvector(vector == vector ? rounded : Wide{} + 0x7fc0, Narrow);
  std::memcpy(to, &narrow, sizeof narrow);
}

// Calls `f` with `n` as a constant, 1 to `Most`.
template <int Most, class F>
void sized(int64_t n, F&& f) {
  if constexpr (Most == 1) {
    f(std::integral_constant<int, 1>{});
  } else {
    if (n == Most) {
      f(std::integral_constant<int, Most>{});
    } else {
      sized<Most - 1>(n, std::forward<F>(f));
    }
  }
}

// Lane j of the result is a[j] + a[j + S] where bit S of j is 0, and b[j - S] + b[j] elsewhere.
template <int S, class V, int... J>
V folded(V a, V b, std::integer_sequence<int, J...>) {
  constexpr int L = sizeof...(J);
  return __builtin_shufflevector(a, b, (J & S ? L + J - S : J)...) +
         __builtin_shufflevector(a, b, (J & S ? L + J : J + S)...);
}

// Lane j of the result is the sum over the lanes of vector j, of `Number` of them.
template <class A, int Number, int S = 1>
Vector<A> totals(const Vector<A>* vectors) {
  constexpr int L = Lanes<A>::number;
  if constexpr (S == L) {
    return vectors[0];
  } else {
    const Vector<A> even = totals<A, Number, 2 * S>(vectors);
    const auto lanes = std::make_integer_sequence<int, L>{};
    if constexpr (Number > S) {
      return folded<S>(even, totals<A, Number - S, 2 * S>(vectors + S), lanes);
    } else {
      return folded<S>(even, even, lanes);
    }
  }
}

template <class A, int Number>
void put_totals(const Vector<A>* vectors, A* out) {
  constexpr int L = Lanes<A>::number;
  if constexpr (Number > 0) {
    store(out, totals<A, std::min(Number, L)>(vectors));
    put_totals<A, Number - L>(vectors + L, out + L);
  }
}

template <class A>
constexpr A inverse_factorial(int n) {
  A value = 1;
  for (; n > 1; --n) value /= A(n);
  return value;
}

// e^x, to about the last place; infinite from 88.4 (709.4) on, a third before the largest number.
template <class A>
Vector<A> exponential(Vector<A> x) {
  constexpr bool twice = sizeof(A) == 8;
  constexpr int mantissa = twice ? 52 : 23, bias = twice ? 1023 : 127, degree = twice ? 13 : 7;
  constexpr A least = twice ? -708 : -87, most = twice ? 710 : 89, magic = A(3) * (int64_t(1) << (mantissa - 1));
  constexpr A high = twice ? A(0x1.62e42feep-1) : A(0x1.62e4p-1);
  constexpr A low = twice ? A(0x1.a39ef35793c76p-33) : A(0x1.7f7d1cp-20);
  x = x > most ? Vector<A>{} + most : x < least ? Vector<A>{} + least : x;
  const Vector<A> whole = (x * A(1.442695040888963407359924681) + magic) - magic;
  const Vector<A> rest = (x - whole * high) - whole * low;
  Vector<A> sum = Vector<A>{} + inverse_factorial<A>(degree);
#pragma GCC unroll 16
  for (int n = degree - 1; n >= 0; --n) sum = sum * rest + inverse_factorial<A>(n);
  const auto power = __builtin_convertvector(whole, typename Lanes<A>::Integers) + bias;
  return sum * (Vector<A>)(power << mantissa);
}

// Up to all lanes from memory; the others are 0.
template <class T>
Vector<Sum<T>> some(const T* from, int64_t size) {
  constexpr int L = Lanes<Sum<T>>::number;
  if (size >= L) return load(from);
  Sum<T> padded[L] = {};
  for (int64_t l = 0; l < size; ++l) padded[l] = widened(from[l]);
  return load(padded);
}
template <class T>
void store_some(Vector<Sum<T>> vector, int64_t size, T* to) {
  if (size >= Lanes<Sum<T>>::number) return store(to, vector);
  for (int64_t l = 0; l < size; ++l) to[l] = narrowed<T>(vector[l]);
}

// `width` numbers as a block of columns, filled up with zeros.
template <class T>
void pack(const T* from, int64_t width, Sum<T>* to) {
  constexpr int C = Lanes<Sum<T>>::columns, L = Lanes<Sum<T>>::number;
  if (width >= C) {
#pragma GCC unroll 16
    for (int c = 0; c < C; c += L) store(to + c, load(from + c));
  } else {
    for (int64_t c = 0; c < C; ++c) to[c] = c < width ? widened(from[c]) : 0;
  }
}

// The inverse of `pack`.
template <class T>
void unpack(const Sum<T>* block, int64_t width, T* to) {
  constexpr int C = Lanes<Sum<T>>::columns, L = Lanes<Sum<T>>::number;
  if (width >= C) {
#pragma GCC unroll 16
    for (int c = 0; c < C; c += L) store(to + c, load(block + c));
  } else {
    for (int64_t c = 0; c < width; ++c) to[c] = narrowed<T>(block[c]);
  }
}
template <class T>
void unpack(const Vector<Sum<T>> (&block)[kWide], int64_t width, T* to) {
  constexpr int C = Lanes<Sum<T>>::columns, L = Lanes<Sum<T>>::number;
  if (width >= C) {
#pragma GCC unroll 16
    for (int c = 0; c < kWide; ++c) store(to + c * L, block[c]);
  } else {
    Sum<T> sums[C];
#pragma GCC unroll 16
    for (int c = 0; c < kWide; ++c) store(sums + c * L, block[c]);
    unpack<T>(sums, width, to);
  }
}

}  // namespace
