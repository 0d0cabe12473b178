// Random cases of the gated units.
#include "glu.h"

#include "instance.h"

namespace pyext {
namespace {

struct Case {
  DType dtype;
  Activation activation;
  int64_t batch, heads, rows, width;
  bool packed, interleaved, up_first;
  uint64_t seed;
};

struct Instance : Tensors {
  Instance(const Case& c, bool guard_before) : Tensors(c.seed, guard_before) {
    GluProblem& p = problem_;
    p.dtype = c.dtype, p.activation = c.activation;
    p.batch = c.batch, p.heads = c.heads, p.rows = c.rows, p.width = c.width;
    p.interleaved = c.packed && c.interleaved, p.up_first = c.packed && c.up_first;
    auto view = [&](int64_t columns) { return layout(c.batch, c.heads, c.rows, columns); };
    auto input = [&](int64_t columns) {
      const View v = view(columns);
      return strided<const void*>(v, filled(v, c.dtype, [&] { return number(); }));
    };
    auto output = [&](const char* name, int64_t columns) {
      const View v = view(columns);
      return strided<void*>(v, result(name, v, c.dtype));
    };
    p.out = output("out", c.width), p.grad = input(c.width);
    const int64_t columns = c.packed ? 2 * c.width : c.width;
    p.gate = input(columns), p.grad_gate = output("grad_gate", columns);
    if (!c.packed) {
      p.up = input(columns), p.grad_up = output("grad_up", columns);
    } else if (!p.interleaved) {
      const int64_t bytes = c.width * (c.dtype == DType::f64 ? 8 : c.dtype == DType::f32 ? 4 : 2);
      p.up = p.gate, p.grad_up = p.grad_gate;
      Input& second = p.up_first ? p.gate : p.up;
      Output& grad_second = p.up_first ? p.grad_gate : p.grad_up;
      second.data = static_cast<const char*>(second.data) + bytes;
      grad_second.data = static_cast<char*>(grad_second.data) + bytes;
    }
  }
  Results run(const KernelTable& kernels, const Parallel& parallel) {
    return run_and_take([&](Results&) {
      kernels.glu_forward(problem_, parallel);
      kernels.glu_backward(problem_, parallel);
    });
  }

 private:
  GluProblem problem_;
};

}  // namespace

void glu_case(Random& random) {
  const int64_t widths[] = {0, 1, 3, 7, 8, 15, 16, 17, 33, 64, 100, 40000};
  Case c{};
  c.dtype = static_cast<DType>(random.below(4)), c.activation = static_cast<Activation>(random.below(kActivations));
  c.width = widths[random.below(12)];
  c.batch = random.below(3), c.heads = 1 + random.below(3), c.rows = c.width > 1000 ? 1 : random.below(9);
  c.packed = random.one_in(2), c.interleaved = random.one_in(2), c.up_first = random.one_in(2);
  c.seed = random.next();
  std::string& text = context().text;
  text += name_of(c.dtype) + number_text("activation", static_cast<int>(c.activation));
  text += number_text("batch", c.batch) + number_text("heads", c.heads) + number_text("rows", c.rows);
  text += number_text("width", c.width) + number_text("packed", c.packed) + number_text("interleaved", c.interleaved);
  text += number_text("up_first", c.up_first);
  check<Instance>(c);
}

}  // namespace pyext
