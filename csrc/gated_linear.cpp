// The ops of gated feed-forward layers: schema, checks of invariants, torch tensors -> ExpertsProblem, one expert that
// has all rows -> the kernels of the active instruction set. Friendly messages come from Python
// (pyext/ops/gated_linear.py); what is checked here protects memory.
#include <tuple>

#include "moe_experts.h"
#include "tensors.h"

namespace pyext {
namespace {

void check_matrix(const char* message, const Tensor& t, const Tensor& x, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && t.scalar_type() == x.scalar_type() && t.size(0) == rows && t.size(1) == columns,
                  message);
}
Input matrix(const Tensor& t) {
  Input v;
  v.data = t.const_data_ptr(), v.row = t.size(0) == 1 ? 0 : t.stride(0);
  return v;
}
Output new_matrix(const Tensor& t) {
  use_huge_pages(t);
  Output v;
  v.data = t.mutable_data_ptr(), v.row = t.size(1);
  return v;
}

// The weights of a call and the problem without its x.
struct Call {
  ExpertsProblem problem;
  int64_t offsets[2] = {0, 0};
  Tensor x, w_gate;
  MaybeTensor w_up, w_down, kept[3];  // kept: biases, while the problem points at them
  bool packed;

  Call(const Tensor& x_in, const Tensor& gate_in, const MaybeTensor& up_in, const Tensor* down_in, int64_t activation)
      : x(readable_matrix(x_in)), w_gate(readable_matrix(gate_in)), packed(!up_in) {
    ExpertsProblem& p = problem;
    STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "activation must be an index into ACTIVATIONS");
    p.dtype = dtype_of(x), p.activation = static_cast<Activation>(activation);
    p.experts = 1, p.rows = offsets[1] = x.size(0), p.offsets = offsets, p.in = x.size(1),
    p.hidden = packed ? w_gate.size(0) / 2 : w_gate.size(0);
    check_matrix("w_gate must be (N, K) of x's dtype, or (2N, K) without w_up", w_gate, x,
                 packed ? 2 * p.hidden : p.hidden, p.in);
    p.x = matrix(x), p.w_gate = p.w_up = matrix(w_gate);
    if (up_in) {
      w_up = readable_matrix(*up_in);
      check_matrix("w_up must match w_gate", *w_up, x, p.hidden, p.in);
      p.w_up = matrix(*w_up);
    } else {
      p.w_up.data = static_cast<const char*>(p.w_gate.data) + p.hidden * p.w_gate.row * w_gate.element_size();
    }
    if (!down_in) return;
    w_down = readable_matrix(*down_in);
    p.down = true, p.down_rows = w_down->size(0);
    check_matrix("w_down must be (J, N) of x's dtype", *w_down, x, p.down_rows, p.hidden);
    p.w_down = matrix(*w_down);
  }

  static Tensor readable_matrix(const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 2, "x, the weights and grad must have 2 dimensions");
    return readable(t);
  }

  const void* bias(int which, const MaybeTensor& t, int64_t count) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == count && t->scalar_type() == x.scalar_type(),
                    "a bias must have an element of x's dtype for every row of its weight");
    kept[which] = contiguous(t);
    return kept[which]->const_data_ptr();
  }
  void add_biases(const MaybeTensor& gate, const MaybeTensor& up, const MaybeTensor& down) {
    ExpertsProblem& p = problem;
    STD_TORCH_CHECK(!packed || !up, "b_up must be None without w_up");
    p.b_gate.data = bias(0, gate, packed ? 2 * p.hidden : p.hidden);
    p.b_up.data = packed ? second(const_cast<void*>(p.b_gate.data), p.hidden) : bias(1, up, p.hidden);
    p.b_down.data = bias(2, down, p.down_rows);
  }
  // The second half of a packed tensor whose first half has that many elements.
  void* second(void* first, int64_t elements) const {
    return first ? static_cast<char*>(first) + elements * x.element_size() : nullptr;
  }

  std::tuple<Tensor, Tensor> forward(bool save) {
    ExpertsProblem& p = problem;
    Tensor out = empty(x, {p.rows, p.down ? p.down_rows : p.hidden}, x.scalar_type());
    Tensor pre = save ? empty(x, {p.rows, 2 * p.hidden}, x.scalar_type()) : empty(x, {0}, x.scalar_type());
    p.out = new_matrix(out);
    if (save) p.pre_out = new_matrix(pre);
    kernels().moe_experts_forward(p, parallel());
    return {out, pre};
  }

  // grad_x, grad_w_gate, grad_w_up, grad_w_down, grad_b_gate, grad_b_up, grad_b_down
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  Gradients backward(const Tensor& grad_in, const Tensor& pre_in, bool need_x, bool need_w, bool need_b, bool need_down,
                     bool need_b_down) {
    ExpertsProblem& p = problem;
    const Tensor grad = readable_matrix(grad_in), pre = readable_matrix(pre_in);
    check_matrix("grad must match the output", grad, x, p.rows, p.down ? p.down_rows : p.hidden);
    check_matrix("pre must be (M, 2N) of x's dtype", pre, x, p.rows, 2 * p.hidden);
    p.grad = matrix(grad), p.pre = matrix(pre);
    auto gradient = [&](bool needed, Output& to, std::initializer_list<int64_t> shape) {
      if (!needed) return empty(x, {0}, x.scalar_type());
      Tensor t = empty(x, shape, x.scalar_type());
      use_huge_pages(t);
      to.data = t.mutable_data_ptr(), to.row = t.size(t.dim() - 1);
      return t;
    };
    const int64_t rows = w_gate.size(0);
    Tensor dx = gradient(need_x, p.grad_x, {p.rows, p.in});
    Tensor gate = gradient(need_w, p.grad_w_gate, {rows, p.in});
    Tensor up = gradient(need_w && !packed, p.grad_w_up, {rows, p.in});
    Tensor down = gradient(need_down, p.grad_w_down, {p.down_rows, p.hidden});
    Tensor b_gate = gradient(need_b, p.grad_b_gate, {rows});
    Tensor b_up = gradient(need_b && !packed, p.grad_b_up, {rows});
    Tensor b_down = gradient(need_b_down, p.grad_b_down, {p.down_rows});
    if (packed) p.grad_w_up.data = second(p.grad_w_gate.data, p.hidden * p.in);
    if (packed) p.grad_b_up.data = second(p.grad_b_gate.data, p.hidden);
    kernels().moe_experts_backward(p, parallel());
    return {dx, gate, up, down, b_gate, b_up, b_down};
  }
};

