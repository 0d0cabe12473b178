// Memory of the emulated machine, and the checks of every access: bounds, alignment, initialisation, races.
//
// Kernels are compiled with -fsanitize=thread,alignment but linked with the functions at the end of this file instead
// of the sanitizer's: each load and store of theirs comes here with the address of the code that made it.
#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "machine.h"

namespace simt {

namespace {

// One moment of one thread of one block.
struct Moment {
  uint32_t block = 0, step = 0;
  int thread = -1;  // -1: never
};

// What is known of one byte. Of the threads that have read it since the last write, `read` is the latest; if several of
// them are unordered, `readers` - 1 is their entry in Shadow::clocks.
struct Byte {
  Moment write, read;
  const void* write_caller = nullptr;
  const void* read_caller = nullptr;
  uint32_t readers = 0;
  uint32_t lasting_reads = 0;
  bool initialised = false, atomic = false, asynchronous_proxy = false, lasting_write = false;
  bool other_blocks_read = false;
};

struct Shadow {
  std::vector<Byte> bytes;
  std::vector<Clock> clocks;
};

struct Buffer {
  const char* begin;
  size_t size;
  std::string name;
  bool writable;
  Shadow shadow;  // of writable ones: what is only read cannot race
};

std::vector<Buffer> buffers;
Shadow shared_shadow;
constexpr size_t shared_alignment = 1024, shared_space = 256 << 10;

// --- Messages ---

struct Place {
  const char* space;
  size_t offset;
};
std::string text(const Place& place) { return std::string(place.space) + " byte " + std::to_string(place.offset); }

[[noreturn]] void fail_access(const char* what, const Place& place, const void* caller) {
  fail("%s at %s (%s)", what, text(place).c_str(), source_line(caller).c_str());
}
std::string name_of(const Moment& moment) {
  const int warp = moment.thread - machine.thread_count;
  const std::string block = "block " + std::to_string(moment.block) + " ";
  if (warp < 0) return block + "thread " + std::to_string(moment.thread);
  return warp < machine.warp_count() ? block + "wgmma of warp " + std::to_string(warp) : block + "asynchronous copy";
}
[[noreturn]] void fail_race(const char* what, const Place& place, const Actor& actor, const Moment& other,
                            const void* other_caller) {
  fail("%s at %s (%s), after %s (%s)", what, text(place).c_str(), source_line(actor.caller).c_str(),
       name_of(other).c_str(), source_line(other_caller).c_str());
}

// --- Races ---

// What store_release tells: of each block, what came before.
using Told = std::map<uint32_t, Clock>;
std::map<const int*, std::map<int, std::shared_ptr<const Told>>> told;  // by counter and value
// What the running block's threads were told, and at which step of which thread: whoever knows of that knows it, too.
struct Heard {
  int thread;
  uint32_t step;
  std::shared_ptr<const Told> what;
};
std::vector<Heard> heard;
std::vector<Thread*> waiting_for_counters;

bool came_before(const Moment& moment, const Actor& actor) {
  if (moment.thread < 0) return true;
  if (moment.block == machine.block_number) return actor.knowledge->knows(moment.thread, moment.step);
  return std::any_of(heard.rbegin(), heard.rend(), [&](const Heard& one) {
    const auto found = one.what->find(moment.block);
    return found != one.what->end() && static_cast<size_t>(moment.thread) < found->second.size() &&
           moment.step <= found->second[moment.thread] && actor.knowledge->knows(one.thread, one.step);
  });
}

void check_order_of_readers(Byte& byte, const Shadow& shadow, const Place& place, const Actor& actor) {
  const char* what = "write over data that another thread may still read (missing barrier?)";
  if (!came_before(byte.read, actor) || byte.other_blocks_read) {
    fail_race(what, place, actor, byte.read, byte.read_caller);
  }
  if (!byte.readers) return;
  const Clock& clock = shadow.clocks[byte.readers - 1];
  for (int thread = 0; thread < static_cast<int>(clock.size()); ++thread) {
    const Moment reader{byte.read.block, clock[thread], clock[thread] ? thread : -1};
    if (!came_before(reader, actor)) fail_race(what, place, actor, reader, byte.read_caller);
  }
}

void remember_reader(Byte& byte, Shadow& shadow, const Actor& actor) {
  if (byte.read.thread >= 0 && byte.read.block != machine.block_number && byte.readers) {
    byte.other_blocks_read = true;  // of several of them, this actor may know some
    byte.readers = 0;
  } else if (!came_before(byte.read, actor)) {
    if (byte.read.block != machine.block_number) {
      byte.other_blocks_read = true;
    } else {
      if (!byte.readers) {
        shadow.clocks.emplace_back();
        byte.readers = static_cast<uint32_t>(shadow.clocks.size());
      }
      Clock& clock = shadow.clocks[byte.readers - 1];
      const size_t size = static_cast<size_t>(std::max(byte.read.thread, actor.id)) + 1;
      if (clock.size() < size) clock.resize(size);
      clock[byte.read.thread] = std::max(clock[byte.read.thread], byte.read.step);
      clock[actor.id] = actor.step;
    }
  } else if (byte.readers) {
    Clock& clock = shadow.clocks[byte.readers - 1];
    if (clock.size() <= static_cast<size_t>(actor.id)) clock.resize(static_cast<size_t>(actor.id) + 1);
    clock[actor.id] = actor.step;
  }
  byte.read = {machine.block_number, actor.step, actor.id};
  byte.read_caller = actor.caller;
}

void check_proxy(const Byte& byte, const Place& place, const Actor& actor) {
  if (!actor.asynchronous_proxy || byte.asynchronous_proxy || byte.write.thread < 0) return;
  if (!actor.knowledge->fences(byte.write.thread, byte.write.step)) {
    fail_race("asynchronous access to what ordinary code wrote, without fence.proxy.async", place, actor, byte.write,
              byte.write_caller);
  }
}

void check_byte(Byte& byte, Shadow& shadow, const Place& place, const Actor& actor, Access kind) {
  if (byte.lasting_write) {
    fail_race("access to memory that an asynchronous copy is still writing (missing wait?)", place, actor, byte.write,
              byte.write_caller);
  }
  const bool both_atomic = kind == Access::atomic && byte.atomic;
  if (!both_atomic && !came_before(byte.write, actor)) {
    fail_race(kind == Access::read ? "read that is not ordered after a write (missing barrier?)"
                                   : "write that is not ordered after a write (missing barrier?)",
              place, actor, byte.write, byte.write_caller);
  }
  if (kind != Access::write && !byte.initialised) fail_access("read of uninitialised memory", place, actor.caller);
  check_proxy(byte, place, actor);
  if (kind == Access::read) return remember_reader(byte, shadow, actor);
  if (byte.lasting_reads) {
    fail_race("write over data that an asynchronous unit is still reading (missing wait?)", place, actor, byte.read,
              byte.read_caller);
  }
  if (byte.read.thread >= 0) check_order_of_readers(byte, shadow, place, actor);
  byte.read = Moment();
  byte.readers = 0;
  byte.other_blocks_read = false;
  byte.initialised = true;
  byte.atomic = kind == Access::atomic;
  byte.asynchronous_proxy = actor.asynchronous_proxy;
  byte.write = {machine.block_number, actor.step, actor.id};
  byte.write_caller = actor.caller;
}

void check_alignment(const void* address, size_t bytes, const Place& place, const void* caller) {
  const bool vector = bytes <= 16 && (bytes & (bytes - 1)) == 0;
  if (vector && reinterpret_cast<uintptr_t>(address) % bytes) {
    const std::string what = "misaligned access of " + std::to_string(bytes) + " bytes";
    fail_access(what.c_str(), place, caller);
  }
}

// --- Where an address lies ---

bool within(const void* address, const void* begin, size_t size) {
  const char* p = static_cast<const char*>(address);
  return p >= static_cast<const char*>(begin) && p < static_cast<const char*>(begin) + size;
}

// Constant tables and the like: data of the library whose code makes the access.
bool in_library_of(const void* caller, const void* address) {
  Dl_info code{}, data{};
  return dladdr(caller, &code) && dladdr(address, &data) && code.dli_fbase == data.dli_fbase;
}

void check_global(const Actor& actor, const char* address, size_t bytes, Access kind) {
  for (Buffer& buffer : buffers) {
    if (!within(address, buffer.begin, buffer.size)) continue;
    const Place place{buffer.name.c_str(), static_cast<size_t>(address - buffer.begin)};
    if (place.offset + bytes > buffer.size) fail_access("access past the end", place, actor.caller);
    check_alignment(address, bytes, place, actor.caller);
    if (!buffer.writable) {
      if (kind != Access::read) fail_access("write to an input", place, actor.caller);
      return;
    }
    for (size_t i = 0; i < bytes; ++i) {
      check_byte(buffer.shadow.bytes[place.offset + i], buffer.shadow, {place.space, place.offset + i}, actor, kind);
    }
    return;
  }
  if (in_library_of(actor.caller, address)) return;
  fail("%s of %zu bytes outside every buffer (%s)", kind == Access::read ? "read" : "write", bytes,
       source_line(actor.caller).c_str());
}

// What comes from the compiler's hooks and from the wrappers.
void access(const void* address, size_t bytes, Access kind, const void* caller) {
  if (!machine.current || !machine.checking()) return;
  Thread& thread = self();
  if (within(address, thread.stack, stack_bytes)) return check_registers(thread, address, bytes, caller);
  if (within(address, machine.parameters, machine.parameter_bytes)) return;
  if (machine.options.preempt && machine.one_in(machine.options.preempt)) yield();
  check_memory(acting(thread, caller), address, bytes, kind);
}

}  // namespace

Actor acting(Thread& thread, const void* caller, bool asynchronous_proxy) {
  return {thread.linear, thread.step(), &thread.knowledge, caller, asynchronous_proxy};
}

void check_memory(const Actor& actor, const void* address, size_t bytes, Access kind, bool lasting) {
  if (!machine.checking()) return;
  const char* begin = static_cast<const char*>(address);
  if (!within(address, machine.shared, shared_space)) {
    return check_global(actor, begin, bytes, kind);
  }
  const size_t offset = static_cast<size_t>(begin - machine.shared);
  if (offset + bytes > machine.shared_bytes) fail_access("access past the end", {"shared", offset}, actor.caller);
  check_alignment(address, bytes, {"shared", offset}, actor.caller);
  for (size_t i = offset; i < offset + bytes; ++i) {
    check_byte(shared_shadow.bytes[i], shared_shadow, {"shared", i}, actor, kind);
    if (lasting && kind == Access::write) shared_shadow.bytes[i].lasting_write = true;
    if (lasting && kind == Access::read) ++shared_shadow.bytes[i].lasting_reads;
  }
}

void end_write(const void* address, size_t bytes, int id, uint32_t step) {
  if (!machine.checking()) return;
  const size_t offset = shared_offset(address, bytes);
  for (size_t i = offset; i < offset + bytes; ++i) {
    Byte& byte = shared_shadow.bytes[i];
    byte.lasting_write = false;
    byte.write.thread = id;
    byte.write.step = step;
  }
}

void end_read(const void* address, size_t bytes) {
  if (!machine.checking()) return;
  const size_t offset = shared_offset(address, bytes);
  for (size_t i = offset; i < offset + bytes; ++i) --shared_shadow.bytes[i].lasting_reads;
}

void check_access(const void* address, size_t bytes, Access kind, const void* caller) {
  access(address, bytes, kind, caller);
}

size_t shared_offset(const void* address, size_t bytes) {
  const char* begin = static_cast<const char*>(address);
  if (begin < machine.shared || begin + bytes > machine.shared + machine.shared_bytes) {
    fail("%zu bytes at shared offset %td: not inside the %zu bytes of shared memory", bytes, begin - machine.shared,
         machine.shared_bytes);
  }
  return static_cast<size_t>(begin - machine.shared);
}

void start_memory_of_launch() {
  told.clear();
  if (!machine.shared) machine.shared = static_cast<char*>(std::aligned_alloc(shared_alignment, shared_space));
  if (!machine.shared) std::abort();
  for (Buffer& buffer : buffers) {
    buffer.shadow.clocks.clear();
    // What earlier launches did came before; whether it initialised a byte is remembered.
    for (Byte& byte : buffer.shadow.bytes) {
      const bool initialised = byte.initialised;
      byte = Byte();
      byte.initialised = initialised;
    }
  }
}

void start_memory_of_block() {
  heard.clear();
  waiting_for_counters.clear();
  std::memset(machine.shared, 0xFF, machine.shared_bytes);  // NaN in every float format
  if (!machine.checking()) return;
  shared_shadow.bytes.assign(machine.shared_bytes, Byte());
  shared_shadow.clocks.clear();
}

// --- Counters that blocks wait for ---

void store_release(int* counter, int value) {
  check_memory(acting(self(), __builtin_return_address(0)), counter, sizeof *counter, Access::atomic);
  Thread& thread = self();
  const auto all = std::make_shared<Told>();
  (*all)[machine.block_number] = thread.knowledge.seen;
  for (const Heard& one : heard) {
    if (!thread.knowledge.knows(one.thread, one.step)) continue;
    for (const auto& [block, clock] : *one.what) join((*all)[block], clock);
  }
  told[counter][value] = all;
  *counter = value;
  thread.next_step();
  for (Thread* waiting : waiting_for_counters) wake(waiting);
  waiting_for_counters.clear();
}

int acquire_above(const int* counter, int value) {
  const void* caller = __builtin_return_address(0);
  Thread& thread = self();
  check_memory(acting(thread, caller), counter, sizeof *counter, Access::atomic);
  while (*counter <= value) {
    waiting_for_counters.push_back(&thread);
    block("a counter that no block will set", caller);
  }
  // Of what it may see, the least: the first value that is high enough.
  const auto first = told[counter].upper_bound(value);
  if (first == told[counter].end()) return *counter;
  const auto own = first->second->find(machine.block_number);
  if (own != first->second->end()) join(thread.knowledge.seen, own->second);
  thread.next_step();
  heard.push_back({thread.linear, thread.step(), first->second});
  return first->first;
}

std::string source_line(const void* caller) {
  Dl_info library{};
  if (!caller || !dladdr(caller, &library) || !library.dli_fname) return "?";
  // The address is where the access returns to: the instruction before it made it.
  const ptrdiff_t offset = static_cast<const char*>(caller) - static_cast<char*>(library.dli_fbase) - 1;
  char command[4096], line[512];
  std::snprintf(command, sizeof command, "addr2line -Csie '%s' 0x%tx 2>/dev/null", library.dli_fname, offset);
  FILE* output = popen(command, "r");
  if (!output) return "?";
  // From the innermost inlined function outwards: the first that is not a wrapper is the kernel's line.
  std::string found = "?";
  while (std::fgets(line, sizeof line, output)) {
    line[std::strcspn(line, "\n ")] = 0;
    found = line;
    if (!std::strstr(line, "ptx.h:") && !std::strstr(line, "wgmma.h:") && !std::strstr(line, "emulator.h:")) break;
  }
  pclose(output);
  return found;
}

}  // namespace simt

