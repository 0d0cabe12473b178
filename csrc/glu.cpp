// The ops of gated units: schema, checks of invariants, torch tensors -> GluProblem -> the kernels of the active
// instruction set, or of the GPU. Friendly messages come from Python (pyext/ops/glu.py); what is checked here protects
// memory.
#include "glu.h"

#include <tuple>
#include <vector>

#include "tensors.h"

namespace pyext {
namespace {

// The leading dimensions of tensors that agree in them, as three: (batch, heads, rows), each merged from neighbours
// that every tensor steps through evenly.
struct Leading {
  int64_t size[3] = {1, 1, 1};
  std::vector<Input> strides;  // of each tensor; no addresses
  bool fits = true;            // else there are more than three

  explicit Leading(const std::vector<Tensor>& tensors) : strides(tensors.size()) {
    std::vector<int64_t> last(tensors.size());
    int level = 3;  // the one being merged; 3: none yet
    for (int64_t d = tensors[0].dim() - 2; d >= 0; --d) {
      const int64_t count = tensors[0].size(d);
      if (count == 1) continue;
      bool merges = level < 3;
      for (size_t t = 0; merges && t < tensors.size(); ++t)
        merges = tensors[t].stride(d) == size[level] * stride(t, level);
      if (merges) {
        size[level] *= count;
        continue;
      }
      if (level == 0) {
        fits = false;
        return;
      }
      size[--level] = count;
      for (size_t t = 0; t < tensors.size(); ++t) stride(t, level) = tensors[t].stride(d);
    }
  }
  int64_t& stride(size_t tensor, int level) {
    Input& s = strides[tensor];
    return level == 0 ? s.batch : level == 1 ? s.head : s.row;
  }
};

Tensor fresh(const Tensor& like, int64_t width) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < like.dim(); ++d) sizes.push_back(like.size(d));
  sizes.push_back(width);
  torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.data(), sizes.size());
  Tensor t = torch::stable::new_empty(like, shape);
  use_huge_pages(t);
  return t;
}

template <class Pointer, class Address>
Strided<Pointer> strided(const Input& strides, Address data, int64_t offset_bytes = 0) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return {static_cast<Byte*>(data) + offset_bytes, strides.batch, strides.head, strides.row};
}

void check_same(const char* message, const Tensor& a, const Tensor& b, int64_t last) {
  bool same = a.dim() == b.dim() && a.scalar_type() == b.scalar_type() && same_device(a, b) && b.size(-1) == last;
  for (int64_t d = 0; same && d + 1 < a.dim(); ++d) same = a.size(d) == b.size(d);
  STD_TORCH_CHECK(same, message);
}

// A call's tensors: gate, up (unless packed), grad (in a backward). Results are contiguous.
struct Call {
  GluProblem problem;
  std::vector<Tensor> inputs;
  bool packed;

  Call(const Tensor& gate, const MaybeTensor& up, const Tensor* grad, int64_t activation, bool gate_first,
       bool interleaved)
      : packed(!up) {
    STD_TORCH_CHECK(gate.dim() >= 1, "gate must have at least 1 dimension");
    STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "activation must be an index into ACTIVATIONS");
    STD_TORCH_CHECK(!packed || gate.size(-1) % 2 == 0, "a packed gate must have an even last dimension");
    problem.dtype = dtype_of(gate);
    problem.activation = static_cast<Activation>(activation);
    problem.width = packed ? gate.size(-1) / 2 : gate.size(-1);
    problem.interleaved = packed && interleaved, problem.up_first = packed && !gate_first;
    inputs.push_back(readable(gate));
    if (up) check_same("up must match gate", gate, *up, problem.width), inputs.push_back(readable(*up));
    if (grad) check_same("grad must match the output", gate, *grad, problem.width), inputs.push_back(readable(*grad));
  }

  // Points the problem at the inputs and at `results`: out, or the gradients of gate and up.
  void bind(const std::vector<Tensor>& results) {
    const size_t taken = inputs.size();
    std::vector<Tensor> all = inputs;
    all.insert(all.end(), results.begin(), results.end());
    Leading leading(all);
    if (!leading.fits) {
      for (size_t i = 0; i < taken; ++i) all[i] = inputs[i] = torch::stable::contiguous(inputs[i]);
      leading = Leading(all);
    }
    GluProblem& p = problem;
    p.batch = leading.size[0], p.heads = leading.size[1], p.rows = leading.size[2];
    const int64_t half = p.interleaved ? 0 : p.width * all[0].element_size();
    const int64_t up_at = p.up_first ? 0 : half, gate_at = packed && p.up_first ? half : 0;
    auto read = [&](size_t i, int64_t at) {
      return strided<const void*>(leading.strides[i], all[i].const_data_ptr(), at);
    };
    auto write = [&](size_t i, int64_t at) {
      return strided<void*>(leading.strides[i], all[i].mutable_data_ptr(), at);
    };
    p.gate = read(0, gate_at), p.up = packed ? read(0, up_at) : read(1, 0);
    const bool backward = taken == (packed ? 2u : 3u);
    if (!backward) {
      p.out = write(taken, 0);
      return;
    }
    p.grad = read(taken - 1, 0);
    p.grad_gate = write(taken, gate_at), p.grad_up = packed ? write(taken, up_at) : write(taken + 1, 0);
  }
};

Tensor glu_forward(const Tensor& gate, const MaybeTensor& up, int64_t activation, bool gate_first, bool interleaved) {
  Call call(gate, up, nullptr, activation, gate_first, interleaved);
  Tensor out = fresh(gate, call.problem.width);
  call.bind({out});
  run_on_device(
      gate, "gate", [&] { kernels().glu_forward(call.problem, parallel()); },
      [&](auto stream) { return pyext_cuda_glu_forward(call.problem, stream); });
  return out;
}

std::tuple<Tensor, Tensor> glu_backward(const Tensor& grad, const Tensor& gate, const MaybeTensor& up,
                                        int64_t activation, bool gate_first, bool interleaved) {
  Call call(gate, up, &grad, activation, gate_first, interleaved);
  Tensor grad_gate = fresh(gate, gate.size(-1));
  Tensor grad_up = up ? fresh(*up, up->size(-1)) : empty(gate, {0}, gate.scalar_type());
  call.bind(up ? std::vector<Tensor>{grad_gate, grad_up} : std::vector<Tensor>{grad_gate});
  run_on_device(
      gate, "gate", [&] { kernels().glu_backward(call.problem, parallel()); },
      [&](auto stream) { return pyext_cuda_glu_backward(call.problem, stream); });
  return {grad_gate, grad_up};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def("glu_forward(Tensor gate, Tensor? up, int activation, bool gate_first, bool interleaved) -> Tensor");
  m.def(
      "glu_backward(Tensor grad, Tensor gate, Tensor? up, int activation, bool gate_first, bool interleaved) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("glu_forward", TORCH_BOX(&glu_forward));
  m.impl("glu_backward", TORCH_BOX(&glu_backward));
}

#if defined(PYEXT_CUDA)
STABLE_TORCH_LIBRARY_IMPL(pyext, CUDA, m) {
  m.impl("glu_forward", TORCH_BOX(&glu_forward));
  m.impl("glu_backward", TORCH_BOX(&glu_backward));
}
#endif

}  // namespace pyext
