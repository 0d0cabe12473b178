// What every op's driver is made of: a problem's tensors in guarded memory, and the comparison of their results between
// numbers of threads and between instruction sets.
#pragma once
#include <atomic>
#include <map>
#include <thread>
#include <utility>

#include "cpu/isa.h"
#include "guarded.h"
#include "parallel.h"

namespace pyext {

using Results = std::map<std::string, std::vector<double>>;

inline void run_serially(int64_t count, void (*body)(int64_t, void*), void* context) {
  for (int64_t i = 0; i < count; ++i) body(i, context);
}

inline void run_threaded(int64_t count, void (*body)(int64_t, void*), void* context) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i; (i = next++) < count;) body(i, context);
  };
  std::thread others[] = {std::thread(work), std::thread(work)};
  work();
  for (std::thread& thread : others) thread.join();
}

// The tensors of one problem. Derived structs make a problem of them and run it.
class Tensors {
 protected:
  Tensors(uint64_t seed, bool guard_before) : random_(seed), guard_before_(guard_before) {}

  struct Result {
    std::string name;
    View view;
    std::unique_ptr<Memory> memory;
    bool zeroed;  // the kernel adds to it
  };

  // The elements of a result, all of which were written, and nothing beside them; NaN again afterwards.
  static std::vector<double> take(Result& result) {
    std::vector<double> list;
    result.view.for_each([&](int64_t offset) {
      list.push_back(result.memory->get(offset));
      require(!std::isnan(list.back()), result.name + " has a NaN, or was not written everywhere");
      result.memory->set_nan(offset);
    });
    require(result.memory->all_nan(), result.name + ": something beside its elements was written");
    return list;
  }

  // Runs body(values), which may take results of its own; then all results by name, as numbers.
  template <class Body>
  Results run_and_take(const Body& body) {
    for (Result& result : results_) {
      result.memory->fill_nan();
      if (result.zeroed) result.view.for_each([&](int64_t offset) { result.memory->set(offset, 0); });
    }
    std::vector<std::vector<char>> before;
    for (const auto& memory : inputs_) before.push_back(memory->bytes());
    Results values;
    body(values);
    for (size_t i = 0; i < inputs_.size(); ++i) require(inputs_[i]->bytes() == before[i], "an input was written");
    for (Result& result : results_) values[result.name] = take(result);
    return values;
  }

  View layout(int64_t batch, int64_t heads, int64_t rows, int64_t columns) {
    return View::make(batch, heads, rows, columns, random_.below(2), random_.one_in(2) ? 0 : 1 + random_.below(5));
  }

  template <class Pointer>
  static Strided<Pointer> strided(const View& view, Memory& memory) {
    return {memory.data(), view.stride[0], view.stride[1], view.stride[2]};
  }

  // The same with stride 0 where there is one element for all.
  template <class Pointer>
  static Strided<Pointer> broadcast(Strided<Pointer> tensor, const View& view) {
    if (view.size[0] == 1) tensor.batch = 0;
    if (view.size[1] == 1) tensor.head = 0;
    if (view.size[2] == 1) tensor.row = 0;
    return tensor;
  }

  // A tensor of random numbers in [-2, 2], or of what `value` gives.
  template <class Value>
  Memory& filled(const View& view, DType dtype, Value value) {
    inputs_.push_back(std::make_unique<Memory>(view.elements(), dtype, guard_before_));
    Memory& memory = *inputs_.back();
    memory.fill_nan();
    view.for_each([&](int64_t offset) { memory.set(offset, value()); });
    return memory;
  }
  double number() { return static_cast<double>(random_.below(257)) / 64 - 2; }

  const void* numbers(int64_t count, DType dtype) {
    return filled(View::make(1, 1, 1, count, 0, 0), dtype, [&] { return number(); }).data();
  }
  int64_t one_or(int64_t all) { return random_.one_in(2) ? all : 1; }
  Memory& result(const std::string& name, const View& view, DType dtype) {
    results_.push_back({name, view, std::make_unique<Memory>(view.elements(), dtype, guard_before_), false});
    return *results_.back().memory;
  }
  template <class Value>
  const int32_t* integers(int64_t count, Value value) {
    integers_.push_back(std::make_unique<Memory>(count, DType::f32, guard_before_));
    int32_t* data = static_cast<int32_t*>(integers_.back()->data());
    for (int64_t i = 0; i < count; ++i) data[i] = value(i);
    return data;
  }

  Random random_;
  bool guard_before_;
  std::vector<std::unique_ptr<Memory>> inputs_, integers_;
  std::vector<Result> results_;
};

inline void compare(const char* name, const std::map<std::string, std::vector<double>>& expected,
                    const std::map<std::string, std::vector<double>>& got, double tolerance) {
  for (const auto& [key, values] : expected) {
    const std::vector<double>& others = got.at(key);
    double largest = 1;
    for (double value : values) {
      if (std::isfinite(value)) largest = std::max(largest, std::fabs(value));
    }
    for (size_t i = 0; i < values.size(); ++i) {
      const bool same = values[i] == others[i] || std::fabs(values[i] - others[i]) <= tolerance * largest;
      require(same, std::string(name) + ": " + key + "[" + std::to_string(i) + "] is " + std::to_string(others[i]) +
                        ", expected " + std::to_string(values[i]));
    }
  }
}

// Runs Instance(case) on every instruction set, with one thread and with three.
template <class Instance, class Case>
void check(const Case& c) {
  // Coarse, for gradients that cancel to nothing keep the noise of a rounded output: a wrong element is far outside,
  // and precision is the business of the Python tests.
  const double tolerances[] = {/*f32*/ 1e-3, /*bf16*/ 0.3, /*f16*/ 0.05, /*f64*/ 1e-10};
  const Parallel serial{1, run_serially}, threaded{3, run_threaded};
  std::map<std::string, std::vector<double>> first;
  for (const KernelTable* const* table = compiled_kernels(); *table; ++table) {
    if (!cpu_can_run((*table)->name)) continue;
    context().isa = (*table)->name;
    auto alone = Instance(c, /*guard_before=*/false).run(**table, serial);
    auto together = Instance(c, /*guard_before=*/true).run(**table, threaded);
    compare("three threads against one", alone, together, 0);
    if (first.empty()) first = alone;
    compare("another instruction set", first, alone, tolerances[static_cast<int>(c.dtype)]);
  }
}

// Draws one case of the op, says in context() what it is, and checks it.
void attention_case(Random& random);
void glu_case(Random& random);
void moe_dispatch_case(Random& random);
void moe_experts_case(Random& random);
void moe_route_case(Random& random);
void rotary_case(Random& random);

inline const char* name_of(DType dtype) {
  const char* names[] = {"fp32", "bf16", "fp16", "fp64"};
  return names[static_cast<int>(dtype)];
}
inline std::string number_text(const char* name, double value) {
  char digits[40];
  std::snprintf(digits, sizeof digits, "%.6g", value);
  return std::string(" ") + name + "=" + digits;
}

}  // namespace pyext
