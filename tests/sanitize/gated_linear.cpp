// Random cases of the gated layers.
#include "gated_linear.h"

#include "instance.h"

namespace pyext {
namespace {

struct Case {
  DType dtype;
  Activation activation;
  int64_t rows, in, hidden, down_rows;
  bool down, save;
  uint64_t seed;
};

struct Instance : Tensors {
  Instance(const Case& c, bool guard_before) : Tensors(c.seed, guard_before) {
    GatedLinearProblem& p = problem_;
    p.dtype = c.dtype, p.activation = c.activation, p.down = c.down;
    p.rows = c.rows, p.in = c.in, p.hidden = c.hidden, p.down_rows = c.down ? c.down_rows : 0;
    auto matrix = [&](int64_t rows, int64_t columns) {
      const View v = layout(1, 1, rows, columns);
      return strided<const void*>(v, filled(v, c.dtype, [&] { return number() / 4; }));
    };
    auto output = [&](const char* name, int64_t rows, int64_t columns) {
      const View v = layout(1, 1, rows, columns);
      return strided<void*>(v, result(name, v, c.dtype));
    };
    // Results that are contiguous; now and then they are not wanted.
    auto flat = [&](const char* name, int64_t count, bool wanted) -> void* {
      return wanted ? result(name, View::make(1, 1, 1, count, 0, 0), c.dtype).data() : nullptr;
    };
    p.x = matrix(c.rows, c.in), p.w_gate = matrix(c.hidden, c.in), p.w_up = matrix(c.hidden, c.in);
    if (c.down) p.w_down = matrix(c.down_rows, c.hidden);
    if (random_.one_in(2)) p.b_gate = numbers(c.hidden, c.dtype), p.b_up = numbers(c.hidden, c.dtype);
    if (c.down && random_.one_in(2)) p.b_down = numbers(c.down_rows, c.dtype);
    const int64_t width = c.down ? c.down_rows : c.hidden;
    p.out = output("out", c.rows, width);
    if (c.save) p.pre_out = output("pre", c.rows, 2 * c.hidden);
    p.grad = matrix(c.rows, width), p.pre = matrix(c.rows, 2 * c.hidden);  // of any numbers, not those of the forward
    const bool weights = !random_.one_in(4), biases = !random_.one_in(4);
    p.grad_x = flat("grad_x", c.rows * c.in, !random_.one_in(4));
    p.grad_w_gate = flat("grad_w_gate", c.hidden * c.in, weights),
    p.grad_b_gate = flat("grad_b_gate", c.hidden, biases);
    p.grad_w_up = flat("grad_w_up", c.hidden * c.in, weights), p.grad_b_up = flat("grad_b_up", c.hidden, biases);
    p.grad_w_down = flat("grad_w_down", p.down_rows * c.hidden, c.down && !random_.one_in(4));
    p.grad_b_down = flat("grad_b_down", p.down_rows, c.down && !random_.one_in(4));
  }
  Results run(const KernelTable& kernels, const Parallel& parallel) {
    return run_and_take([&](Results&) {
      kernels.gated_linear_forward(problem_, parallel);
      kernels.gated_linear_backward(problem_, parallel);
    });
  }

 private:
  GatedLinearProblem problem_;
};

}  // namespace

void gated_linear_case(Random& random) {
  const int64_t rows[] = {0, 1, 2, 3, 5, 8, 9, 17, 40, 67, 100, 1100}, sizes[] = {0, 1, 3, 8, 15, 16, 17, 33, 64, 70};
  Case c{};
  c.dtype = static_cast<DType>(random.below(4)), c.activation = static_cast<Activation>(random.below(kActivations));
  c.rows = rows[random.below(12)];
  c.in = sizes[random.below(10)], c.hidden = sizes[random.below(10)], c.down_rows = sizes[random.below(10)];
  if (random.one_in(8)) c.in = 300;
  c.down = random.one_in(2), c.save = random.one_in(2);
  c.seed = random.next();
  std::string& text = context().text;
  text += name_of(c.dtype) + number_text("activation", static_cast<int>(c.activation)) + number_text("rows", c.rows);
  text += number_text("in", c.in) + number_text("hidden", c.hidden);
  if (c.down) text += number_text("down_rows", c.down_rows);
  check<Instance>(c);
}

}  // namespace pyext
