// TMA of boxes with 2 to 5 dimensions and every swizzle: in, read by a formula of the kernel's own, and out again. Rows
// of a box are as long as the swizzle's span, or 48 bytes without one.
#include "ptx.h"

namespace pyext {
namespace {

constexpr int threads = 64, most_elements = 8192;

// The 16-byte chunk of row `row` in which chunk `chunk` lies: the rows that share 128 bytes are permuted alike, and
// eight lines of 128 bytes go through all permutations (spans of 64 and 32 bytes have only four and two).
__device__ int swizzled_chunk(int row, int chunk, int span) {
  if (span == 128) return chunk ^ row % 8;
  if (span == 64) return chunk ^ row / 2 % 4;
  if (span == 32) return chunk ^ row / 4 % 2;
  return chunk;
}

template <int rank>
struct Corner {
  int at[rank];
};

template <int rank>
__global__ void boxes_kernel(const __grid_constant__ ptx::TensorMap from, const __grid_constant__ ptx::TensorMap to,
                             Corner<rank> load, Corner<rank> store, int rows, int row_elements, int span,
                             uint16_t* out) {
  PYEXT_SHARED(uint16_t, shared);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + most_elements);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_expect(barrier, rows * row_elements * 2);
    ptx::tma_load(shared, &from, barrier, load.at);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < rows * row_elements; i += threads) {
    const int row = i / row_elements, column = i % row_elements;
    out[i] = shared[row * row_elements + swizzled_chunk(row, column / 8, span) * 8 + column % 8];
  }
  if (threadIdx.x == 0) {
    ptx::tma_store(&to, shared, store.at);
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
  }
}

template <int rank>
int launch_boxes(const void* x, void* y, void* out, const int* sizes, const int* boxes, const int* load_at,
                 const int* store_at, int span, cudaStream_t stream) {
  int64_t size[rank], stride[rank - 1], elements = 1;
  int box[rank], rows = 1;
  Corner<rank> load, store;
  for (int d = 0; d < rank; ++d) {
    size[d] = sizes[d];
    box[d] = boxes[d];
    load.at[d] = load_at[d];
    store.at[d] = store_at[d];
    if (d) stride[d - 1] = elements * 2, rows *= box[d];
    elements *= size[d];
  }
  ptx::TensorMap from, to;
  cudaError_t error = ptx::encode_tensor_map<f16>(&from, x, size, stride, box, span);
  if (!error) error = ptx::encode_tensor_map<f16>(&to, y, size, stride, box, span);
  if (error || rows * box[0] > most_elements) return error ? error : cudaErrorInvalidValue;
  return ptx::launch(boxes_kernel<rank>, dim3(1), dim3(threads), most_elements * 2 + 8, stream, from, to, load, store,
                     rows, box[0], span, static_cast<uint16_t*>(out));
}

}  // namespace
}  // namespace pyext

// Sizes, boxes and corners with the fastest dimension first; x and y are contiguous.
extern "C" int simt_boxes(int rank, const void* x, void* y, void* out, const int* sizes, const int* boxes,
                          const int* load_at, const int* store_at, int span, cudaStream_t stream) {
  using namespace pyext;
  if (rank == 2) return launch_boxes<2>(x, y, out, sizes, boxes, load_at, store_at, span, stream);
  if (rank == 3) return launch_boxes<3>(x, y, out, sizes, boxes, load_at, store_at, span, stream);
  if (rank == 4) return launch_boxes<4>(x, y, out, sizes, boxes, load_at, store_at, span, stream);
  return launch_boxes<5>(x, y, out, sizes, boxes, load_at, store_at, span, stream);
}
