// The op of routing: schema, checks of invariants, torch tensors -> RouteProblem -> the kernels of the active
// instruction set, or of the GPU. Friendly messages come from Python (pyext/ops/moe_route.py); what is checked here
// protects memory.
#include "moe_route.h"

#include <tuple>

#include "moe_tensors.h"

namespace pyext {
namespace {

constexpr int64_t kLargest = (int64_t{1} << 31) - 1;  // rows are counted in int32

const uint8_t* bytes_of(const MaybeTensor& t) { return t ? static_cast<const uint8_t*>(t->const_data_ptr()) : nullptr; }
const int32_t* read_numbers(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }
int32_t* numbers_of(const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); }

// The problem that both directions have in common; the tensors must outlive it.
RouteProblem problem_of(const Tensor& logits, const MaybeTensor& token_mask, int64_t policy, bool renormalize) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.size(2) > 0, "logits must have shape (G, S, E) with E > 0");
  STD_TORCH_CHECK(policy >= 0 && policy < kPolicies, "policy must be an index into POLICIES");
  RouteProblem p;
  p.dtype = dtype_of(logits), p.policy = static_cast<Policy>(policy), p.renormalize = renormalize;
  p.groups = logits.size(0), p.tokens = logits.size(1), p.experts = logits.size(2);
  p.logits = {logits.const_data_ptr(), 0, logits.stride(0), logits.stride(1)};
  STD_TORCH_CHECK(!token_mask || (token_mask->scalar_type() == ScalarType::Bool && token_mask->dim() == 2 &&
                                  token_mask->size(0) == p.groups && token_mask->size(1) == p.tokens &&
                                  same_device(*token_mask, logits)),
                  "token_mask must be a bool tensor (G, S)");
  p.token_mask = bytes_of(token_mask);
  return p;
}

using Routing = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Routing moe_route_forward(const Tensor& logits, const MaybeTensor& token_mask, const MaybeTensor& expert_bias,
                          const MaybeTensor& uniform, int64_t policy, int64_t top_k, int64_t capacity, bool renormalize,
                          bool batch_priority, int64_t groups, int64_t top_groups) {
  const Tensor input = readable(logits);
  const MaybeTensor mask = contiguous(token_mask), bias = contiguous(expert_bias), chance = contiguous(uniform);
  RouteProblem p = problem_of(input, mask, policy, renormalize);
  const bool experts_choose = p.policy == Policy::expert_choice, gshard = p.policy == Policy::gshard;
  STD_TORCH_CHECK(top_k >= 1 && top_k <= p.experts && (!gshard || top_k == 2), "top_k must be in [1, E]");
  STD_TORCH_CHECK(capacity >= (experts_choose ? 0 : -1), "capacity must be positive, or -1 for none");
  STD_TORCH_CHECK(groups >= 1 && p.experts % groups == 0 && top_groups >= 1 && top_groups <= groups,
                  "groups must divide E, and top_groups be one of them");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == p.experts &&
                            bias->scalar_type() == accumulator(input) && same_device(*bias, input)),
                  "expert_bias must have shape (E,), in the accumulation dtype");
  STD_TORCH_CHECK(gshard == chance.has_value(), "uniform must be given for gshard, and only there");
  STD_TORCH_CHECK(!chance || (chance->dim() == 2 && chance->size(0) == p.groups && chance->size(1) == p.tokens &&
                              chance->scalar_type() == ScalarType::Float && same_device(*chance, input)),
                  "uniform must have shape (G, S), in fp32");
  p.columns = experts_choose ? p.experts : top_k;
  const int64_t tokens = p.groups * p.tokens, choices = tokens * p.columns;
  STD_TORCH_CHECK(choices <= kLargest, "there must be fewer than 2^31 choices");
  const int64_t most = p.tokens < capacity ? p.tokens : capacity;  // an expert takes a token once
  const int64_t slots = capacity < 0 ? choices : p.groups * p.experts * most;
  p.rows = slots < choices ? slots : choices;
  p.capacity = capacity, p.batch_priority = batch_priority, p.expert_groups = groups, p.top_groups = top_groups;
  p.expert_bias = bias ? bias->const_data_ptr() : nullptr;
  p.uniform = chance ? static_cast<const float*>(chance->const_data_ptr()) : nullptr;

  const ScalarType acc = accumulator(input), integer = ScalarType::Int;
  Tensor expert_index = empty(input, {tokens, p.columns}, integer), weights = empty(input, {tokens, p.columns}, acc);
  Tensor offsets = empty(input, {p.experts + 1}, integer), source = empty(input, {p.rows}, integer);
  Tensor position = empty(input, {tokens, p.columns}, integer), balance_loss = empty(input, {}, acc);
  Tensor z_loss = empty(input, {}, acc), dropped = empty(input, {}, integer);
  Tensor choice = empty(input, {tokens, p.columns}, integer), load = empty(input, {p.groups, p.experts}, integer);
  p.expert_index = numbers_of(expert_index), p.weights = weights.mutable_data_ptr();
  p.offsets = numbers_of(offsets), p.source = numbers_of(source), p.position = numbers_of(position);
  p.balance_loss = balance_loss.mutable_data_ptr(), p.z_loss = z_loss.mutable_data_ptr();
  p.dropped = numbers_of(dropped), p.choice = numbers_of(choice), p.load = numbers_of(load);
  run_on_device(
      input, "logits", [&] { kernels().moe_route_forward(p, parallel()); },
      [&](auto stream) {
        const Tensor memory = workspace(input, pyext_cuda_moe_route_workspace(p));
        p.workspace = memory.mutable_data_ptr();
        return pyext_cuda_moe_route_forward(p, stream);
      });
  return {expert_index, weights, offsets, source, position, balance_loss, z_loss, dropped, choice, load};
}

