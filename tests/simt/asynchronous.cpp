// cp.async, mbarriers and TMA of the emulated machine.
//
// To the checks, a copy writes from its issue until the wait that the programming model asks for, whenever the bytes
// really move: early, late or at a random moment.
#include "machine.h"

namespace simt {

namespace {

constexpr uint32_t first_shared_address = 1024;

struct Mbarrier {
  int count, pending, index;
  int64_t bytes = 0;  // expected and not yet there
  unsigned phase = 0;
  Knowledge gathered;
  std::vector<Thread*> waiting;
  // The copies that report here are one asynchronous unit, with steps of its own.
  uint32_t unit_steps = 0;
  unsigned phase_of_last_copy = 0, phases_waited_for = 0;
  int initialiser;
  uint32_t initialised_at;
  bool init_fenced = false;

  int unit() const { return machine.thread_count + machine.warp_count() + index; }
};
std::map<size_t, Mbarrier> mbarriers;  // by offset in shared memory

Mbarrier& find(uint64_t* barrier, const void* caller) {
  const auto found = mbarriers.find(shared_offset(barrier, 8));
  if (found == mbarriers.end()) fail("no mbarrier was initialised at shared offset %zu", shared_offset(barrier, 8));
  // An ordinary read, to the checks: the initialisation must have come before.
  check_memory(acting(self(), caller), barrier, 8, Access::read);
  return found->second;
}

void complete_if_full(Mbarrier& mbarrier) {
  if (mbarrier.pending < 0) fail("mbarrier: more arrivals in one phase than its count of %d", mbarrier.count);
  if (mbarrier.pending || mbarrier.bytes) return;
  ++mbarrier.phase;
  mbarrier.pending = mbarrier.count;
  for (Thread* thread : mbarrier.waiting) wake(thread);
  mbarrier.waiting.clear();
}

// Copies one row of a box at a time: body(offset in the box, global address, bytes inside the tensor, bytes in front
// that are outside).
template <class Body>
void for_each_row(const TensorMap& map, const int* corner, Body body) {
  const int width = map.box[0];
  int64_t rows = 1;
  for (int d = 1; d < map.rank; ++d) rows *= map.box[d];
  for (int64_t row = 0; row < rows; ++row) {
    char* address = map.base;
    bool inside = true;
    int64_t rest = row;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t at = corner[d] + rest % map.box[d];
      rest /= map.box[d];
      inside = inside && at >= 0 && at < map.size[d];
      address += at * map.stride[d];
    }
    const int64_t first = std::max<int64_t>(0, -static_cast<int64_t>(corner[0]));
    const int64_t last = inside ? std::min<int64_t>(width, map.size[0] - corner[0]) : 0;
    const int64_t count = std::max<int64_t>(0, last - first);
    body(static_cast<size_t>(row) * width * map.element_bytes, address + (corner[0] + first) * map.element_bytes,
         static_cast<size_t>(count * map.element_bytes), static_cast<size_t>(first * map.element_bytes));
  }
}

size_t box_bytes(const TensorMap& map) {
  size_t bytes = static_cast<size_t>(map.element_bytes);
  for (int d = 0; d < map.rank; ++d) bytes *= static_cast<size_t>(map.box[d]);
  return bytes;
}

// The shared end of a box.
size_t checked_box(const TensorMap& map, const void* shared, int rank) {
  if (map.rank != rank) fail("TMA instruction of rank %d with a tensor map of rank %d", rank, map.rank);
  const size_t offset = shared_offset(shared, box_bytes(map));
  const size_t alignment = map.swizzle_bytes ? static_cast<size_t>(map.swizzle_bytes) * 8 : 128;
  if (offset % alignment) fail("TMA box at shared offset %zu: must be a multiple of %zu", offset, alignment);
  return offset;
}

// Asynchronous write of shared memory that reports to an mbarrier; `move` does it.
void start_load(void* shared, size_t bytes, uint64_t* barrier, const void* caller, std::function<void()> move) {
  Mbarrier& mbarrier = find(barrier, caller);
  Thread& thread = self();
  if (!mbarrier.init_fenced && !thread.knowledge.fences(mbarrier.initialiser, mbarrier.initialised_at)) {
    fail("copy that reports to an mbarrier whose initialisation was not fenced (%s)", source_line(caller).c_str());
  }
  const uint32_t step = ++mbarrier.unit_steps;
  mbarrier.phase_of_last_copy = mbarrier.phase;
  const Actor unit{mbarrier.unit(), step, &thread.knowledge, caller, true};
  check_memory(unit, shared, bytes, Access::write, /*lasting=*/true);
  machine.asynchronous.push_back([=, &mbarrier] {
    move();
    end_write(shared, bytes, mbarrier.unit(), step);
    mbarrier.gathered.learn(mbarrier.unit(), step);
    mbarrier.bytes -= static_cast<int64_t>(bytes);
    complete_if_full(mbarrier);
  });
}

void perform(Copy& copy) {
  if (copy.done) return;
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.valid));
  std::memset(copy.to + copy.valid, 0, static_cast<size_t>(copy.bytes - copy.valid));
  copy.done = true;
}