// --- For whoever drives the emulator (runtime.py) ---

extern "C" {

void simt_configure(int schedule, int completion, unsigned preempt, unsigned seed, int hooks) {
  simt::Options& options = simt::machine.options;
  options.schedule = static_cast<simt::Options::Schedule>(schedule);
  options.completion = static_cast<simt::Options::Completion>(completion);
  options.preempt = preempt;
  options.seed = seed;
  options.hooks = hooks != 0;
  simt::machine.error.clear();
  simt::machine.most_shared_bytes = 0;
}

// A buffer that kernels may touch. Not writable: initialised, and any write is an error.
void simt_register(const void* address, size_t bytes, const char* name, int writable, int initialised) {
  simt::buffers.push_back({static_cast<const char*>(address), bytes, name, writable != 0, {}});
  if (!writable) return;
  auto& shadow = simt::buffers.back().shadow.bytes;
  shadow.resize(bytes);
  for (auto& byte : shadow) byte.initialised = initialised != 0;
}
void simt_forget_buffers() { simt::buffers.clear(); }

// The most shared memory that a launch since simt_configure has asked for.
size_t simt_shared_bytes() { return simt::machine.most_shared_bytes; }

// Why the last launch failed; empty if it passed.
const char* simt_error() { return simt::machine.error.c_str(); }

// --- Called by code compiled with -fsanitize=thread,alignment ---

#define SIMT_HOOK(name, bytes, kind)                                               \
  void __tsan_##name##bytes(void* address) {                                       \
    simt::access(address, bytes, simt::Access::kind, __builtin_return_address(0)); \
  }
#define SIMT_HOOKS(bytes)                  \
  SIMT_HOOK(read, bytes, read)             \
  SIMT_HOOK(write, bytes, write)           \
  SIMT_HOOK(unaligned_read, bytes, read)   \
  SIMT_HOOK(unaligned_write, bytes, write) \
  SIMT_HOOK(volatile_read, bytes, read)    \
  SIMT_HOOK(volatile_write, bytes, write)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
void __tsan_read_range(void* address, size_t bytes) {
  simt::access(address, bytes, simt::Access::read, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  simt::access(address, bytes, simt::Access::write, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// What -fsanitize=alignment passes: where in the source, of which type, and the logarithm of the required alignment.
struct TypeMismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(TypeMismatch* mismatch, uintptr_t address) {
  if (!simt::machine.current || !simt::machine.checking()) return;
  simt::fail("misaligned access: address %#zx needs a multiple of %d (%s)", static_cast<size_t>(address),
             1 << mismatch->log_alignment, simt::source_line(__builtin_return_address(0)).c_str());
}
}