Tensor moe_route_backward(const MaybeTensor& grad_weights, const MaybeTensor& grad_balance, const MaybeTensor& grad_z,
                          const Tensor& logits, const MaybeTensor& token_mask, const Tensor& expert_index,
                          const Tensor& choice, const Tensor& load, int64_t policy, bool renormalize) {
  const Tensor input = readable(logits);
  const MaybeTensor mask = contiguous(token_mask), weights = contiguous(grad_weights);
  RouteProblem p = problem_of(input, mask, policy, renormalize);
  const int64_t tokens = p.groups * p.tokens;
  const Tensor kept = routing_map("expert_index", expert_index, input), chosen = routing_map("choice", choice, input),
               counted = routing_map("load", load, input);
  STD_TORCH_CHECK(kept.dim() == 2 && kept.size(0) == tokens && chosen.dim() == 2 && chosen.size(0) == tokens &&
                      chosen.size(1) == kept.size(1),
                  "expert_index and choice must have shape (T, K)");
  p.columns = kept.size(1);
  STD_TORCH_CHECK(p.policy != Policy::expert_choice || p.columns == p.experts, "expert_index must have E columns");
  STD_TORCH_CHECK(counted.dim() == 2 && counted.size(0) == p.groups && counted.size(1) == p.experts,
                  "load must have shape (G, E)");
  check_range("choice", chosen, p.experts);
  const ScalarType acc = accumulator(input);
  STD_TORCH_CHECK(!weights || (weights->dim() == 2 && weights->size(0) == tokens && weights->size(1) == p.columns &&
                               weights->scalar_type() == acc && same_device(*weights, input)),
                  "grad_weights must match expert_index, in the accumulation dtype");
  for (const MaybeTensor* loss : {&grad_balance, &grad_z})
    STD_TORCH_CHECK(!*loss || ((*loss)->numel() == 1 && (*loss)->scalar_type() == acc && same_device(**loss, input)),
                    "the gradient of a loss must be one number, in the accumulation dtype");
  Tensor grad_logits = empty(input, {p.groups, p.tokens, p.experts}, input.scalar_type());
  auto data = [](const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; };
  p.grad_weights = data(weights), p.grad_balance = data(grad_balance), p.grad_z = data(grad_z);
  p.kept = read_numbers(kept), p.chosen = read_numbers(chosen), p.counted = read_numbers(counted);
  p.grad_logits = grad_logits.mutable_data_ptr();
  run_on_device(
      input, "logits", [&] { kernels().moe_route_backward(p, parallel()); },
      [&](auto stream) {
        const Tensor memory = workspace(input, pyext_cuda_moe_route_workspace(p));
        p.workspace = memory.mutable_data_ptr();
        return pyext_cuda_moe_route_backward(p, stream);
      });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def(
      "moe_route_forward(Tensor logits, Tensor? token_mask, Tensor? expert_bias, Tensor? uniform, int policy, int "
      "top_k, "
      "SymInt capacity, bool renormalize, bool batch_priority, int groups, int top_groups) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "moe_route_backward(Tensor? grad_weights, Tensor? grad_balance, Tensor? grad_z, Tensor logits, Tensor? "
      "token_mask, "
      "Tensor expert_index, Tensor choice, Tensor load, int policy, bool renormalize) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("moe_route_forward", TORCH_BOX(&moe_route_forward));
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward));
}

#if defined(PYEXT_CUDA)
STABLE_TORCH_LIBRARY_IMPL(pyext, CUDA, m) {
  m.impl("moe_route_forward", TORCH_BOX(&moe_route_forward));
  m.impl("moe_route_backward", TORCH_BOX(&moe_route_backward));
}
#endif

}  // namespace pyext
