// The inside of the emulator: the state of the machine while a kernel runs, shared by the .cpp files of this folder.
//
// Every CUDA thread is a fiber that runs until it blocks, so one operating-system thread does everything and a run is
// repeated exactly by its seed. What the fibers know of each other's progress is kept in vector clocks: an access
// races with an earlier one unless the clocks say that it came after.
#pragma once
#include <ucontext.h>

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"

namespace simt {

struct Thread;

// How threads are chosen, when asynchronous work completes, and what is checked.
struct Options {
  enum class Schedule { fifo, lifo, random } schedule = Schedule::random;
  enum class Completion { late, early, random } completion = Completion::random;
  unsigned preempt = 0;  // switch threads at one in so many memory accesses; 0: only where a thread waits
  unsigned seed = 1;
  bool hooks = true;  // check every access of instrumented code
};

// clock[t] = n: everything thread t did up to its step n came before. Past the threads are asynchronous units: the
// matrix unit of each warp, whose steps are the wgmma of its warpgroup, then one for each mbarrier that copies report
// to.
using Clock = std::vector<uint32_t>;
void join(Clock& into, const Clock& from);

// `fenced` is the part of `seen` that fences have made visible to the asynchronous proxy (TMA and wgmma).
struct Knowledge {
  Clock seen, fenced;
  void join(const Knowledge& other);
  void learn(int thread, uint32_t step) {
    if (static_cast<int>(seen.size()) <= thread) seen.resize(static_cast<size_t>(thread) + 1);
    seen[thread] = std::max(seen[thread], step);
  }
  bool knows(int thread, uint32_t step) const { return thread < static_cast<int>(seen.size()) && step <= seen[thread]; }
  bool fences(int thread, uint32_t step) const {
    return thread < static_cast<int>(fenced.size()) && step <= fenced[thread];
  }
};

// Asynchronous work of one thread, in the groups in which it is waited for.
template <class Work>
struct Groups {
  std::vector<Work> open;
  std::deque<std::vector<Work>> committed;

  bool empty() const { return open.empty() && committed.empty(); }
  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }
  // Finishes the oldest groups until `remaining` are left.
  template <class Finish>
  void wait(int remaining, Finish finish) {
    while (static_cast<int>(committed.size()) > remaining) {
      for (Work& work : committed.front()) finish(work);
      committed.pop_front();
    }
  }
};

// cp.async of one thread.
struct Copy {
  char* to;
  const char* from;
  int bytes, valid;  // the rest is zero
  bool done;
};

// A box of a tensor on its way from shared memory.
struct Store {
  const TensorMap* map;
  const char* from;
  int corner[5];
  bool done;
};

// One wgmma of a warpgroup.
struct Product {
  uint32_t number;  // within the warpgroup, from 1
  int n;
  uint64_t a, b;
  bool a_in_registers, accumulate, transpose_a, transpose_b, is_bf16;
  int arrived = 0;       // threads that have issued it
  bool reading[4] = {};  // warps that have not waited for it
  bool done = false;
  float* d[128];
  uint32_t a_registers[128][4];
  std::vector<Thread*> waiting;
};

// A CUDA thread.
struct Thread {
  uint3 index;
  int linear, lane;
  char* stack;
  jmp_buf context;
  bool started = false, done = false, queued = false;
  const char* waits_for = "its start";
  const void* waits_at = nullptr;
  Knowledge knowledge;
  Groups<Copy> copies;
  Groups<Store> stores;
  Groups<Product*> products;
  size_t products_issued = 0;
  bool registers_fenced = false;  // by wgmma.fence
  uint32_t step() const { return knowledge.seen[linear]; }
  // What came before this moment is told to others (by a barrier, say); what comes after is not.
  void next_step() { ++knowledge.seen[linear]; }
};

struct Machine {
  Options options;
  std::string error;

  // The launch.
  dim3 grid, block;
  uint3 block_index;
  uint32_t block_number;
  int thread_count, live;
  int warp_count() const { return (thread_count + 31) / 32; }
  bool instrumented;
  void (*body)(const void*);
  const char* parameters;
  size_t parameter_bytes;
  char* shared;
  size_t shared_bytes, most_shared_bytes = 0;

  std::vector<Thread> threads;
  std::vector<Thread*> ready;
  Thread* current = nullptr;
  std::deque<std::function<void()>> asynchronous;  // copies under way that complete by themselves
  std::mt19937 random;

  bool checking() const { return instrumented && options.hooks; }
  bool one_in(unsigned n) { return random() % n == 0; }
  // Whether a piece of work that may complete at any time does so at once.
  bool completes_now() {
    return options.completion == Options::Completion::early ||
           (options.completion == Options::Completion::random && one_in(2));
  }
};
extern Machine machine;

inline Thread& self() { return *machine.current; }

// scheduler.cpp
constexpr size_t stack_bytes = 256 << 10;
constexpr int most_threads = 1024;
void wake(Thread* thread);
// Until somebody wakes the running thread; caller: where it waits, for the message if nobody does.
void block(const char* waits_for, const void* caller);
// Gathers the lanes of `mask`, each with its own `argument`; the last one applies `together` to all of them (indexed by
// lane). `ordered`: what the lanes did before is visible to all of them after.
enum class Collective {
  shuffle,
  ballot,
  sync,
  match,
  elect,
  ldmatrix,
  mma,
  wgmma_fence,
  wgmma,
  wgmma_commit,
  wgmma_wait
};
void gather_warp(unsigned mask, Collective kind, void* argument, void (*together)(void** arguments, unsigned mask),
                 const void* caller, bool ordered = false);

// asynchronous.cpp
void start_asynchronous_of_block();
void finish_asynchronous(const Thread& thread);  // fails if the thread returns without having waited
void finish_asynchronous_of_block();             // fails if nobody waited for a copy
// Where TMA and wgmma with a swizzle of `span` bytes (0: none) put what an unswizzled layout has at this offset.
size_t swizzled(size_t offset, int span);

// matrix.cpp
void start_matrix_of_block();
// Fails if the bytes belong to an accumulator that a wgmma in flight owns.
void check_registers(const Thread& thread, const void* address, size_t bytes, const void* caller);

// memory.cpp
void start_memory_of_launch();
void start_memory_of_block();
// The offset of an address in shared memory; fails if [address, address + bytes) is not there.
size_t shared_offset(const void* address, size_t bytes = 1);
std::string source_line(const void* caller);

// Who touches memory, and what it knows of the others: a thread, or an asynchronous unit on its behalf.
struct Actor {
  int id;
  uint32_t step;
  const Knowledge* knowledge;
  const void* caller;
  bool asynchronous_proxy;
};
Actor acting(Thread& thread, const void* caller, bool asynchronous_proxy = false);
// Checks and records an access. `lasting`: it goes on until end_write or end_read, which shared memory alone knows;
// meanwhile what is written must not be touched, and what is read must not be written. They do nothing where accesses
// are not checked.
void check_memory(const Actor& actor, const void* address, size_t bytes, Access kind, bool lasting = false);
void end_write(const void* address, size_t bytes, int id, uint32_t step);
void end_read(const void* address, size_t bytes);

}  // namespace simt
