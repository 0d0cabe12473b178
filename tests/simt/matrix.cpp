// ldmatrix, mma.sync and wgmma of the emulated machine. Products are summed in fp64 and rounded once; what the hardware
// does in between is not specified.
#include <memory>

#include "machine.h"

namespace simt {

namespace {

float widen(uint16_t bits, bool is_bf16) { return is_bf16 ? from_bf16(bits) : from_f16(bits); }

// A register holds two neighbours, the first in the lower half.
void unpack(float* two, uint32_t bits, bool is_bf16) {
  two[0] = widen(static_cast<uint16_t>(bits), is_bf16);
  two[1] = widen(static_cast<uint16_t>(bits >> 16), is_bf16);
}

// The 16 x 16 fragment of A that lane `lane` holds in four registers: rows g and g + 8, columns 2t and 2t + 8.
template <class Row>
void unpack_a(const uint32_t* registers, int lane, bool is_bf16, Row row) {
  const int g = lane / 4, t = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) unpack(row(g + i % 2 * 8) + t + i / 2 * 8, registers[i], is_bf16);
}

float dot(const float* a, const float* b, double start) {
  for (int k = 0; k < 16; ++k) start += static_cast<double>(a[k]) * b[k];
  return static_cast<float>(start);
}

// --- wgmma ---

struct Warpgroup {
  std::deque<std::unique_ptr<Product>> products;
  size_t finished = 0;  // of them, the first ones
};
std::vector<Warpgroup> warpgroups;

int unit_of_warp() { return machine.thread_count + self().linear / 32; }

Warpgroup& warpgroup() { return warpgroups[static_cast<size_t>(self().linear / 128)]; }

// A matrix descriptor (PTX: "Matrix descriptor format"): where element (row, k) of a 128-byte-swizzled operand lies.
// K-major: 8 rows of 64 numbers make an atom of 1 KiB, `stride` bytes to the next 8 rows. Transposed: 64 rows x 8 of k
// make an atom, `leading` bytes to the next 64 rows, `stride` to the next 8 of k.
size_t element_offset(uint64_t descriptor, int row, int k, bool transpose) {
  const size_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
  const size_t stride = (descriptor >> 32 & 0x3FFF) << 4, r = static_cast<size_t>(row), c = static_cast<size_t>(k);
  if (descriptor >> 62 != 1) fail("wgmma: only operands swizzled by 128 bytes are emulated");
  if (descriptor >> 49 & 7) fail("wgmma: base offsets are not emulated");
  const size_t plain = transpose ? start + r % 64 * 2 + r / 64 * leading + c % 8 * 128 + c / 8 * stride
                                 : start + c * 2 + r % 8 * 128 + r / 8 * stride;
  const size_t base = shared_address(machine.shared), address = swizzled(plain, 128);
  if (address < base || address + 2 > base + machine.shared_bytes) fail("wgmma operand outside of shared memory");
  return address - base;
}

// body(address) for what a warp of the warpgroup reads of shared memory: its 16 rows of A, all of B, 16 bytes at a
// time.
template <class Body>
void for_each_operand(const Product& product, int warp, Body body) {
  if (!machine.checking()) return;
  const auto visit = [&](uint64_t descriptor, int first, int rows, bool transpose) {
    for (int row = first; row < first + rows; row += transpose ? 8 : 1) {
      for (int k = 0; k < 16; k += transpose ? 1 : 8) {
        body(machine.shared + element_offset(descriptor, row, k, transpose));
      }
    }
  };
  if (!product.a_in_registers) visit(product.a, warp * 16, 16, product.transpose_a);
  visit(product.b, 0, product.n, product.transpose_b);
}

// All wgmma instructions are .sync.aligned: the lanes of a warp execute them together.
void converge(Collective kind, const void* caller) {
  gather_warp(~0u, kind, nullptr, [](void**, unsigned) {}, caller);
}

void perform(const Product& product) {
  std::vector<float> a(64 * 16), b(static_cast<size_t>(product.n) * 16);
  const auto load = [&](uint64_t descriptor, int row, int k, bool transpose) {
    uint16_t bits;
    std::memcpy(&bits, machine.shared + element_offset(descriptor, row, k, transpose), 2);
    return widen(bits, product.is_bf16);
  };
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < product.n; ++row) b[row * 16 + k] = load(product.b, row, k, product.transpose_b);
    for (int row = 0; row < 64 && !product.a_in_registers; ++row) {
      a[row * 16 + k] = load(product.a, row, k, product.transpose_a);
    }
  }
  for (int thread = 0; thread < 128; ++thread) {
    const int first = thread / 32 * 16;  // of this warp's rows
    if (product.a_in_registers) {
      unpack_a(product.a_registers[thread], thread % 32, product.is_bf16,
               [&](int row) { return &a[(first + row) * 16]; });
    }
  }
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < product.n / 2; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      float& d = product.d[thread][i];
      d = dot(&a[row * 16], &b[column * 16], product.accumulate ? d : 0);
    }
  }
}

