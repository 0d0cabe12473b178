// The ops of mixtures of experts after routing: schema, checks of invariants, torch tensors -> ExpertsProblem -> the
// kernels of the active instruction set. Friendly messages come from Python (pyext/ops/moe_experts.py); what is checked
// here protects memory, from a routing made by hand too.
#include "moe_experts.h"

#include <tuple>
#include <vector>

#include "tensors.h"

namespace pyext {
namespace {

// What may be asked for: gradients in the order of the results.
struct Needs {
  bool x = false, gate_up = false, down = false, b_gate_up = false, b_down = false, weights = false;
};

Tensor with_dimensions(const Tensor& t, int64_t count, const char* message) {
  STD_TORCH_CHECK(t.dim() == count, message);
  return readable(t);
}
bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  if (t.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t d = 0;
  for (int64_t size : shape)
    if (t.size(d++) != size) return false;
  return true;
}
// A matrix, or one matrix for each expert.
Input matrices(const Tensor& t) {
  const int64_t rows = t.dim() - 2;
  Input v;
  v.data = t.const_data_ptr(), v.row = t.size(rows) == 1 ? 0 : t.stride(rows);
  if (rows) v.batch = t.stride(0);
  return v;
}

// The tensors of a call and the problem that points at them.
struct Call {
  ExpertsProblem problem;
  std::vector<int64_t> offsets;
  std::vector<Tensor> kept;
  const Tensor x;
  const ScalarType dtype;

  Call(const Tensor& x_in, const Tensor& w_in, const Tensor& offsets_in)
      : x(with_dimensions(x_in, 2, "x and xs must have 2 dimensions")), dtype(x.scalar_type()) {
    ExpertsProblem& p = problem;
    const Tensor w = keep(with_dimensions(w_in, 3, "weights must have 3 dimensions"));
    p.dtype = dtype_of(x), p.unit = Unit::plain, p.experts = w.size(0), p.in = x.size(1), p.hidden = w.size(1);
    STD_TORCH_CHECK(w.size(2) == p.in && w.scalar_type() == dtype, "w must be (E, O, I) to match xs");
    p.rows = x.size(0), p.x = matrices(x), p.w_gate = matrices(w);
    const int32_t* from = integers(offsets_in, {p.experts + 1}, "offsets must be (E + 1,) int32");
    offsets.assign(from, from + p.experts + 1), p.offsets = offsets.data();
  }
  Call(const Tensor& x_in, const Tensor& w_gate_up, const Tensor& w_down_in, const Tensor& offsets_in,
       int64_t activation)
      : Call(x_in, w_gate_up, offsets_in) {
    ExpertsProblem& p = problem;
    STD_TORCH_CHECK(activation >= 0 && activation < 2 * kActivations,
                    "activation must be an index into EXPERT_ACTIVATIONS");
    p.unit = activation < kActivations ? Unit::gated : Unit::activated;
    p.activation = static_cast<Activation>(activation % kActivations);
    if (p.unit == Unit::gated) {
      STD_TORCH_CHECK(p.hidden % 2 == 0, "w_gate_up must be (E, 2I, H) for gated experts");
      p.hidden /= 2, p.w_up = p.w_gate;
      p.w_up.data = second(p.w_gate.data, p.hidden * p.w_gate.row);
    }
    const Tensor w_down = keep(with_dimensions(w_down_in, 3, "weights must have 3 dimensions"));
    p.down = true, p.down_rows = w_down.size(1), p.w_down = matrices(w_down);
    STD_TORCH_CHECK(has_shape(w_down, {p.experts, p.down_rows, p.hidden}) && w_down.scalar_type() == dtype,
                    "w_down must be (E, J, I) to match w_gate_up");
  }

  const Tensor& keep(const Tensor& t) { return kept.emplace_back(t); }
  // That many elements further on.
  const void* second(const void* first, int64_t elements) const {
    return first ? static_cast<const char*>(first) + elements * x.element_size() : nullptr;
  }
  const int32_t* integers(const Tensor& t, std::initializer_list<int64_t> shape, const char* message) {
    STD_TORCH_CHECK(has_shape(t, shape) && t.scalar_type() == ScalarType::Int, message);
    return static_cast<const int32_t*>(keep(torch::stable::contiguous(t)).const_data_ptr());
  }
  int64_t pre_width() const { return problem.hidden * (problem.unit == Unit::gated ? 2 : 1); }

