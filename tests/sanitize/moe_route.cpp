// Random cases of routing.
#include "moe_route.h"

#include "instance.h"

namespace pyext {
namespace {

struct Case {
  DType dtype;
  Policy policy;
  int64_t groups, tokens, experts, top_k, capacity, expert_groups, top_groups;
  bool masked, biased, renormalize, batch_priority;
  uint64_t seed;
};

struct Instance : Tensors {
  Instance(const Case& c, bool guard_before) : Tensors(c.seed, guard_before) {
    RouteProblem& p = problem_;
    const DType acc = c.dtype == DType::f64 ? DType::f64 : DType::f32;
    const bool experts_choose = c.policy == Policy::expert_choice;
    p.dtype = c.dtype, p.policy = c.policy, p.renormalize = c.renormalize, p.batch_priority = c.batch_priority;
    p.groups = c.groups, p.tokens = c.tokens, p.experts = c.experts, p.capacity = c.capacity;
    p.columns = experts_choose ? c.experts : c.top_k;
    p.expert_groups = c.expert_groups, p.top_groups = c.top_groups;
    const int64_t all = c.groups * c.tokens, pairs = all * p.columns;
    p.rows = c.capacity < 0 ? pairs : std::min(pairs, c.groups * c.experts * std::min(c.capacity, c.tokens));
    const View v = layout(1, c.groups, c.tokens, c.experts);
    p.logits = strided<const void*>(v, filled(v, c.dtype, [&] { return fine_number(); }));
    if (c.masked) {
      mask_ = std::make_unique<Memory>(all, 1, guard_before);
      uint8_t* data = static_cast<uint8_t*>(mask_->data());
      for (int64_t t = 0; t < all; ++t) data[t] = !random_.one_in(4);
      p.token_mask = data;
    }
    auto fine_numbers = [&](int64_t count, DType dtype) {
      return filled(View::make(1, 1, 1, count, 0, 0), dtype, [&] { return fine_number(); }).data();
    };
    if (c.biased) p.expert_bias = fine_numbers(c.experts, acc);
    if (c.policy == Policy::gshard) p.uniform = static_cast<const float*>(fine_numbers(all, DType::f32));
    auto output = [&](const char* name, int64_t count, DType dtype) {
      return result(name, View::make(1, 1, 1, count, 0, 0), dtype).data();
    };
    p.weights = output("weights", pairs, acc), p.balance_loss = output("balance_loss", 1, acc);
    p.z_loss = output("z_loss", 1, acc), p.grad_logits = output("grad_logits", all * c.experts, c.dtype);
    p.expert_index = found("expert_index", pairs), p.position = found("position", pairs);
    p.choice = found("choice", pairs), p.offsets = found("offsets", c.experts + 1), p.source = found("source", p.rows);
    p.dropped = found("dropped", 1), p.load = found("load", c.groups * c.experts);
    p.kept = p.expert_index, p.chosen = p.choice, p.counted = p.load;
    if (!random_.one_in(4)) p.grad_weights = numbers(pairs, acc);
    if (!random_.one_in(4)) p.grad_balance = numbers(1, acc);
    if (!random_.one_in(4)) p.grad_z = numbers(1, acc);
  }
  Results run(const KernelTable& kernels, const Parallel& parallel) {
    constexpr int32_t unwritten = -77;
    for (auto& [name, memory, count] : found_)
      for (int64_t i = 0; i < count; ++i) static_cast<int32_t*>(memory->data())[i] = unwritten;
    return run_and_take([&](Results& values) {
      kernels.moe_route_forward(problem_, parallel);
      kernels.moe_route_backward(problem_, parallel);
      for (auto& [name, memory, count] : found_) {
        const int32_t* data = static_cast<const int32_t*>(memory->data());
        for (int64_t i = 0; i < count; ++i) require(data[i] != unwritten, name + " was not written everywhere");
        values[name].assign(data, data + count);
      }
    });
  }

 private:
  // Few numbers are equal, and few differ by so little that instruction sets may order their scores differently.
  double fine_number() { return static_cast<double>(random_.below(1 << 24)) / (1 << 22) - 2; }
  int32_t* found(const char* name, int64_t count) {
    found_.push_back({name, std::make_unique<Memory>(count, 4, guard_before_), count});
    return static_cast<int32_t*>(found_.back().memory->data());
  }
  struct Found {
    std::string name;
    std::unique_ptr<Memory> memory;
    int64_t count;
  };

  RouteProblem problem_;
  std::unique_ptr<Memory> mask_;
  std::vector<Found> found_;
};

}  // namespace

void moe_route_case(Random& random) {
  const int64_t experts[] = {1, 2, 3, 7, 8, 15, 16, 17, 24, 33, 64, 100, 257}, tokens[] = {0, 1, 2, 5, 13, 40, 300};
  Case c{};
  c.dtype = static_cast<DType>(random.below(4)), c.policy = static_cast<Policy>(random.below(kPolicies));
  c.groups = random.below(4), c.tokens = tokens[random.below(7)], c.experts = experts[random.below(13)];
  if (c.policy == Policy::gshard) c.experts = std::max<int64_t>(c.experts, 2);
  c.top_k = c.policy == Policy::switch_top1 ? 1 : c.policy == Policy::gshard ? 2 : 1 + random.below(c.experts);
  c.capacity = random.one_in(2) ? -1 : random.below(c.tokens + 2);
  if (c.policy == Policy::expert_choice) c.capacity = random.below(c.tokens + 2);
  c.expert_groups = c.top_groups = 1;
  c.masked = random.one_in(2), c.renormalize = random.one_in(2), c.batch_priority = random.one_in(2);
  if (c.policy == Policy::sigmoid) {
    c.biased = random.one_in(2);
    while (c.experts % (c.expert_groups = 1 + random.below(c.experts))) {
    }
    c.top_groups = 1 + random.below(c.expert_groups);
  }
  // Scores of half precision are often nearly equal among tokens.
  const bool by_token = c.batch_priority || c.policy == Policy::expert_choice || c.biased || c.expert_groups > 1;
  if (by_token && c.dtype != DType::f64) c.dtype = DType::f32;
  c.seed = random.next();
  std::string& text = context().text;
  text += name_of(c.dtype) + number_text("policy", static_cast<int>(c.policy)) + number_text("groups", c.groups);
  text += number_text("tokens", c.tokens) + number_text("experts", c.experts) + number_text("top_k", c.top_k);
  text += number_text("capacity", c.capacity) + number_text("expert_groups", c.expert_groups);
  text += number_text("top_groups", c.top_groups) + number_text("masked", c.masked) + number_text("biased", c.biased);
  text += number_text("renormalize", c.renormalize) + number_text("batch_priority", c.batch_priority);
  check<Instance>(c);
}

}  // namespace pyext
