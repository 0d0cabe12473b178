// Relative rows of queries in Hopper's backward. Scores get products of bands, as in the forward
// (attention_hopper_relative.h): from distance to distance where keys stay, and from tile to tile where queries stay.
// There dS is skewed to distances, as dS': with a band behind it, all of a warpgroup's dS' of these 64 distances is
// there, and the gradients of queries and of relative rows are two products of it.
#pragma once
#include "attention_hopper_backward.h"
#include "attention_hopper_relative.h"

namespace pyext {
namespace {

// The order of rows in bands: that in which products are stored without conflicts, and dS' with few.
constexpr RowOrder kBackwardOrder = RowOrder::of_gradients;

// --- For dK and dV ---

// A tile's products of 64 queries and as many keys, by them: of two bands, that of query r and distance d of the upper
// one belongs to key d + r, or, of the lower one, to key d + r - 64. Of each pair one exists. Columns are swizzled by
// multiples of eight, so that what is stored at once, and what is read at once, lies in all 32 banks.
struct SkewedProducts {
  static constexpr int floats = kBand * kBand;
  float* tile;  // of the warpgroup

  PYEXT_DEVICE void store(const float (&lower)[kBand / 8][4], const float (&upper)[kBand / 8][4]) const {
    const int row = threadIdx.x % 128 / 32 * 16 + lane_row(), first = row + lane_column() * 4;
    float* const at = tile + row * kBand;
#pragma unroll
    for (int j = 0; j < kBand / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int below = e / 2 * 8, place = first + below + lane_distance<kBackwardOrder>(j, e);
        at[below * kBand + (place % kBand ^ band_swizzle(lane_row()))] = place < kBand ? upper[j][e] : lower[j][e];
      }
    }
  }

  // Rows of s are keys.
  PYEXT_DEVICE void add_transposed_to(float (&s)[kBand / 8][4]) const {
    const int row = threadIdx.x % 128 / 32 * 16 + lane_row();
#pragma unroll
    for (int j = 0; j < kBand / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = lane_column() + e % 2;
        s[j][e] += tile[(8 * j + column) * kBand + (row + e / 2 * 8 ^ band_swizzle(column))];
      }
    }
  }
};

// In shared memory: steps of relative queries, and a ring of bands. With 128 keys a step of 64 queries needs three, and
// the next one, 64 queries further down, has two of them.
template <class T, int width>
struct RelativeKeyMemory {
  using P = Panels<width>;
  static constexpr int query_stages = width <= 64 ? 2 : 1, band_stages = width <= 64 ? 4 : 3;
  static constexpr int step = P::step_bytes / int(sizeof(T)), count = P::count;
  T rel_queries[query_stages][step], bands[band_stages][step];
  float tiles[kThreads / 128][SkewedProducts::floats];
  uint64_t query_barriers[2 * query_stages], band_barriers[2 * band_stages];

  PYEXT_DEVICE Ring<query_stages> query_ring() { return {query_barriers, query_barriers + query_stages}; }
  PYEXT_DEVICE Ring<band_stages> band_ring() { return {band_barriers, band_barriers + band_stages}; }
  PYEXT_DEVICE T* queries(unsigned n) { return rel_queries[n % query_stages]; }
  PYEXT_DEVICE T* band(unsigned n) { return bands[n % band_stages]; }
  PYEXT_DEVICE SkewedProducts products() { return {tiles[threadIdx.x / 128]}; }
  PYEXT_DEVICE void initialise() { query_ring().initialise(kWarps), band_ring().initialise(kWarps); }
};

// What steps need, by the producer. A step's bands are the last three that are loaded then, the lowest one last.
struct RelativeKeyProducer {
  unsigned bands = 0;                      // so far
  int head = -1, lowest = 0, missing = 0;  // of the step: its lowest band's first distance, and how many are new

  // A step whose first query is so far before the first key.
  PYEXT_DEVICE void next(int distance, int of_head) {
    const bool goes_on = head == of_head && lowest == distance;
    head = of_head, lowest = distance - kBand, missing = goes_on ? 1 : 3, bands += missing;
  }
  template <class Memory>
  PYEXT_DEVICE void load(Memory& memory, unsigned n, const AttentionProblem& p, const Sources& from, int first,
                         int batch) const {
    const auto queries = memory.query_ring();
    queries.wait_empty(n);
    ptx::mbarrier_expect(queries.barrier(n), Memory::P::step_bytes);
    load_panels<Memory::count, kStepRows, kStepRows>(memory.queries(n), from.rel_query, queries.barrier(n), first, head,
                                                     batch);
    for (int i = missing - 1; i >= 0; --i) {
      const unsigned band = bands - 1 - i;
      load_band<Memory::count>(memory.band_ring(), band, memory.band(band), from.rel_rows, p, lowest + i * kBand, head,
                               batch);
    }
  }
};

