// Stable ranks: how many items of the same bin stand before each item of a sequence, and how many there are in each
// bin. A warp counts a tile of the sequence, sums over the tiles give where each tile begins, and the warp walks its
// tile again and numbers the items. No atomics, no order that depends on anything but the sequence.
#pragma once
#include "vector.h"
#include "warp.h"

namespace pyext {
namespace {

constexpr int kTallyWarps = 4;
constexpr int kTile = 1024;        // items, at least
constexpr int kBinsAtOnce = 2048;  // bins that a warp counts in one walk, in shared memory
constexpr int kAhead = 4;          // items of a lane that are read before the first is counted
constexpr int kParts = 16;         // of the tiles, that threads of a block sum at the same time

// `segments` sequences of `items` items each, whose bins are numbered from 0; what has a negative bin is not counted.
struct Tally {
  int64_t segments = 0, items = 0;
  int bins = 0;
  int64_t tile = kTile, tiles = 0;
  int64_t columns = 0, length = 0;  // groups of bins that a block takes, and the tiles in each of its parts
  int* table = nullptr;   // [segments][tiles][bins]: the items of the tile, later those of the tiles before it
  int* totals = nullptr;  // [segments][bins]

  Tally() = default;
  // A tile has at least as many items as there are bins, so that the table is no larger than the sequences.
  Tally(int64_t segments, int64_t items, int bins)
      : segments(segments),
        items(items),
        bins(bins),
        tile(max_of(kTile, ceil_div(bins, kLanes) * kLanes)),
        tiles(ceil_div(items, tile)),
        columns(ceil_div(bins, kLanes)),
        length(ceil_div(tiles, kParts)) {}
  int64_t entries() const { return segments * tiles * bins; }
};

// Items::bin(segment, i) is the bin of item i. Ranked, Items::put(segment, i, bin, rank) is called for each item once.
template <class Items, bool ranked>
__global__ void __launch_bounds__(kTallyWarps* kLanes) tally_walk(const Items items, const Tally t) {
  PYEXT_SHARED(int, shared);
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes;
  const int span = t.bins < kBinsAtOnce ? t.bins : kBinsAtOnce;
  int* const counts = shared + warp * span;
  for (int64_t unit = int64_t(blockIdx.x) * kTallyWarps + warp; unit < t.segments * t.tiles;
       unit += int64_t(gridDim.x) * kTallyWarps) {
    const int64_t segment = unit / t.tiles, begin = (unit - segment * t.tiles) * t.tile;
    const int64_t end = begin + t.tile < t.items ? begin + t.tile : t.items;
    for (int first = 0; first < t.bins; first += span) {
      int* const table = t.table + unit * t.bins + first;
      const int size = t.bins - first < span ? t.bins - first : span;
      for (int b = lane; b < size; b += kLanes) counts[b] = ranked ? table[b] : 0;
      __syncwarp();
      for (int64_t start = begin; start < end; start += kAhead * kLanes) {
        int found[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const int64_t i = start + j * kLanes + lane;
          found[j] = i < end ? items.bin(segment, i) : -1;
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const int64_t i = start + j * kLanes + lane;
          const int bin = found[j];
          const bool counted = bin >= first && bin < first + size;
          const unsigned same = __match_any_sync(~0u, counted ? bin : -1);
          const int before = __popc(same & ((1u << lane) - 1));
          const int base = counted ? counts[bin - first] : 0;
          __syncwarp();
          if (counted && before == 0) counts[bin - first] = base + __popc(same);
          __syncwarp();
          if constexpr (ranked)
            if (counted || (bin < 0 && first == 0 && i < end)) items.put(segment, i, bin, base + before);
        }
      }
      if constexpr (!ranked)
        for (int b = lane; b < size; b += kLanes) table[b] = counts[b];
      __syncwarp();
    }
  }
}

// Adds up the tiles. threadIdx.x and blockIdx.x: bins of a segment; threadIdx.y: parts of its tiles.
__global__ void __launch_bounds__(kLanes* kParts) tally_scan(const Tally t) {
  PYEXT_SHARED(int, sums);
  const int part = int(threadIdx.y);
  for (int64_t block = blockIdx.x; block < t.segments * t.columns; block += gridDim.x) {
    const int64_t segment = block / t.columns, bin = (block - segment * t.columns) * kLanes + threadIdx.x;
    int* const table = t.table + segment * t.tiles * t.bins + bin;
    const int64_t begin = part * t.length, last = bin < t.bins ? t.tiles : 0;
    const int64_t end = begin + t.length < last ? begin + t.length : last;
    int sum = 0;
    for (int64_t tile = begin; tile < end; ++tile) sum += table[tile * t.bins];
    sums[part * kLanes + threadIdx.x] = sum;
    __syncthreads();
    int before = 0;
    for (int other = 0; other < part; ++other) before += sums[other * kLanes + threadIdx.x];
    if (part == kParts - 1 && bin < t.bins) t.totals[segment * t.bins + bin] = before + sum;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int count = table[tile * t.bins];
      table[tile * t.bins] = before, before += count;
    }
    __syncthreads();  // before the sums are written again
  }
}

// The first place of each bin where bins follow one another, offsets [segments][bins + 1]. A block per segment.
__global__ void __launch_bounds__(kLanes* kParts) tally_offsets(const Tally t, int* offsets) {
  PYEXT_SHARED(int, parts);
  for (int64_t segment = blockIdx.x; segment < t.segments; segment += gridDim.x) {
    int* const to = offsets + segment * (t.bins + 1);
    int before = 0;
    for (int first = 0; first < t.bins; first += int(blockDim.x)) {
      const int bin = first + int(threadIdx.x);
      int total;
      const int own = block_before(bin < t.bins ? t.totals[segment * t.bins + bin] : 0, parts, total);
      if (bin < t.bins) to[bin] = before + own;
      before += total;
    }
    if (threadIdx.x == 0) to[t.bins] = before;
  }
}

template <bool ranked, class Items>
int run_walk(const Items& items, const Tally& t, cudaStream_t stream) {
  if (t.segments * t.tiles == 0) return cudaSuccess;
  const size_t shared = size_t(kTallyWarps) * size_t(min_of(t.bins, kBinsAtOnce)) * sizeof(int);
  const dim3 grid(grid_x(ceil_div(t.segments * t.tiles, kTallyWarps)));
  return ptx::launch(tally_walk<Items, ranked>, grid, dim3(kTallyWarps * kLanes), shared, stream, items, t);
}

// Counts and adds up; with `offsets`, also where bins begin.
template <class Items>
int run_count(const Items& items, const Tally& t, int* offsets, cudaStream_t stream) {
  if (t.segments * t.bins == 0) return cudaSuccess;
  int error = run_walk<false>(items, t, stream);
  const dim3 grid(grid_x(t.segments * t.columns));
  if (!error) error = ptx::launch(tally_scan, grid, dim3(kLanes, kParts), kLanes * kParts * sizeof(int), stream, t);
  if (!error && offsets)
    error = ptx::launch(tally_offsets, dim3(grid_x(t.segments)), dim3(kLanes * kParts), kLanes * sizeof(int), stream, t,
                        offsets);
  return error;
}

}  // namespace
}  // namespace pyext