std::tuple<Tensor, Tensor> gated_linear_forward(const Tensor& x, const Tensor& w_gate, const MaybeTensor& w_up,
                                                const MaybeTensor& b_gate, const MaybeTensor& b_up, int64_t activation,
                                                bool save) {
  Call call(x, w_gate, w_up, nullptr, activation);
  call.add_biases(b_gate, b_up, {});
  return call.forward(save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_linear_backward(const Tensor& grad, const Tensor& x,
                                                                         const Tensor& pre, const Tensor& w_gate,
                                                                         const MaybeTensor& w_up, int64_t activation,
                                                                         bool need_x, bool need_w, bool need_b) {
  Call call(x, w_gate, w_up, nullptr, activation);
  auto [dx, gate, up, down, b_gate, b_up, b_down] = call.backward(grad, pre, need_x, need_w, need_b, false, false);
  return {dx, gate, up, b_gate, b_up};
}

std::tuple<Tensor, Tensor> gated_mlp_forward(const Tensor& x, const Tensor& w_gate, const MaybeTensor& w_up,
                                             const Tensor& w_down, const MaybeTensor& b_gate, const MaybeTensor& b_up,
                                             const MaybeTensor& b_down, int64_t activation, bool save) {
  Call call(x, w_gate, w_up, &w_down, activation);
  call.add_biases(b_gate, b_up, b_down);
  return call.forward(save);
}

Call::Gradients gated_mlp_backward(const Tensor& grad, const Tensor& x, const Tensor& pre, const Tensor& w_gate,
                                   const MaybeTensor& w_up, const Tensor& w_down, int64_t activation, bool need_x,
                                   bool need_w, bool need_b, bool need_down, bool need_b_down) {
  Call call(x, w_gate, w_up, &w_down, activation);
  return call.backward(grad, pre, need_x, need_w, need_b, need_down, need_b_down);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def(
      "gated_linear_forward(Tensor x, Tensor w_gate, Tensor? w_up, Tensor? b_gate, Tensor? b_up, int activation, "
      "bool save) -> (Tensor, Tensor)");
  m.def(
      "gated_linear_backward(Tensor grad, Tensor x, Tensor pre, Tensor w_gate, Tensor? w_up, int activation, "
      "bool need_x, bool need_w, bool need_b) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gated_mlp_forward(Tensor x, Tensor w_gate, Tensor? w_up, Tensor w_down, Tensor? b_gate, Tensor? b_up, "
      "Tensor? b_down, int activation, bool save) -> (Tensor, Tensor)");
  m.def(
      "gated_mlp_backward(Tensor grad, Tensor x, Tensor pre, Tensor w_gate, Tensor? w_up, Tensor w_down, "
      "int activation, bool need_x, bool need_w, bool need_b, bool need_down, bool need_b_down) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("gated_linear_forward", TORCH_BOX(&gated_linear_forward));
  m.impl("gated_linear_backward", TORCH_BOX(&gated_linear_backward));
  m.impl("gated_mlp_forward", TORCH_BOX(&gated_mlp_forward));
  m.impl("gated_mlp_backward", TORCH_BOX(&gated_mlp_backward));
}

}  // namespace pyext