  void check_offsets() const {
    bool rise = offsets[0] == 0 && offsets.back() <= problem.rows;
    for (size_t e = 1; e < offsets.size(); ++e) rise = rise && offsets[e - 1] <= offsets[e];
    STD_TORCH_CHECK(rise, "offsets must rise from 0 to the number of rows or less");
  }
  // Rows come from tokens, and go back to them.
  void route(const MaybeTensor& weights_in, const Tensor& source, const Tensor& position) {
    ExpertsProblem& p = problem;
    STD_TORCH_CHECK(source.dim() == 1 && position.dim() == 2, "source must be (N,) int32, position (T, K) int32");
    p.tokens = x.size(0), p.rows = source.size(0), p.choices = position.size(1);
    p.source = integers(source, {p.rows}, "source must be (N,) int32");
    p.position = integers(position, {p.tokens, p.choices}, "position must be (T, K) int32");
    for (int64_t n = 0; n < p.rows; ++n)
      STD_TORCH_CHECK(p.source[n] >= -1 && p.source[n] < p.tokens, "source must hold indices of tokens, or -1");
    check_offsets();
    const char* named = "position must hold each row of an expert once at most, with the token that source gives it";
    std::vector<bool> taken(static_cast<size_t>(p.rows));
    for (int64_t i = 0; i < p.tokens * p.choices; ++i) {
      const int64_t n = p.position[i];
      STD_TORCH_CHECK(n >= -1 && n < offsets.back(), "position must hold indices of rows of experts, or -1");
      if (n < 0) continue;
      STD_TORCH_CHECK(p.source[n] == i / p.choices && !taken[static_cast<size_t>(n)], named);
      taken[static_cast<size_t>(n)] = true;
    }
    STD_TORCH_CHECK(
        weights_in && has_shape(*weights_in, {p.tokens, p.choices}) && weights_in->scalar_type() == accumulator(x),
        "weights must be (T, K) in the accumulation dtype");
    p.weights = keep(torch::stable::contiguous(*weights_in)).const_data_ptr();
  }

  Input bias(const MaybeTensor& t, int64_t columns) {
    if (!t) return {};
    STD_TORCH_CHECK(has_shape(*t, {problem.experts, columns}) && t->scalar_type() == dtype,
                    "a bias must have an element of the dtype of xs for every row of its weight");
    const Tensor& b = keep(torch::stable::contiguous(*t));
    return {b.const_data_ptr(), columns, 0, 0};
  }
  void add_biases(const MaybeTensor& gate_up, const MaybeTensor& down) {
    ExpertsProblem& p = problem;
    p.b_gate = p.b_up = bias(gate_up, pre_width());
    p.b_up.data = second(p.b_gate.data, p.hidden);
    p.b_down = bias(down, p.down_rows);
  }

  Tensor fresh(std::initializer_list<int64_t> shape, Output& to) const {
    Tensor t = empty(x, shape, dtype);
    use_huge_pages(t);
    to.data = t.mutable_data_ptr(), to.row = t.size(t.dim() - 1);
    to.batch = t.dim() == 3 ? t.size(1) * t.size(2) : t.size(t.dim() - 1);
    return t;
  }

  std::tuple<Tensor, Tensor> forward(bool save) {
    ExpertsProblem& p = problem;
    if (!p.position) check_offsets();
    Tensor out = fresh({p.position ? p.tokens : p.rows, p.down ? p.down_rows : p.hidden}, p.out);
    Tensor pre = save ? fresh({p.rows, pre_width()}, p.pre_out) : empty(x, {0}, dtype);
    kernels().moe_experts_forward(p, parallel());
    return {out, pre};
  }