void perform(Store& store) {
  if (store.done) return;
  const TensorMap& map = *store.map;
  const size_t base = shared_offset(store.from);
  for_each_row(map, store.corner, [&](size_t offset, char* address, size_t bytes, size_t skipped) {
    for (size_t i = 0; i < bytes; ++i) {
      address[i] = machine.shared[swizzled(base + offset + skipped + i, map.swizzle_bytes)];
    }
  });
  store.done = true;
}

}  // namespace

void start_asynchronous_of_block() { mbarriers.clear(); }

void finish_asynchronous(const Thread& thread) {
  if (!thread.copies.empty()) fail("the thread returns with cp.async groups that it has not waited for");
  if (!thread.stores.empty()) fail("the thread returns with TMA stores that it has not waited for");
  if (!thread.products.empty()) fail("the thread returns with wgmma groups that it has not waited for");
}

void finish_asynchronous_of_block() {
  for (const auto& [offset, mbarrier] : mbarriers) {
    if (mbarrier.unit_steps && mbarrier.phases_waited_for <= mbarrier.phase_of_last_copy) {
      fail("the block ends and nobody waited for the last copy that reports to the mbarrier at shared offset %zu",
           offset);
    }
  }
}

size_t swizzled(size_t offset, int span) {
  // Bits 4.. (the 16-byte chunk within the span) are exchanged by bits 7.. (the 128-byte line).
  const size_t lines = static_cast<size_t>(span) / 16;
  return span ? offset ^ ((offset >> 7 & (lines - 1)) << 4) : offset;
}

uint32_t shared_address(const void* pointer) {
  return first_shared_address + static_cast<uint32_t>(shared_offset(pointer));
}

// --- cp.async ---

void copy_async(void* shared, const void* global, int bytes, int valid) {
  const void* caller = __builtin_return_address(0);
  Thread& thread = self();
  const size_t offset = shared_offset(shared, static_cast<size_t>(bytes));
  if (offset % static_cast<size_t>(bytes) ||
      (valid && reinterpret_cast<uintptr_t>(global) % static_cast<size_t>(bytes))) {
    fail("misaligned cp.async of %d bytes (%s)", bytes, source_line(caller).c_str());
  }
  if (valid) check_memory(acting(thread, caller), global, static_cast<size_t>(valid), Access::read);
  check_memory(acting(thread, caller), shared, static_cast<size_t>(bytes), Access::write, /*lasting=*/true);
  thread.copies.open.push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid, false});
  if (machine.completes_now()) perform(thread.copies.open.back());
}

void copy_async_commit() { self().copies.commit(); }

void copy_async_wait(int groups) {
  Thread& thread = self();
  thread.copies.wait(groups, [&](Copy& copy) {
    perform(copy);
    end_write(copy.to, static_cast<size_t>(copy.bytes), thread.linear, thread.step());
  });
}

// --- mbarrier ---

void mbarrier_init(uint64_t* barrier, int count) {
  const void* caller = __builtin_return_address(0);
  const size_t offset = shared_offset(barrier, 8);
  if (offset % 8) fail("misaligned mbarrier at shared offset %zu", offset);
  if (count < 1) fail("mbarrier of count %d", count);
  const Thread& thread = self();
  check_memory(acting(self(), caller), barrier, 8, Access::write);
  Mbarrier fresh{};
  fresh.count = fresh.pending = count;
  fresh.index = static_cast<int>(mbarriers.size());
  fresh.initialiser = thread.linear;
  fresh.initialised_at = thread.step();
  if (!mbarriers.emplace(offset, fresh).second) fail("mbarrier at shared offset %zu initialised twice", offset);
}

void fence_mbarrier_init() {
  for (auto& entry : mbarriers) {
    if (entry.second.initialiser == self().linear) entry.second.init_fenced = true;
  }
}

void mbarrier_arrive(uint64_t* barrier, int expected_bytes) {
  Mbarrier& mbarrier = find(barrier, __builtin_return_address(0));
  mbarrier.gathered.join(self().knowledge);
  self().next_step();
  mbarrier.bytes += expected_bytes;
  --mbarrier.pending;
  complete_if_full(mbarrier);
}

