// Random cases of the rotary kernels.
#include "rotary.h"

#include "instance.h"

namespace pyext {
namespace {

struct Case {
  DType dtype, table_dtype;
  int64_t batch, heads, length, head_dim, half, rows;
  bool interleaved, inverse, table_per_batch, positions, positions_per_batch;
  uint64_t seed;
};

struct Instance : Tensors {
  Instance(const Case& c, bool guard_before) : Tensors(c.seed, guard_before) {
    RotaryProblem& p = problem_;
    p.dtype = c.dtype, p.table_dtype = c.table_dtype, p.interleaved = c.interleaved, p.inverse = c.inverse;
    p.batch = c.batch, p.heads = c.heads, p.length = c.length, p.head_dim = c.head_dim, p.half = c.half;
    auto input = [&] {
      const View v = layout(c.batch, c.heads, c.length, c.head_dim);
      return strided<const void*>(v, filled(v, c.dtype, [&] { return number(); }));
    };
    auto table = [&] {
      const View v = layout(c.table_per_batch ? c.batch : 1, 1, c.rows, c.half);
      return broadcast(strided<const void*>(v, filled(v, c.table_dtype, [&] { return number(); })), v);
    };
    p.x = input(), p.grad = input(), p.cos = table(), p.sin = table();
    const View out = layout(c.batch, c.heads, c.length, c.head_dim);
    p.out = strided<void*>(out, result("out", out, c.dtype));
    if (c.positions) {
      positions_.resize(static_cast<size_t>((c.positions_per_batch ? c.batch : 1) * c.length));
      for (int64_t& position : positions_) position = random_.below(c.rows);
      p.positions = positions_.data(), p.positions_batch = c.positions_per_batch ? c.length : 0;
    }
    p.table_batch = c.table_per_batch ? c.batch : 1, p.table_rows = c.rows;
    const DType acc = c.dtype == DType::f64 ? DType::f64 : DType::f32;
    const View gradient = View::make(1, 1, 1, p.table_batch * c.rows * c.half, 0, 0);
    p.grad_cos = result("grad_cos", gradient, acc).data(), p.grad_sin = result("grad_sin", gradient, acc).data();
  }
  Results run(const KernelTable& kernels, const Parallel& parallel) {
    return run_and_take([&](Results&) {
      kernels.rotary_forward(problem_, parallel);
      kernels.rotary_backward(problem_, parallel);
    });
  }

 private:
  RotaryProblem problem_;
  std::vector<int64_t> positions_;
};

}  // namespace

void rotary_case(Random& random) {
  const int64_t dims[] = {0, 1, 2, 7, 8, 16, 24, 33, 64, 80, 130}, lengths[] = {0, 1, 5, 31, 64, 65, 130};
  Case c{};
  c.dtype = static_cast<DType>(random.below(4)), c.table_dtype = static_cast<DType>(random.below(4));
  c.batch = random.below(3), c.heads = random.below(4), c.length = lengths[random.below(7)];
  c.head_dim = dims[random.below(11)], c.half = random.below(c.head_dim / 2 + 1);
  c.rows = c.length + 1 + random.below(4);
  c.interleaved = random.one_in(2), c.inverse = random.one_in(2), c.table_per_batch = random.one_in(2);
  c.positions = random.one_in(2), c.positions_per_batch = random.one_in(2);
  c.seed = random.next();
  std::string& text = context().text;
  text += name_of(c.dtype) + std::string(" tables=") + name_of(c.table_dtype) + number_text("batch", c.batch);
  text += number_text("heads", c.heads) + number_text("length", c.length) + number_text("head_dim", c.head_dim);
  text += number_text("half", c.half) + number_text("interleaved", c.interleaved) + number_text("inverse", c.inverse);
  text += number_text("positions", c.positions) + number_text("table_per_batch", c.table_per_batch);
  check<Instance>(c);
}

}  // namespace pyext
