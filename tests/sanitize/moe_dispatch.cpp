// Random cases of dispatch and combine.
#include "moe_dispatch.h"

#include "instance.h"

namespace pyext {
namespace {

struct Case {
  DType dtype;
  int64_t tokens, choices, unused, width;  // unused: rows that no choice has
  bool weighted, need_ys, need_weights;
  uint64_t seed;
};

struct Instance : Tensors {
  Instance(const Case& c, bool guard_before) : Tensors(c.seed, guard_before) {
    const int64_t all = c.tokens * c.choices;
    std::vector<int32_t> position(static_cast<size_t>(all), -1), source;
    for (int64_t i = 0; i < all; ++i)
      if (!random_.one_in(4))
        position[static_cast<size_t>(i)] = static_cast<int32_t>(source.size()), source.push_back(-1);
    source.resize(source.size() + static_cast<size_t>(c.unused), -1);
    for (size_t i = source.size(); i > 1; --i)  // unused rows anywhere, choices in any order
      exchange(position, static_cast<int32_t>(i) - 1, static_cast<int32_t>(random_.below(static_cast<int64_t>(i))));
    for (int64_t i = 0; i < all; ++i)
      if (position[static_cast<size_t>(i)] >= 0)
        source[static_cast<size_t>(position[static_cast<size_t>(i)])] = static_cast<int32_t>(i / c.choices);
    const int64_t rows = static_cast<int64_t>(source.size());
    for (int32_t token : source) used_.push_back(token >= 0);
    const DType acc = c.dtype == DType::f64 ? DType::f64 : DType::f32;
    auto input = [&](int64_t count) {
      const View v = layout(1, 1, count, c.width);
      return strided<const void*>(v, filled(v, c.dtype, [&] { return number(); }));
    };
    auto output = [&](const char* name, int64_t count) {
      const View v = layout(1, 1, count, c.width);
      return strided<void*>(v, result(name, v, c.dtype));
    };
    DispatchProblem& d = dispatch_;
    d.dtype = c.dtype, d.tokens = c.tokens, d.choices = c.choices, d.rows = rows, d.width = c.width;
    d.source = integers(rows, [&](int64_t i) { return source[static_cast<size_t>(i)]; });
    d.position = integers(all, [&](int64_t i) { return position[static_cast<size_t>(i)]; });
    d.x = input(c.tokens), d.out = output("xs", rows);
    CombineProblem& p = combine_;
    p.dtype = c.dtype, p.tokens = c.tokens, p.choices = c.choices, p.rows = rows, p.width = c.width;
    p.position = d.position, p.weights = c.weighted ? numbers(all, acc) : nullptr;
    p.ys = input(rows), p.out = output("out", c.tokens), p.grad = input(c.tokens);
    p.used = used_.data();
    if (c.need_ys) p.grad_ys = output("grad_ys", rows);
    if (c.need_weights) p.grad_weights = result("grad_weights", View::make(1, 1, 1, all, 0, 0), acc).data();
  }
  Results run(const KernelTable& kernels, const Parallel& parallel) {
    return run_and_take([&](Results&) {
      kernels.moe_dispatch_forward(dispatch_, parallel);
      kernels.moe_combine_forward(combine_, parallel);
      kernels.moe_combine_backward(combine_, parallel);
    });
  }

 private:
  // The choices that have rows a and b have b and a.
  static void exchange(std::vector<int32_t>& position, int32_t a, int32_t b) {
    for (int32_t& row : position) row = row == a ? b : row == b ? a : row;
  }

  DispatchProblem dispatch_;
  CombineProblem combine_;
  std::vector<uint8_t> used_;
};

}  // namespace

void moe_dispatch_case(Random& random) {
  const int64_t widths[] = {0, 1, 3, 7, 8, 15, 16, 17, 33, 64, 100, 130, 1000};
  Case c{};
  c.dtype = static_cast<DType>(random.below(4));
  c.tokens = random.below(20), c.choices = random.below(6), c.unused = random.below(4);
  c.width = widths[random.below(13)];
  if (random.one_in(100)) c.width = 50000, c.tokens = 10;  // now and then more than is kept in caches
  c.weighted = random.one_in(2), c.need_ys = !random.one_in(4), c.need_weights = !random.one_in(4);
  c.seed = random.next();
  std::string& text = context().text;
  text += name_of(c.dtype) + number_text("tokens", c.tokens) + number_text("choices", c.choices);
  text += number_text("unused", c.unused) + number_text("width", c.width) + number_text("weighted", c.weighted);
  text += number_text("need_ys", c.need_ys) + number_text("need_weights", c.need_weights);
  check<Instance>(c);
}

}  // namespace pyext