// As the hardware does, waits some time for the phase of this parity to complete, or gives up.
bool mbarrier_try_wait(uint64_t* barrier, unsigned parity) {
  const void* caller = __builtin_return_address(0);
  Mbarrier& mbarrier = find(barrier, caller);
  if (machine.options.completion == Options::Completion::random && machine.one_in(4)) {
    yield();
    if ((mbarrier.phase & 1) == parity) return false;
  }
  while ((mbarrier.phase & 1) == parity) {
    mbarrier.waiting.push_back(&self());
    block("an mbarrier", caller);
  }
  self().knowledge.join(mbarrier.gathered);
  mbarrier.phases_waited_for = mbarrier.phase;
  return true;
}

// Whatever this thread knows of is now visible to asynchronous units, for whoever learns of this fence.
void fence_proxy_async() {
  Thread& thread = self();
  join(thread.knowledge.fenced, thread.knowledge.seen);
  thread.next_step();
}

// --- TMA ---

cudaError_t encode_tensor_map(TensorMap* map, const void* base, int rank, int element_bytes, const int64_t* size,
                              const int64_t* stride_bytes, const int* box, int swizzle_bytes) {
  *map = {static_cast<char*>(const_cast<void*>(base)), rank, element_bytes, swizzle_bytes, {}, {}, {}};
  bool valid = rank >= 1 && rank <= 5 && reinterpret_cast<uintptr_t>(base) % 16 == 0;
  valid = valid && (swizzle_bytes == 0 || swizzle_bytes == 32 || swizzle_bytes == 64 || swizzle_bytes == 128);
  for (int d = 0; valid && d < rank; ++d) {
    map->size[d] = size[d];
    map->stride[d] = d ? stride_bytes[d - 1] : element_bytes;
    map->box[d] = box[d];
    valid = size[d] >= 1 && size[d] <= INT64_C(1) << 32 && box[d] >= 1 && box[d] <= 256;
    valid = valid && (d == 0 || (map->stride[d] % 16 == 0 && map->stride[d] < INT64_C(1) << 40));
  }
  const int row = valid ? box[0] * element_bytes : 0;
  valid = valid && row % 16 == 0 && (!swizzle_bytes || row <= swizzle_bytes);
  return valid ? cudaSuccess : cudaErrorInvalidValue;
}

void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, const int* corner, int rank) {
  const void* caller = __builtin_return_address(0);
  const TensorMap box = *map;
  const size_t base = checked_box(box, shared, rank);
  std::vector<int> at(corner, corner + rank);
  for_each_row(box, corner, [&](size_t, char* address, size_t bytes, size_t) {
    if (bytes) check_memory(acting(self(), caller, true), address, bytes, Access::read);
  });
  start_load(shared, box_bytes(box), barrier, caller, [=] {
    const size_t row = static_cast<size_t>(box.box[0] * box.element_bytes);
    for_each_row(box, at.data(), [&](size_t offset, const char* address, size_t bytes, size_t skipped) {
      for (size_t i = 0; i < row; ++i) {
        const bool inside = i >= skipped && i < skipped + bytes;
        machine.shared[swizzled(base + offset + i, box.swizzle_bytes)] = inside ? address[i - skipped] : 0;
      }
    });
  });
}

void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier) {
  const void* caller = __builtin_return_address(0);
  const size_t size = static_cast<size_t>(bytes), offset = shared_offset(shared, size);
  if (size % 16 || offset % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    fail("cp.async.bulk of %d bytes: size and addresses must be multiples of 16 (%s)", bytes,
         source_line(caller).c_str());
  }
  check_memory(acting(self(), caller, true), global, size, Access::read);
  start_load(shared, size, barrier, caller, [=] { std::memcpy(machine.shared + offset, global, size); });
}

void tma_store(const TensorMap* map, const void* shared, const int* corner, int rank) {
  const void* caller = __builtin_return_address(0);
  checked_box(*map, shared, rank);
  Store store{map, static_cast<const char*>(shared), {}, false};
  std::copy(corner, corner + rank, store.corner);
  check_memory(acting(self(), caller, true), shared, box_bytes(*map), Access::read, /*lasting=*/true);
  self().stores.open.push_back(store);
  if (machine.completes_now()) perform(self().stores.open.back());
}

void tma_store_commit() { self().stores.commit(); }

void tma_store_wait(int groups) {
  const void* caller = __builtin_return_address(0);
  self().stores.wait(groups, [&](Store& store) {
    end_read(store.from, box_bytes(*store.map));
    // It has read until now: what overwrites it must be ordered after this moment, not after the store's start.
    check_memory(acting(self(), caller, true), store.from, box_bytes(*store.map), Access::read);
    for_each_row(*store.map, store.corner, [&](size_t, char* address, size_t bytes, size_t) {
      if (bytes) check_memory(acting(self(), caller, true), address, bytes, Access::write);
    });
    perform(store);
  });
}

}  // namespace simt