struct RelativeKeyConsumer {
  unsigned held = 0;  // the first band that is not released

  // The products of step n, whose bands are `last` and the two before; the second warpgroup's are a band further up.
  template <class Memory>
  PYEXT_DEVICE void multiply(Memory& memory, unsigned n, unsigned last) {
    const auto bands = memory.band_ring();
    const auto queries = memory.query_ring();
    const int group = threadIdx.x / 128;
    float lower[1][kN][4], upper[1][kN][4];
    for (; held != last - 2; ++held) bands.release(held);
    queries.wait_full(n);
    bands.wait_full(last - 2), bands.wait_full(last - 1), bands.wait_full(last);
    const auto left = left_of(memory, n);
    ptx::wgmma_pin(flat(lower)), ptx::wgmma_pin(flat(upper));
    ptx::wgmma_fence();
    left.issue_transposed(lower, memory.band(last - group)),
        left.issue_transposed(upper, memory.band(last - group - 1));
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(flat(lower)), ptx::wgmma_pin(flat(upper));
    __syncwarp();  // a lane that comes late could find later phases
    queries.release(n), bands.release(held++);
    ptx::bar_sync(1 + group, 128);  // all have read what is overwritten
    memory.products().store(lower[0], upper[0]);
    ptx::bar_sync(1 + group, 128);  // all have stored theirs
  }

 private:
  // A step's 64 queries, the same for both warpgroups.
  template <class T, int width>
  static PYEXT_DEVICE auto left_of(RelativeKeyMemory<T, width>& memory, unsigned n) {
    return LeftOperand<T, width, width <= 64, kStepRows>(memory.queries(n) - threadIdx.x / 128 * 64 * kPanel);
  }
};

// --- For dQ and the gradients of relative queries and rows ---

// dS' of a warpgroup's queries by two bands of distances, rounded, in the order of rows: of even tiles' upper bands,
// and of odd ones'. What a tile's lower band lacks is in the upper one of the tile before. Rows are swizzled for wgmma.
template <class T>
struct SkewedGradients {
  static constexpr int elements = 2 * kBand * kBand;
  T* bands;  // of the warpgroup

  PYEXT_DEVICE T* upper(unsigned tile) const { return bands + tile % 2 * (kBand * kBand); }
  PYEXT_DEVICE T* lower(unsigned tile) const { return upper(tile + 1); }

  // As a left operand. Query r and column c are at distance c - r, of both bands. Of eight distances d, d % 8 says in
  // which row of the order they stand among those of equal d / 8.
  PYEXT_DEVICE void store(const uint32_t (&ds)[kN / 2][4], unsigned tile) const {
    int lane = threadIdx.x % 32;
    ptx::hide_value(lane);
    const int lane_row = lane / 4, lane_column = lane % 4 * 2, row = threadIdx.x % 128 / 32 * 16 + lane_row;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int distance = lane_column + e - lane_row, d = distance & 7;
      const int octet = (distance - d) / 8 - threadIdx.x % 128 / 32 * 2 + int(tile % 2) * (kBand / 8);
      T* const at = bands + row * kBand + ((d >> 2 & 1 | (d & 1) << 1) ^ lane_row) * 8 + (d >> 1 & 1);
#pragma unroll
      for (int n = -1; n < kN; ++n) {
        const int x = octet + n, place = (x & 3) * 2 + (x >> 3 & 1) * (kBand * kBand);
        T* const to = bands + ((at - bands + place) ^ (x & 4) * 8);
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const int j = n + below;
          if (0 <= j && j < kN) to[below * 8 * kBand].bits = uint16_t(ds[j / 2][j % 2 * 2 + below] >> 16 * e);
        }
      }
    }
  }
};

// sum += a b, issued: a is a tile of 64 x 64 or its transpose, b 64 rows of a tile whose panels have b_rows.
template <class T, bool transpose_a, int b_rows, int N>
PYEXT_DEVICE void issue_shared_product(float (&sum)[1][N][4], const T* a, const T* b) {
  const uint64_t left = ptx::matrix_descriptor(a, kAtomBytes),
                 right = ptx::matrix_descriptor(b, kAtomBytes, b_rows * kPanelBytes);
#pragma unroll
  for (int i = 0; i < kBand / 16; ++i)
    ptx::wgmma<T, transpose_a, true>(flat(sum), left + uint64_t(i * (transpose_a ? kPanelBytes : 2)),
                                     right + uint64_t(i * kPanelBytes), true);
  ptx::wgmma_commit();
}

}  // namespace
}  // namespace pyext
