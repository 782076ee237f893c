// Products of small matrices in shared memory, by all threads of a block.
#pragma once

#include "block.cuh"

namespace fused_ops {

// A matrix whose element (i, j) is data[i·row + j·column]: exchanging the strides transposes it.
template <typename Acc>
struct Strided {
  Acc* data;
  int row, column;

  __device__ Acc& operator()(int i, int j) const { return data[i * row + j * column]; }
};

// Calls emit(m, j, Σ_k a(m, k)·b(k, j)) once for each m < M and j < J. A thread holds a tile of 4 x 4 sums in
// registers. The rows and columns of a tile lie far apart, and neighbouring threads have neighbouring columns: these
// are what they read from shared memory at a time. Where tiles are few and sums long, kSplit neighbouring threads share
// a tile: each takes every kSplit-th k, and in the end they add up.
template <int kSplit, typename Acc, typename Emit>
__device__ void product(int M, int J, int K, Strided<Acc> a, Strided<Acc> b, const Emit& emit) {
  constexpr int kTile = 4;
  const int down = (M + kTile - 1) / kTile, across = (J + kTile - 1) / kTile, tiles = down * across;
  const int part = threadIdx.x % kSplit, tile_of_warp = threadIdx.x % kWarp / kSplit;
  // Whole warps go round together, since they exchange sums: what has no tile takes the last, and keeps it to itself.
  for (int first = threadIdx.x / kWarp * (kWarp / kSplit); first < tiles; first += blockDim.x / kSplit) {
    const int tile = min(first + tile_of_warp, tiles - 1), m_0 = tile / across, j_0 = tile % across;
    const Acc *a_m[kTile], *b_j[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      a_m[i] = &a(min(m_0 + i * down, M - 1), 0);
      b_j[i] = &b(0, min(j_0 + i * across, J - 1));
    }

    Acc sums[kTile][kTile] = {};
#pragma unroll 2
    for (int k = part; k < K; k += kSplit) {
      Acc b_k[kTile];
#pragma unroll
      for (int c = 0; c < kTile; ++c) b_k[c] = b_j[c][k * b.row];
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
        const Acc a_k = a_m[r][k * a.column];
#pragma unroll
        for (int c = 0; c < kTile; ++c) sums[r][c] += a_k * b_k[c];
      }
    }

#pragma unroll
    for (int i = 0; i < kTile * kTile; ++i) {
      const int m = m_0 + i / kTile * down, j = j_0 + i % kTile * across;
      const Acc sum = warp_reduce<kSplit>(sums[i / kTile][i % kTile], [](Acc x, Acc y) { return x + y; });
      const bool own = first + tile_of_warp < tiles && i % kSplit == part;
      if (own && m < M && j < J) emit(m, j, sum);
    }
  }
}

}  // namespace fused_ops
