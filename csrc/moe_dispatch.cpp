// The ops of dispatch and combine: schema, checks of invariants, torch tensors -> problems -> the kernels of the active
// instruction set, or of the GPU. Friendly messages come from Python (pyext/ops/moe_dispatch.py); what is checked here
// protects memory. Numbers of rows and tokens in a routing are checked here on the CPU, and by the kernels on a GPU.
#include "moe_dispatch.h"

#include <tuple>
#include <vector>

#include "moe_tensors.h"

namespace pyext {
namespace {

template <class View>
View rows_of(const Tensor& t) {
  View v;
  if constexpr (std::is_same_v<View, Output>)
    v.data = t.mutable_data_ptr();
  else
    v.data = t.const_data_ptr();
  v.row = t.stride(0);
  return v;
}

void check_matrix(const char* name, const Tensor& t, int64_t rows) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows, name, " must be a matrix of ", rows, " rows");
}

Tensor fresh(const Tensor& like, int64_t rows, int64_t width) {
  Tensor t = empty(like, {rows, width}, like.scalar_type());
  use_huge_pages(t);
  return t;
}

// Which of `rows` rows a choice has, at most one each. position was checked to lie in [-1, rows).
std::vector<uint8_t> used_rows(const Tensor& position, int64_t rows) {
  std::vector<uint8_t> used(static_cast<size_t>(rows));
  const int32_t* data = static_cast<const int32_t*>(position.const_data_ptr());
  const int64_t count = position.numel();
  for (int64_t i = 0; i < count; ++i) {
    if (data[i] < 0) continue;
    uint8_t& mark = used[static_cast<size_t>(data[i])];
    STD_TORCH_CHECK(!mark, "position must name no row twice, got row ", data[i], " again");
    mark = 1;
  }
  return used;
}

// position and source must say the same: the kernel writes the rows that position names, and clears the others.
void check_maps(const Tensor& source, const Tensor& position) {
  const int64_t rows = source.numel(), choices = position.size(1);
  const std::vector<uint8_t> used = used_rows(position, rows);
  const int32_t* token = static_cast<const int32_t*>(source.const_data_ptr());
  const int32_t* row = static_cast<const int32_t*>(position.const_data_ptr());
  for (int64_t n = 0; n < rows; ++n)
    STD_TORCH_CHECK((token[n] >= 0) == (used[static_cast<size_t>(n)] != 0),
                    "source must name a token where position names the row, and only there, but not in row ", n);
  for (int64_t t = 0; t < position.size(0); ++t) {
    for (int64_t k = 0; k < choices; ++k) {
      const int32_t n = row[t * choices + k];
      STD_TORCH_CHECK(n < 0 || token[n] == t, "source must name token ", t, " in row ", n,
                      ", where position puts it, got ", n < 0 ? n : token[n]);
    }
  }
}

Tensor moe_dispatch_forward(const Tensor& x, const Tensor& source, const Tensor& position) {
  STD_TORCH_CHECK(source.dim() == 1 && position.dim() == 2, "source must have one dimension, and position two");
  check_matrix("x", x, position.size(0));
  const Tensor input = readable(x), tokens = routing_map("source", source, x),
               places = routing_map("position", position, x);
  check_range("source", tokens, x.size(0)), check_range("position", places, source.size(0));
  Tensor out = fresh(x, source.size(0), x.size(1));
  DispatchProblem p;
  p.dtype = dtype_of(x);
  p.tokens = x.size(0), p.choices = position.size(1), p.rows = source.size(0), p.width = x.size(1);
  p.source = static_cast<const int32_t*>(tokens.const_data_ptr());
  p.position = static_cast<const int32_t*>(places.const_data_ptr());
  p.x = rows_of<Input>(input), p.out = rows_of<Output>(out);
  run_on_device(
      input, "x", [&] { check_maps(tokens, places), kernels().moe_dispatch_forward(p, parallel()); },
      [&](auto stream) { return pyext_cuda_moe_dispatch_forward(p, stream); });
  return out;
}

// The problem of either direction of combine, without rows of tensors.
struct Combine {
  CombineProblem problem;
  Tensor position;
  MaybeTensor weights;

