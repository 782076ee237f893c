// Products of small matrices that stay in cache, by blocks whose sums stay in registers.
//
// Rows are contiguous and padded with zeros to whole vectors, so no loop has a remainder of single elements.
#pragma once

#include <cstdint>
#include <cstring>

// How a vector is passed between functions depends on the instruction set. All that pass one here are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace fused_ops {

constexpr int64_t kVectorBytes = 32;  // two of NEON's or SSE's, half of AVX-512's

template <typename Acc>
constexpr int64_t kLanes = kVectorBytes / sizeof(Acc);

template <typename Acc>
struct VectorOf {
  typedef Acc type __attribute__((vector_size(kVectorBytes)));
};
template <typename Acc>
using Vector = typename VectorOf<Acc>::type;

template <typename Acc>
inline Vector<Acc> load(const Acc* p) {
  Vector<Acc> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename Acc>
inline void store(Acc* p, Vector<Acc> v) {
  std::memcpy(p, &v, sizeof(v));
}

template <typename Acc>
inline Acc sum_of_lanes(const Vector<Acc>& v) {
  Acc sums[kLanes<Acc>];
  std::memcpy(sums, &v, sizeof(v));
  for (int64_t width = kLanes<Acc> / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
}

// A matrix whose element (i, j) is data[i·row + j·column]: exchanging the strides transposes it.
template <typename Acc>
struct Strided {
  const Acc* data;
  int64_t row, column;

  Strided at(int64_t i) const { return {data + i * row, row, column}; }
};

// out[m][j] = init[j] + Σ_k a(m, k)·b[k][j] for M rows and V vectors of columns. The sums are held in registers; four
// rows of three vectors are the most that AVX2 has registers for.
template <int M, int V, typename Acc>
inline void product_block(int64_t K, Strided<Acc> a, const Acc* b, int64_t b_row, const Acc* init, Acc* out,
                          int64_t out_row) {
  Vector<Acc> sums[M][V];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sums[m][v] = init ? load(init + v * kLanes<Acc>) : Vector<Acc>{};
  for (int64_t k = 0; k < K; ++k) {
    Vector<Acc> b_k[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) b_k[v] = load(b + k * b_row + v * kLanes<Acc>);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Acc a_mk = a.data[m * a.row + k * a.column];
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sums[m][v] += a_mk * b_k[v];
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) store(out + m * out_row + v * kLanes<Acc>, sums[m][v]);
}

template <int V, typename Acc>
inline void product_columns(int64_t M, int64_t K, Strided<Acc> a, const Acc* b, int64_t b_row, const Acc* init,
                            Acc* out, int64_t out_row) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4) product_block<4, V>(K, a.at(m), b, b_row, init, out + m * out_row, out_row);
  if (M - m == 3) product_block<3, V>(K, a.at(m), b, b_row, init, out + m * out_row, out_row);
  if (M - m == 2) product_block<2, V>(K, a.at(m), b, b_row, init, out + m * out_row, out_row);
  if (M - m == 1) product_block<1, V>(K, a.at(m), b, b_row, init, out + m * out_row, out_row);
}

// out = init + a·b, (M, J) = (M, K)·(K, J), with the columns j along memory and J a multiple of kLanes. init (J,) is
// added to each row, or null.
template <typename Acc>
inline void product(int64_t M, int64_t J, int64_t K, Strided<Acc> a, const Acc* b, int64_t b_row, const Acc* init,
                    Acc* out, int64_t out_row) {
  constexpr int64_t L = kLanes<Acc>;
  int64_t j = 0;
  const auto init_at = [&](int64_t i) { return init ? init + i : nullptr; };
  for (; j + 3 * L <= J; j += 3 * L) product_columns<3>(M, K, a, b + j, b_row, init_at(j), out + j, out_row);
  if (J - j == 2 * L) product_columns<2>(M, K, a, b + j, b_row, init_at(j), out + j, out_row);
  if (J - j == L) product_columns<1>(M, K, a, b + j, b_row, init_at(j), out + j, out_row);
}

// out[m][n] = init[n] + Σ_k a[m][k]·b[n][k] for M rows of a and N rows of b: every lane has sums of its own, which are
// added up in the end.
template <int M, int N, typename Acc>
inline void dots_block(int64_t K, const Acc* a, int64_t a_row, const Acc* b, int64_t b_row, const Acc* init, Acc* out,
                       int64_t out_row) {
  Vector<Acc> sums[M][N] = {};
  for (int64_t k = 0; k < K; k += kLanes<Acc>) {
    Vector<Acc> b_k[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) b_k[n] = load(b + n * b_row + k);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vector<Acc> a_k = load(a + m * a_row + k);
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) sums[m][n] += a_k * b_k[n];
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) out[m * out_row + n] = sum_of_lanes<Acc>(sums[m][n]) + (init ? init[n] : Acc(0));
}

template <int M, typename Acc>
inline void dots_rows(int64_t N, int64_t K, const Acc* a, int64_t a_row, const Acc* b, int64_t b_row, const Acc* init,
                      Acc* out, int64_t out_row) {
  int64_t n = 0;
  const auto init_at = [&](int64_t i) { return init ? init + i : nullptr; };
  for (; n + 3 <= N; n += 3) dots_block<M, 3>(K, a, a_row, b + n * b_row, b_row, init_at(n), out + n, out_row);
  for (; n < N; ++n) dots_block<M, 1>(K, a, a_row, b + n * b_row, b_row, init_at(n), out + n, out_row);
}

// out = init + a·bᵀ, (M, N) = (M, K)·(N, K)ᵀ, with k along memory in both and K a multiple of kLanes.
template <typename Acc>
inline void dots(int64_t M, int64_t N, int64_t K, const Acc* a, int64_t a_row, const Acc* b, int64_t b_row,
                 const Acc* init, Acc* out, int64_t out_row) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4) dots_rows<4>(N, K, a + m * a_row, a_row, b, b_row, init, out + m * out_row, out_row);
  for (; m < M; ++m) dots_rows<1>(N, K, a + m * a_row, a_row, b, b_row, init, out + m * out_row, out_row);
}

}  // namespace fused_ops
