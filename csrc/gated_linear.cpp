// The ops of gated feed-forward layers: schema.
#include "tensors.h"

namespace pyext {

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

}  // namespace pyext