  Combine(const Tensor& ys, const MaybeTensor& w, const Tensor& places)
      : position(routing_map("position", places, ys)), weights(contiguous(w)) {
    STD_TORCH_CHECK(ys.dim() == 2 && places.dim() == 2, "ys and position must have two dimensions");
    check_range("position", position, ys.size(0));
    STD_TORCH_CHECK(!w || (w->dim() == 2 && w->size(0) == places.size(0) && w->size(1) == places.size(1) &&
                           w->scalar_type() == accumulator(ys) && same_device(*w, ys)),
                    "weights must match position, in the accumulation dtype");
    problem.dtype = dtype_of(ys);
    problem.tokens = places.size(0), problem.choices = places.size(1);
    problem.rows = ys.size(0), problem.width = ys.size(1);
    problem.weights = weights ? weights->const_data_ptr() : nullptr;
    problem.position = static_cast<const int32_t*>(position.const_data_ptr());
  }
};

Tensor moe_combine_forward(const Tensor& ys, const MaybeTensor& weights, const Tensor& position) {
  Combine call(ys, weights, position);
  CombineProblem& p = call.problem;
  const Tensor input = readable(ys);
  Tensor out = fresh(ys, p.tokens, p.width);
  p.ys = rows_of<Input>(input), p.out = rows_of<Output>(out);
  run_on_device(
      input, "ys", [&] { kernels().moe_combine_forward(p, parallel()); },
      [&](auto stream) { return pyext_cuda_moe_combine_forward(p, stream); });
  return out;
}

std::tuple<Tensor, Tensor> moe_combine_backward(const Tensor& grad, const Tensor& ys, const MaybeTensor& weights,
                                                const Tensor& position, bool need_ys, bool need_weights) {
  Combine call(ys, weights, position);
  CombineProblem& p = call.problem;
  check_matrix("grad", grad, p.tokens);
  STD_TORCH_CHECK(grad.size(1) == p.width && grad.scalar_type() == ys.scalar_type() && same_device(grad, ys),
                  "grad must match ys");
  const Tensor upstream = readable(grad), input = readable(ys);
  Tensor grad_ys = need_ys ? fresh(ys, p.rows, p.width) : empty(ys, {0}, ys.scalar_type());
  Tensor grad_weights =
      need_weights ? empty(ys, {p.tokens, p.choices}, accumulator(ys)) : empty(ys, {0}, accumulator(ys));
  p.grad = rows_of<Input>(upstream), p.ys = rows_of<Input>(input);
  if (need_ys) p.grad_ys = rows_of<Output>(grad_ys);
  if (need_weights) p.grad_weights = grad_weights.mutable_data_ptr();
  run_on_device(
      input, "ys",
      [&] {
        std::vector<uint8_t> used;
        if (need_ys) used = used_rows(call.position, p.rows), p.used = used.data();
        kernels().moe_combine_backward(p, parallel());
      },
      [&](auto stream) {
        const Tensor used = empty(ys, {need_ys ? p.rows : 0}, ScalarType::Byte);
        p.used = static_cast<uint8_t*>(used.mutable_data_ptr());
        return pyext_cuda_moe_combine_backward(p, stream);
      });
  return {grad_ys, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def("moe_dispatch_forward(Tensor x, Tensor source, Tensor position) -> Tensor");
  m.def("moe_combine_forward(Tensor ys, Tensor? weights, Tensor position) -> Tensor");
  m.def(
      "moe_combine_backward(Tensor grad, Tensor ys, Tensor? weights, Tensor position, bool need_ys, bool need_weights) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("moe_dispatch_forward", TORCH_BOX(&moe_dispatch_forward));
  m.impl("moe_combine_forward", TORCH_BOX(&moe_combine_forward));
  m.impl("moe_combine_backward", TORCH_BOX(&moe_combine_backward));
}

#if defined(PYEXT_CUDA)
STABLE_TORCH_LIBRARY_IMPL(pyext, CUDA, m) {
  m.impl("moe_dispatch_forward", TORCH_BOX(&moe_dispatch_forward));
  m.impl("moe_combine_forward", TORCH_BOX(&moe_combine_forward));
  m.impl("moe_combine_backward", TORCH_BOX(&moe_combine_backward));
}
#endif

}  // namespace pyext