  // dx, dw_gate_up, dw_down, db_gate_up, db_down, dweights
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  Gradients backward(const Tensor& grad_in, const Tensor* pre_in, const Needs& need) {
    ExpertsProblem& p = problem;
    if (!p.position) check_offsets();
    const Tensor grad = with_dimensions(grad_in, 2, "grad must have 2 dimensions");
    STD_TORCH_CHECK(has_shape(grad, {x.size(0), p.down ? p.down_rows : p.hidden}) && grad.scalar_type() == dtype,
                    "grad must match the output");
    p.grad = matrices(grad);
    if (pre_in) {
      const Tensor& pre = keep(with_dimensions(*pre_in, 2, "pre must have 2 dimensions"));
      STD_TORCH_CHECK(has_shape(pre, {p.rows, pre_width()}) && pre.scalar_type() == dtype,
                      "pre must be (N, 2I), or (N, I) for experts that are not gated");
      p.pre = matrices(pre);
    }
    auto gradient = [&](bool needed, Output& to, std::initializer_list<int64_t> shape) {
      return needed ? fresh(shape, to) : empty(x, {0}, dtype);
    };
    Tensor dx = gradient(need.x, p.grad_x, {x.size(0), p.in});
    Tensor gate_up = gradient(need.gate_up, p.grad_w_gate, {p.experts, pre_width(), p.in});
    Tensor down = gradient(need.down, p.grad_w_down, {p.experts, p.down_rows, p.hidden});
    Tensor b_gate_up = gradient(need.b_gate_up, p.grad_b_gate, {p.experts, pre_width()});
    Tensor b_down = gradient(need.b_down, p.grad_b_down, {p.experts, p.down_rows});
    Tensor weights = need.weights ? empty(x, {p.tokens, p.choices}, accumulator(x)) : empty(x, {0}, accumulator(x));
    if (need.weights) p.grad_weights = weights.mutable_data_ptr();
    auto upper = [&](Output to, int64_t elements) {
      to.data = const_cast<void*>(second(to.data, elements));
      return to;
    };
    p.grad_w_up = upper(p.grad_w_gate, p.hidden * p.in), p.grad_b_up = upper(p.grad_b_gate, p.hidden);
    kernels().moe_experts_backward(p, parallel());
    return {dx, gate_up, down, b_gate_up, b_down, weights};
  }
};

Tensor moe_grouped_linear_forward(const Tensor& xs, const Tensor& w, const MaybeTensor& bias, const Tensor& offsets) {
  Call call(xs, w, offsets);
  call.add_biases(bias, {});
  return std::get<0>(call.forward(false));
}

std::tuple<Tensor, Tensor, Tensor> moe_grouped_linear_backward(const Tensor& grad, const Tensor& xs, const Tensor& w,
                                                               const Tensor& offsets, bool need_xs, bool need_w,
                                                               bool need_bias) {
  Call call(xs, w, offsets);
  auto [dxs, dw, down, db, b_down, weights] = call.backward(grad, nullptr, {need_xs, need_w, false, need_bias});
  return {dxs, dw, db};
}

std::tuple<Tensor, Tensor> moe_experts_forward(const Tensor& xs, const Tensor& w_gate_up, const Tensor& w_down,
                                               const MaybeTensor& b_gate_up, const MaybeTensor& b_down,
                                               const Tensor& offsets, int64_t activation, bool save) {
  Call call(xs, w_gate_up, w_down, offsets, activation);
  call.add_biases(b_gate_up, b_down);
  return call.forward(save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_experts_backward(const Tensor& grad, const Tensor& xs,
                                                                        const Tensor& pre, const Tensor& w_gate_up,
                                                                        const Tensor& w_down, const Tensor& offsets,
                                                                        int64_t activation, bool need_xs,
                                                                        bool need_gate_up, bool need_down,
                                                                        bool need_b_gate_up, bool need_b_down) {
  Call call(xs, w_gate_up, w_down, offsets, activation);
  auto [dxs, gate_up, down, b_gate_up, b_down, weights] =
      call.backward(grad, &pre, {need_xs, need_gate_up, need_down, need_b_gate_up, need_b_down});
  return {dxs, gate_up, down, b_gate_up, b_down};
}

std::tuple<Tensor, Tensor> moe_forward(const Tensor& x, const Tensor& w_gate_up, const Tensor& w_down,
                                       const MaybeTensor& b_gate_up, const MaybeTensor& b_down, const Tensor& weights,
                                       const Tensor& offsets, const Tensor& source, const Tensor& position,
                                       int64_t activation, bool save) {
  Call call(x, w_gate_up, w_down, offsets, activation);
  call.add_biases(b_gate_up, b_down);
  call.route(weights, source, position);
  return call.forward(save);
}

Call::Gradients moe_backward(const Tensor& grad, const Tensor& x, const Tensor& pre, const Tensor& w_gate_up,
                             const Tensor& w_down, const MaybeTensor& b_down, const Tensor& weights,
                             const Tensor& offsets, const Tensor& source, const Tensor& position, int64_t activation,
                             bool need_x, bool need_gate_up, bool need_down, bool need_b_gate_up, bool need_b_down,
                             bool need_weights) {
  Call call(x, w_gate_up, w_down, offsets, activation);
  call.add_biases({}, b_down);
  call.route(weights, source, position);
  return call.backward(grad, &pre, {need_x, need_gate_up, need_down, need_b_gate_up, need_b_down, need_weights});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def("moe_grouped_linear_forward(Tensor xs, Tensor w, Tensor? bias, Tensor offsets) -> Tensor");
  m.def(
      "moe_grouped_linear_backward(Tensor grad, Tensor xs, Tensor w, Tensor offsets, bool need_xs, bool need_w, "
      "bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "moe_experts_forward(Tensor xs, Tensor w_gate_up, Tensor w_down, Tensor? b_gate_up, Tensor? b_down, "
      "Tensor offsets, int activation, bool save) -> (Tensor, Tensor)");
  m.def(
      "moe_experts_backward(Tensor grad, Tensor xs, Tensor pre, Tensor w_gate_up, Tensor w_down, Tensor offsets, "
      "int activation, bool need_xs, bool need_gate_up, bool need_down, bool need_b_gate_up, bool need_b_down) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "moe_forward(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor? b_gate_up, Tensor? b_down, Tensor weights, "
      "Tensor offsets, Tensor source, Tensor position, int activation, bool save) -> (Tensor, Tensor)");
  m.def(
      "moe_backward(Tensor grad, Tensor x, Tensor pre, Tensor w_gate_up, Tensor w_down, Tensor? b_down, "
      "Tensor weights, Tensor offsets, Tensor source, Tensor position, int activation, bool need_x, "
      "bool need_gate_up, bool need_down, bool need_b_gate_up, bool need_b_down, bool need_weights) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("moe_grouped_linear_forward", TORCH_BOX(&moe_grouped_linear_forward));
  m.impl("moe_grouped_linear_backward", TORCH_BOX(&moe_grouped_linear_backward));
  m.impl("moe_experts_forward", TORCH_BOX(&moe_experts_forward));
  m.impl("moe_experts_backward", TORCH_BOX(&moe_experts_backward));
  m.impl("moe_forward", TORCH_BOX(&moe_forward));
  m.impl("moe_backward", TORCH_BOX(&moe_backward));
}

}  // namespace pyext
