// torch tensors -> RotaryProblem, for the rotary op and for attention, which rotates its query and key.
#pragma once
#include "rotary.h"
#include "tensors.h"

namespace pyext {

inline RotaryProblem rotary_problem(const Tensor& x, int64_t half, bool interleaved, bool inverse) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions");
  RotaryProblem p;
  p.dtype = dtype_of(x);
  p.batch = x.size(0), p.heads = x.size(1), p.length = x.size(2), p.head_dim = x.size(3);
  STD_TORCH_CHECK(half >= 0 && 2 * half <= p.head_dim, "the tables must have at most half as many columns as x");
  p.half = half, p.interleaved = interleaved, p.inverse = inverse;
  p.x = view<Input>(x);
  return p;
}

inline void add_positions(RotaryProblem& p, const Tensor& x, const MaybeTensor& positions, int64_t rows) {
  p.table_rows = rows;
  if (!positions) {
    STD_TORCH_CHECK(rows >= p.length, "the tables must have a row for every row of x");
    return;
  }
  STD_TORCH_CHECK(positions->scalar_type() == ScalarType::Long && positions->dim() == 2 &&
                      (positions->size(0) == p.batch || positions->size(0) == 1) && positions->size(1) == p.length,
                  "positions must be int64 (batch or 1, length)");
  STD_TORCH_CHECK(same_device(*positions, x), "positions must be on x's device");
  p.positions = static_cast<const int64_t*>(positions->const_data_ptr());
  p.positions_batch = positions->size(0) == 1 ? 0 : p.length;
  if (positions->is_cuda()) return;  // to read them would be to wait for the device: the kernel looks at each
  for (int64_t n = 0; n < positions->numel(); ++n)
    STD_TORCH_CHECK(p.positions[n] >= 0 && p.positions[n] < rows, "positions must lie in [0, rows of the tables)");
}

inline Input table(const Tensor& t) {
  Input v;
  v.data = t.const_data_ptr();
  v.batch = t.dim() == 2 || t.size(0) == 1 ? 0 : t.stride(0), v.row = t.stride(t.dim() - 2);
  return v;
}

// The arguments of a rotation, kept alive while a kernel reads them.
struct RotaryTables {
  Tensor cos, sin;
  MaybeTensor positions;

  // The problem of rotating x, which must be readable.
  RotaryProblem problem(const Tensor& x, bool interleaved, bool inverse) {
    cos = readable(cos), sin = readable(sin), positions = contiguous(positions);
    const int64_t dims = cos.dim();
    STD_TORCH_CHECK((dims == 2 || dims == 3) && sin.dim() == dims && cos.scalar_type() == sin.scalar_type(),
                    "cos and sin must have the same 2 or 3 dimensions and the same dtype");
    STD_TORCH_CHECK(same_device(cos, x) && same_device(sin, x), "cos and sin must be on x's device");
    for (int64_t d = 0; d < dims; ++d)
      STD_TORCH_CHECK(cos.size(d) == sin.size(d), "cos and sin must have the same shape");
    RotaryProblem p = rotary_problem(x, cos.size(-1), interleaved, inverse);
    STD_TORCH_CHECK(dims == 2 || cos.size(0) == 1 || cos.size(0) == p.batch, "cos must have x's batch size, or 1");
    add_positions(p, x, positions, cos.size(dims - 2));
    p.cos = table(cos), p.sin = table(sin), p.table_dtype = dtype_of(cos);
    return p;
  }
};

}  // namespace pyext