// In order: a product may add to what the one before it left.
void perform_up_to(Warpgroup& group, const Product* last) {
  while (group.finished < group.products.size()) {
    Product& product = *group.products[group.finished];
    if (product.arrived < 128) return;
    perform(product);
    product.done = true;
    ++group.finished;
    if (&product == last) return;
  }
}

bool same_operands(const Product& x, const Product& y) {
  return x.n == y.n && x.b == y.b && (x.a_in_registers || x.a == y.a) && x.a_in_registers == y.a_in_registers &&
         x.accumulate == y.accumulate && x.transpose_a == y.transpose_a && x.transpose_b == y.transpose_b &&
         x.is_bf16 == y.is_bf16;
}

}  // namespace

void start_matrix_of_block() {
  warpgroups = std::vector<Warpgroup>(static_cast<size_t>(machine.thread_count + 127) / 128);
}

void check_registers(const Thread& thread, const void* address, size_t bytes, const void* caller) {
  if (thread.products.empty()) return;
  const char* begin = static_cast<const char*>(address);
  const auto check = [&](const Product* product) {
    const char* d = reinterpret_cast<const char*>(product->d[thread.linear % 128]);
    if (begin < d + product->n / 2 * sizeof(float) && d < begin + bytes) {
      fail("accumulator touched while a wgmma in flight owns it (%s)", source_line(caller).c_str());
    }
  };
  for (const auto& group : thread.products.committed) {
    for (const Product* product : group) check(product);
  }
  for (const Product* product : thread.products.open) check(product);
}

// --- ldmatrix and mma.sync ---

namespace {
struct MatrixLoad {
  uint32_t* registers;
  const char* row;
  int count;
  bool transpose;
};
struct WarpProduct {
  float* d;
  const uint32_t *a, *b;
  const float* c;
  bool is_bf16;
};

void load_matrices(void** arguments, unsigned) {
  const auto lanes = reinterpret_cast<MatrixLoad**>(arguments);
  for (int matrix = 0; matrix < lanes[0]->count; ++matrix) {
    for (int lane = 0; lane < 32; ++lane) {
      uint16_t two[2];
      for (int i = 0; i < 2; ++i) {
        const int across = lane / 4, along = lane % 4 * 2 + i;
        const int row = lanes[0]->transpose ? along : across, column = lanes[0]->transpose ? across : along;
        std::memcpy(&two[i], lanes[matrix * 8 + row]->row + column * 2, 2);
      }
      std::memcpy(&lanes[lane]->registers[matrix], two, sizeof two);
    }
  }
}

void multiply_fragments(void** arguments, unsigned) {
  const auto lanes = reinterpret_cast<WarpProduct**>(arguments);
  float a[16][16], b[8][16];  // b transposed: [column][k]
  for (int lane = 0; lane < 32; ++lane) {
    const WarpProduct& own = *lanes[lane];
    unpack_a(own.a, lane, own.is_bf16, [&](int row) { return a[row]; });
    for (int i = 0; i < 2; ++i) unpack(&b[lane / 4][lane % 4 * 2 + i * 8], own.b[i], own.is_bf16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      lanes[lane]->d[i] = dot(a[lane / 4 + i / 2 * 8], b[lane % 4 * 2 + i % 2], lanes[lane]->c[i]);
    }
  }
}
}  // namespace

