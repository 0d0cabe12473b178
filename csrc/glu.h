// Gated units, out = act(gate) * up, as the kernels receive them: pointers, sizes, strides. No torch headers here.
#pragma once
#include "strided.h"

namespace pyext {

// In the order of ACTIVATIONS in pyext/_primitives.py.
enum class Activation : int { geglu, geglu_tanh, swiglu, reglu };
constexpr int kActivations = 4;

struct GluProblem {
  DType dtype = DType::f32;
  Activation activation = Activation::geglu;
  int64_t batch = 0, heads = 0, rows = 0, width = 0;  // the leading dimensions as three, and the features of out
  // Gate and up are neighbours: `gate` and `grad_gate` hold both, the gate first unless up_first; `up` is not used.
  bool interleaved = false, up_first = false;
  Input gate, up;

  Output out;  // forward only

  Input grad;  // backward only, like out
  Output grad_gate, grad_up;
};

}  // namespace pyext

// csrc/cuda/glu.cu; stream is a cudaStream_t. They return a cudaError_t: 0 if the launch succeeded.
extern "C" int pyext_cuda_glu_forward(const pyext::GluProblem&, void* stream);
extern "C" int pyext_cuda_glu_backward(const pyext::GluProblem&, void* stream);
