// Random cases of layers of experts, gated layers among them: those have one expert and no routing.
#include "moe_experts.h"

#include "instance.h"

namespace pyext {
namespace {

struct Case {
  DType dtype;
  Unit unit;
  Activation activation;
  int64_t experts, rows, in, hidden, down_rows, tokens, choices;
  bool down, routed, save;
  uint64_t seed;
};

struct Instance : Tensors {
  Instance(const Case& c, bool guard_before) : Tensors(c.seed, guard_before) {
    ExpertsProblem& p = problem_;
    p.dtype = c.dtype, p.unit = c.unit, p.activation = c.activation, p.down = c.down;
    p.experts = c.experts, p.rows = c.rows, p.in = c.in, p.hidden = c.hidden, p.down_rows = c.down ? c.down_rows : 0;
    draw_rows(c);
    const bool gated = c.unit == Unit::gated;
    const int64_t lines = c.routed ? c.tokens : c.rows, width = c.down ? c.down_rows : c.hidden;
    auto matrices = [&](int64_t count, int64_t rows, int64_t columns) {
      const View v = layout(count, 1, rows, columns);
      return strided<const void*>(v, filled(v, c.dtype, [&] { return number() / 4; }));
    };
    auto output = [&](const char* name, int64_t rows, int64_t columns) {
      const View v = layout(1, 1, rows, columns);
      return strided<void*>(v, result(name, v, c.dtype));
    };
    // Results that are contiguous; now and then they are not wanted.
    auto flat = [&](const char* name, int64_t count, int64_t rows, int64_t columns, bool wanted) {
      const View v = View::make(count, 1, rows, columns, 0, 0);
      return wanted ? strided<void*>(v, result(name, v, c.dtype)) : Output{};
    };
    p.x = matrices(1, lines, c.in), p.w_gate = matrices(c.experts, c.hidden, c.in);
    if (gated) p.w_up = matrices(c.experts, c.hidden, c.in);
    if (c.down) p.w_down = matrices(c.experts, c.down_rows, c.hidden);
    if (random_.one_in(2)) p.b_gate = matrices(c.experts, 1, c.hidden);
    if (gated && p.b_gate.data) p.b_up = matrices(c.experts, 1, c.hidden);
    if (c.down && random_.one_in(2)) p.b_down = matrices(c.experts, 1, c.down_rows);
    const int64_t pre = c.hidden * (gated ? 2 : 1);
    p.out = output("out", lines, width);
    if (c.save) p.pre_out = output("pre", c.rows, pre);
    p.grad = matrices(1, lines, width), p.pre = matrices(1, c.rows, pre);  // of any numbers, not those of the forward
    const bool weights = !random_.one_in(4), biases = !random_.one_in(4);
    p.grad_x = flat("grad_x", 1, lines, c.in, !random_.one_in(4));
    p.grad_w_gate = flat("grad_w_gate", c.experts, c.hidden, c.in, weights);
    p.grad_b_gate = flat("grad_b_gate", c.experts, 1, c.hidden, biases);
    p.grad_w_up = flat("grad_w_up", c.experts, c.hidden, c.in, gated && weights);
    p.grad_b_up = flat("grad_b_up", c.experts, 1, c.hidden, gated && biases);
    p.grad_w_down = flat("grad_w_down", c.experts, p.down_rows, c.hidden, c.down && !random_.one_in(4));
    p.grad_b_down = flat("grad_b_down", c.experts, 1, p.down_rows, c.down && !random_.one_in(4));
    if (!c.routed || random_.one_in(4)) return;
    const View v = View::make(1, 1, c.tokens, c.choices, 0, 0);
    p.grad_weights = result("grad_weights", v, wide(c.dtype)).data();
  }

  Results run(const KernelTable& kernels, const Parallel& parallel) {
    return run_and_take([&](Results&) {
      kernels.moe_experts_forward(problem_, parallel);
      kernels.moe_experts_backward(problem_, parallel);
    });
  }

 private:
  static DType wide(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

  // Which rows are whose: experts of random sizes, some rows of none, and choices of some of the rows.
  void draw_rows(const Case& c) {
    ExpertsProblem& p = problem_;
    offsets_.assign(static_cast<size_t>(c.experts) + 1, 0);
    const int64_t used = c.routed || random_.one_in(2) ? c.rows - random_.below(c.rows / 4 + 1) : c.rows;
    for (size_t e = 1; e + 1 < offsets_.size(); ++e) offsets_[e] = random_.below(used + 1);
    offsets_.back() = used;
    std::sort(offsets_.begin(), offsets_.end());
    p.offsets = offsets_.data();
    if (!c.routed) return;
    p.tokens = c.tokens, p.choices = c.choices;
    std::vector<int32_t> position(static_cast<size_t>(c.tokens * c.choices), -1);
    std::vector<int32_t> source(static_cast<size_t>(c.rows), -1);
    for (int64_t n = 0; n < used; ++n) {
      const size_t choice = static_cast<size_t>(random_.below(c.tokens * c.choices));
      source[static_cast<size_t>(n)] = static_cast<int32_t>(choice / static_cast<size_t>(c.choices));
      if (position[choice] < 0) position[choice] = static_cast<int32_t>(n);
    }
    p.source = integers(c.rows, [&](int64_t i) { return source[static_cast<size_t>(i)]; });
    p.position = integers(c.tokens * c.choices, [&](int64_t i) { return position[static_cast<size_t>(i)]; });
    p.weights = numbers(c.tokens * c.choices, wide(c.dtype));
  }

  ExpertsProblem problem_;
  std::vector<int64_t> offsets_;
};

}  // namespace

void moe_experts_case(Random& random) {
  const int64_t rows[] = {0, 1, 2, 3, 5, 8, 9, 17, 40, 67, 100, 1100}, sizes[] = {0, 1, 3, 8, 15, 16, 17, 33, 64, 70};
  Case c{};
  c.dtype = static_cast<DType>(random.below(4)), c.activation = static_cast<Activation>(random.below(kActivations));
  c.unit = static_cast<Unit>(random.below(3)), c.experts = random.one_in(3) ? 1 : 1 + random.below(6);
  c.rows = rows[random.below(12)];
  c.in = sizes[random.below(10)], c.hidden = sizes[random.below(10)], c.down_rows = sizes[random.below(10)];
  if (random.one_in(8)) c.in = 300;
  c.down = c.unit != Unit::plain && random.one_in(2), c.save = random.one_in(2);
  c.routed = c.down && random.one_in(2), c.tokens = 1 + random.below(c.rows + 1), c.choices = 1 + random.below(3);
  c.seed = random.next();
  std::string& text = context().text;
  text += name_of(c.dtype) + number_text("unit", static_cast<int>(c.unit));
  text += number_text("activation", static_cast<int>(c.activation)) + number_text("experts", c.experts);
  text += number_text("rows", c.rows) + number_text("in", c.in) + number_text("hidden", c.hidden);
  if (c.down) text += number_text("down_rows", c.down_rows);
  if (c.routed) text += number_text("tokens", c.tokens) + number_text("choices", c.choices);
  check<Instance>(c);
}

}  // namespace pyext
