// Fibers, the scheduler, barriers and warp collectives of the emulator.
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <numeric>

#include "machine.h"

namespace simt {

Machine machine;

namespace {

jmp_buf host_context;  // where a launch continues when no thread is left to run
ucontext_t first_context;

struct Barrier {
  int arrived = 0, expected = 0;
  std::vector<Thread*> waiting;
  Knowledge knowledge;
};
Barrier barriers[16];

// A collective of some lanes of one warp that is being gathered.
struct Gathering {
  unsigned mask, arrived = 0;
  Collective kind;
  void* arguments[32];
  std::vector<Thread*> lanes;
};
std::vector<std::vector<Gathering>> gatherings;  // of each warp

char* stacks() {
  static char* const memory = static_cast<char*>(mmap(nullptr, stack_bytes * most_threads, PROT_READ | PROT_WRITE,
                                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return memory;
}

// --- Choosing who runs ---

void complete_something() {
  const bool any = machine.options.completion == Options::Completion::random;
  const size_t which = any ? machine.random() % machine.asynchronous.size() : 0;
  auto work = std::move(machine.asynchronous[which]);
  machine.asynchronous.erase(machine.asynchronous.begin() + static_cast<ptrdiff_t>(which));
  work();
}

// The next thread to run, or null if all of them wait or have returned. Late asynchronous work happens when nothing
// else can.
Thread* next_thread() {
  using Schedule = Options::Schedule;
  using Completion = Options::Completion;
  const Options& options = machine.options;
  while (!machine.asynchronous.empty() && (machine.ready.empty() || options.completion == Completion::early ||
                                           (options.completion == Completion::random && machine.one_in(8)))) {
    complete_something();
  }
  if (machine.ready.empty()) return nullptr;
  size_t which = 0;
  if (options.schedule == Schedule::lifo) which = machine.ready.size() - 1;
  if (options.schedule == Schedule::random) which = machine.random() % machine.ready.size();
  Thread* chosen = machine.ready[which];
  machine.ready.erase(machine.ready.begin() + static_cast<ptrdiff_t>(which));
  chosen->queued = false;
  return chosen;
}

void thread_main();

[[noreturn]] void enter(Thread* thread) {
  machine.current = thread;
  if (!thread) _longjmp(host_context, 1);
  if (thread->started) _longjmp(thread->context, 1);
  thread->started = true;
  getcontext(&first_context);
  first_context.uc_stack.ss_sp = thread->stack;
  first_context.uc_stack.ss_size = stack_bytes;
  first_context.uc_link = nullptr;
  makecontext(&first_context, thread_main, 0);
  setcontext(&first_context);
  __builtin_unreachable();
}

// Runs the others until somebody chooses this thread again.
__attribute__((noinline)) void switch_away() {
  Thread* from = machine.current;
  Thread* to = next_thread();
  if (to == from) return;
  if (_setjmp(from->context) == 0) enter(to);
}

void release(Barrier& barrier) {
  const Barrier done = std::move(barrier);
  barrier = Barrier();
  for (Thread* thread : done.waiting) {
    thread->knowledge.join(done.knowledge);
    wake(thread);
  }
}

void thread_main() {
  machine.body(machine.parameters);
  Thread& thread = self();
  finish_asynchronous(thread);
  thread.done = true;
  --machine.live;
  if (!machine.live) finish_asynchronous_of_block();
  // A thread that has returned no longer takes part in __syncthreads.
  if (barriers[0].arrived && barriers[0].arrived >= machine.live) release(barriers[0]);
  enter(next_thread());
}

// --- One launch ---

void start_block(uint32_t number) {
  const dim3 grid = machine.grid, block = machine.block;
  machine.block_number = number;
  machine.block_index = {number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
  machine.threads.assign(static_cast<size_t>(machine.thread_count), Thread());
  machine.ready.clear();
  machine.asynchronous.clear();
  machine.live = machine.thread_count;
  for (Barrier& barrier : barriers) barrier = Barrier();
  gatherings.assign(static_cast<size_t>(machine.thread_count + 31) / 32, {});
  start_memory_of_block();
  start_asynchronous_of_block();
  start_matrix_of_block();
  for (int i = 0; i < machine.thread_count; ++i) {
    Thread& thread = machine.threads[i];
    const unsigned u = static_cast<unsigned>(i);
    thread.index = {u % block.x, u / block.x % block.y, u / (block.x * block.y)};
    thread.linear = i;
    thread.lane = i % 32;
    thread.stack = stacks() + stack_bytes * static_cast<size_t>(i);
    thread.knowledge.seen.assign(static_cast<size_t>(machine.thread_count), 0);
    thread.next_step();
    wake(&thread);
  }
}

std::string waiting_threads() {
  std::map<std::pair<std::string, const void*>, int> counts;
  for (const Thread& thread : machine.threads) {
    if (!thread.done) ++counts[{thread.waits_for, thread.waits_at}];
  }
  std::string text;
  for (const auto& [where, count] : counts) {
    text +=
        (text.empty() ? "" : ", ") + std::to_string(count) + (count == 1 ? " thread waits for " : " threads wait for ");
    text += where.first + " (" + source_line(where.second) + ")";
  }
  return text;
}

// False if a check failed or if threads were left waiting.
__attribute__((noinline)) bool run_block(uint32_t number) {
  start_block(number);
  if (_setjmp(host_context) == 0) enter(next_thread());
  machine.current = nullptr;
  if (!machine.error.empty()) return false;
  if (machine.live) machine.error = "deadlock in block " + std::to_string(number) + ": " + waiting_threads();
  return machine.live == 0;
}

std::vector<uint32_t> order_of_blocks() {
  std::vector<uint32_t> order(static_cast<size_t>(machine.grid.x) * machine.grid.y * machine.grid.z);
  std::iota(order.begin(), order.end(), 0u);
  if (machine.options.schedule == Options::Schedule::lifo) std::reverse(order.begin(), order.end());
  if (machine.options.schedule == Options::Schedule::random) std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

}  // namespace

void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void Knowledge::join(const Knowledge& other) {
  simt::join(seen, other.seen);
  simt::join(fenced, other.fenced);
}

void wake(Thread* thread) {
  if (thread->queued) return;
  thread->queued = true;
  machine.ready.push_back(thread);
}

void block(const char* waits_for, const void* caller) {
  Thread& thread = self();
  thread.waits_for = waits_for;
  thread.waits_at = caller;
  switch_away();
  thread.waits_for = "nothing";
}

void yield() {
  wake(&self());
  switch_away();
}

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const uint3 index = machine.block_index;
  char who[96] = "";
  if (machine.current) {
    std::snprintf(who, sizeof who, "block (%u, %u, %u) thread %d: ", index.x, index.y, index.z, self().linear);
  }
  machine.error = std::string(who) + text;
  _longjmp(host_context, 1);
}

bool run(dim3 grid, dim3 block, size_t shared_bytes, const char* name, bool instrumented, void (*body)(const void*),
         const void* parameters, size_t parameter_bytes) {
  machine.error.clear();
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  if (!blocks || grid.y > 65535 || grid.z > 65535 || !threads || threads > most_threads || shared_bytes > 227 << 10) {
    machine.error = std::string("invalid launch of ") + name;
    return false;
  }
  machine.grid = grid;
  machine.block = block;
  machine.thread_count = static_cast<int>(threads);
  machine.instrumented = instrumented;
  machine.body = body;
  machine.parameters = static_cast<const char*>(parameters);
  machine.parameter_bytes = parameter_bytes;
  machine.shared_bytes = shared_bytes;
  machine.most_shared_bytes = std::max(machine.most_shared_bytes, shared_bytes);
  machine.random.seed(machine.options.seed);
  start_memory_of_launch();
  for (const uint32_t number : order_of_blocks()) {
    if (!run_block(number)) return false;
  }
  return true;
}

uint3 thread_index() { return self().index; }
uint3 block_index() { return machine.block_index; }
dim3 block_size() { return machine.block; }
dim3 grid_size() { return machine.grid; }
int lane() { return self().lane; }
void* shared_memory() { return machine.shared; }

// --- Barriers and warp collectives ---

void barrier(int id, int count, bool wait) {
  const void* caller = __builtin_return_address(0);
  if (id < 0 || id > 15) fail("barrier %d: there are 16", id);
  if (count >= 0 && (count == 0 || count % 32)) fail("barrier %d of %d threads: must be whole warps", id, count);
  Barrier& barrier = barriers[id];
  Thread& thread = self();
  if (barrier.arrived && barrier.expected != count) {
    fail("barrier %d: this thread expects %d threads, others %d", id, count, barrier.expected);
  }
  barrier.expected = count;
  barrier.knowledge.join(thread.knowledge);
  thread.next_step();
  ++barrier.arrived;
  if (wait) barrier.waiting.push_back(&thread);
  if (barrier.arrived >= (count < 0 ? machine.live : count)) release(barrier);
  if (wait) block(id ? "a named barrier" : "__syncthreads", caller);
}

void gather_warp(unsigned mask, Collective kind, void* argument, void (*together)(void**, unsigned), const void* caller,
                 bool ordered) {
  Thread& thread = self();
  const unsigned own = 1u << thread.lane;
  if (!(mask & own)) fail("warp collective whose mask %08x lacks the calling lane %d", mask, thread.lane);
  auto& open = gatherings[static_cast<size_t>(thread.linear / 32)];
  auto found = open.begin();
  while (found != open.end() && !(found->mask & mask)) ++found;
  if (found == open.end()) {
    open.push_back({mask, 0, kind, {}, {}});
    found = open.end() - 1;
  }
  if (found->mask != mask || found->kind != kind || (found->arrived & own)) {
    fail("divergent warp collective: operation %d with mask %08x meets operation %d with mask %08x",
         static_cast<int>(kind), mask, static_cast<int>(found->kind), found->mask);
  }
  found->arrived |= own;
  found->arguments[thread.lane] = argument;
  found->lanes.push_back(&thread);
  if (found->arrived != mask) return block("the other lanes of a warp collective", caller);

  Gathering all = std::move(*found);
  open.erase(found);
  if (ordered) {
    Knowledge together_known;
    for (Thread* lane : all.lanes) {
      together_known.join(lane->knowledge);
      lane->next_step();
    }
    for (Thread* lane : all.lanes) lane->knowledge.join(together_known);
  }
  together(all.arguments, mask);
  for (Thread* lane : all.lanes) wake(lane);
  switch_away();
}

void sync_warp(unsigned mask) {
  gather_warp(mask, Collective::sync, nullptr, [](void**, unsigned) {}, __builtin_return_address(0), true);
}

namespace {
// What a lane brings to a collective and takes from it.
struct Exchange {
  uint64_t value, result;
  int source;
};
template <class Body>
void for_each_lane(unsigned mask, Body body) {
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) body(lane);
  }
}
}  // namespace

uint64_t shuffle(unsigned mask, uint64_t value, int source_lane) {
  Exchange exchange{value, 0, source_lane & 31};
  gather_warp(
      mask, Collective::shuffle, &exchange,
      [](void** arguments, unsigned mask) {
        const auto all = reinterpret_cast<Exchange**>(arguments);
        for_each_lane(mask, [&](int lane) {
          const int source = all[lane]->source;
          if (!(mask >> source & 1)) fail("shuffle reads lane %d, which is not in mask %08x", source, mask);
          all[lane]->result = all[source]->value;
        });
      },
      __builtin_return_address(0));
  return exchange.result;
}

unsigned ballot(unsigned mask, bool predicate) {
  Exchange exchange{predicate, 0, 0};
  gather_warp(
      mask, Collective::ballot, &exchange,
      [](void** arguments, unsigned mask) {
        const auto all = reinterpret_cast<Exchange**>(arguments);
        uint64_t votes = 0;
        for_each_lane(mask, [&](int lane) { votes |= all[lane]->value << lane; });
        for_each_lane(mask, [&](int lane) { all[lane]->result = votes; });
      },
      __builtin_return_address(0));
  return static_cast<unsigned>(exchange.result);
}

unsigned match_any(unsigned mask, uint64_t value) {
  Exchange exchange{value, 0, 0};
  gather_warp(
      mask, Collective::match, &exchange,
      [](void** arguments, unsigned mask) {
        const auto all = reinterpret_cast<Exchange**>(arguments);
        for_each_lane(mask, [&](int lane) {
          for_each_lane(mask, [&](int other) {
            if (all[other]->value == all[lane]->value) all[lane]->result |= 1u << other;
          });
        });
      },
      __builtin_return_address(0));
  return static_cast<unsigned>(exchange.result);
}

// The hardware does not say which lane it elects, but elects the same one each time: here the seed chooses.
bool elect(unsigned mask) {
  Exchange exchange{0, 0, 0};
  gather_warp(
      mask, Collective::elect, &exchange,
      [](void** arguments, unsigned mask) {
        unsigned chosen = machine.options.seed % 32;
        while (!(mask >> chosen & 1)) chosen = (chosen + 1) % 32;
        reinterpret_cast<Exchange**>(arguments)[chosen]->result = 1;
      },
      __builtin_return_address(0));
  return exchange.result != 0;
}

}  // namespace simt