void ldmatrix(uint32_t* registers, const void* row, int count, bool transpose) {
  MatrixLoad load{registers, static_cast<const char*>(row), count, transpose};
  const void* caller = __builtin_return_address(0);
  if (self().lane < count * 8) {
    if (shared_offset(row, 16) % 16) fail("misaligned row of ldmatrix (%s)", source_line(caller).c_str());
    check_access(row, 16, Access::read, caller);
  }
  gather_warp(~0u, Collective::ldmatrix, &load, load_matrices, caller);
}

void mma(float* d, const uint32_t* a, const uint32_t* b, const float* c, bool is_bf16) {
  WarpProduct product{d, a, b, c, is_bf16};
  gather_warp(~0u, Collective::mma, &product, multiply_fragments, __builtin_return_address(0));
}

// --- wgmma ---

void wgmma_fence() {
  converge(Collective::wgmma_fence, __builtin_return_address(0));
  self().registers_fenced = true;
}

void wgmma(float* d, int n, const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate, bool transpose_a,
           bool transpose_b, bool is_bf16) {
  const void* caller = __builtin_return_address(0);
  converge(Collective::wgmma, caller);
  Thread& thread = self();
  if (!thread.registers_fenced) fail("wgmma without a wgmma.fence since the registers were last free");
  Warpgroup& group = warpgroup();
  Product issued{};
  issued.n = n;
  issued.a = a;
  issued.b = b;
  issued.a_in_registers = a_registers != nullptr;
  issued.accumulate = accumulate;
  issued.transpose_a = transpose_a;
  issued.transpose_b = transpose_b;
  issued.is_bf16 = is_bf16;
  issued.number = static_cast<uint32_t>(thread.products_issued) + 1;
  if (thread.products_issued == group.products.size()) group.products.push_back(std::make_unique<Product>(issued));
  Product& product = *group.products[thread.products_issued++];
  if (!same_operands(product, issued)) fail("the threads of a warpgroup issue different wgmma");
  const int own = thread.linear % 128;
  product.d[own] = d;
  if (a_registers) std::copy(a_registers, a_registers + 4, product.a_registers[own]);
  // One lane speaks for its warp, here and at the wait.
  const int warp = own / 32;
  if (!product.reading[warp]) {
    product.reading[warp] = true;
    const Actor actor{unit_of_warp(), product.number, &thread.knowledge, caller, true};
    for_each_operand(product, warp,
                     [&](const char* at) { check_memory(actor, at, 16, Access::read, /*lasting=*/true); });
  }
  thread.products.open.push_back(&product);
  if (++product.arrived < 128) return;
  for (Thread* waiting : product.waiting) wake(waiting);
  product.waiting.clear();
  if (machine.completes_now()) perform_up_to(group, &product);
}

void wgmma_commit() {
  converge(Collective::wgmma_commit, __builtin_return_address(0));
  self().products.commit();
}

void wgmma_wait(int groups) {
  const void* caller = __builtin_return_address(0);
  converge(Collective::wgmma_wait, caller);
  Thread& thread = self();
  thread.products.wait(groups, [&](Product* product) {
    while (product->arrived < 128) {
      product->waiting.push_back(&thread);
      block("the other warps of its warpgroup to issue a wgmma", caller);
    }
    if (!product->done) perform_up_to(warpgroup(), product);
    bool& reading = product->reading[thread.linear % 128 / 32];
    if (reading) for_each_operand(*product, thread.linear % 128 / 32, [](const char* at) { end_read(at, 16); });
    reading = false;
    thread.knowledge.learn(unit_of_warp(), product->number);
  });
  if (thread.products.empty()) thread.registers_fenced = false;
}

void set_registers(int count) {
  if (count < 24 || count > 256 || count % 8) fail("setmaxnreg %d: must be a multiple of 8 in [24, 256]", count);
}

}  // namespace simt
