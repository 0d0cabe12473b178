// Random cases of the attention kernels.
#include "attention.h"

#include <deque>

#include "instance.h"

namespace pyext {
namespace {

constexpr int64_t kUnbounded = int64_t{1} << 62;

// How the row of relative rows depends on the distance.
enum class Index { identity, clipped, constant, rising, jumping };
// What a block table holds: no partial block, some, or nothing else.
enum class Blocks { none, full, mixed, partial };

// What a case is made of. Strides come later, from the seed.
struct Case {
  DType dtype;
  int64_t batch, kv_heads, group, q_len, k_len, head_dim, value_dim;
  int64_t left = kUnbounded, right = kUnbounded;
  int64_t sequences = 0;
  DType dense_dtype;
  bool dense, diag, diag_index, mask, intervals, sinks, grad_lse;
  bool rel_q, rel_k, own_rel_query, segment, rotates, interleaved;
  Index rel_index;
  Blocks blocks;
  double softcap, dropout;
  uint64_t seed;
  int64_t heads() const { return kv_heads * group; }
  DType accumulator() const { return dtype == DType::f64 ? DType::f64 : DType::f32; }
};

Case make_case(Random& random) {
  const int64_t lengths[] = {0, 1, 2, 3, 7, 16, 17, 31, 64, 65, 97, 130, 259, 300};
  const int64_t dims[] = {1, 3, 8, 16, 20, 33, 64, 72, 80, 128, 130, 256};
  Case c{};
  c.dtype = static_cast<DType>(random.below(4));
  c.batch = 1 + random.below(2);
  c.kv_heads = 1 + random.below(2);
  c.group = random.one_in(3) ? 3 : 1;
  c.q_len = lengths[random.below(14)];
  c.k_len = lengths[random.below(14)];
  if (c.q_len <= 8 && random.one_in(2)) c.k_len = 500 + random.below(600);  // decoding: several chunks of keys
  c.head_dim = dims[random.below(12)];
  c.value_dim = random.one_in(2) ? c.head_dim : dims[random.below(12)];
  if (random.one_in(4)) c.right = 0;
  if (random.one_in(4)) c.left = random.below(70);
  if (random.one_in(6)) c.right = random.below(70);
  if (random.one_in(5)) {
    c.batch = 1;
    c.sequences = 1 + random.below(4);
  }
  c.dense = !c.sequences && random.one_in(3);
  c.dense_dtype = static_cast<DType>(random.below(c.dtype == DType::f64 ? 4 : 3));  // fp64 only beside fp64
  c.diag = random.one_in(2);
  c.diag_index = c.diag && random.one_in(2);
  c.mask = !c.sequences && random.one_in(4);
  c.intervals = random.one_in(3);
  c.sinks = random.one_in(3);
  c.grad_lse = random.one_in(2);
  c.softcap = random.one_in(4) ? 5.0 : 0.0;
  c.dropout = random.one_in(4) ? 0.25 : 0.0;
  if (random.one_in(2)) {  // the rest is left to the kernel for decoding, which takes none of these
    c.rel_q = random.one_in(2), c.rel_k = random.one_in(2);
    c.own_rel_query = random.one_in(2);
    c.rel_index = static_cast<Index>(random.below(5));
    c.segment = !c.sequences && random.one_in(3);
    if (!c.sequences) c.blocks = static_cast<Blocks>(random.below(4));
  }
  c.rotates = !c.rel_q && !c.rel_k && random.one_in(3);
  c.interleaved = random.one_in(2);
  c.seed = random.next();
  return c;
}

std::string describe(const Case& c) {
  std::string text = name_of(c.dtype);
  if (c.dense) text += std::string(" dense=") + name_of(c.dense_dtype);
  auto number = [&](const char* name, double value) { text += number_text(name, value); };
  number("batch", c.batch), number("heads", c.heads()), number("kv_heads", c.kv_heads);
  number("q_len", c.q_len), number("k_len", c.k_len), number("head_dim", c.head_dim), number("value_dim", c.value_dim);
  if (c.left != kUnbounded) number("left", c.left);
  if (c.right != kUnbounded) number("right", c.right);
  if (c.sequences) number("sequences", c.sequences);
  if (c.softcap != 0) number("softcap", c.softcap);
  if (c.dropout != 0) number("dropout", c.dropout);
  const std::pair<bool, const char*> flags[] = {{c.dense, " dense"},
                                                {c.diag, " diag"},
                                                {c.diag_index, " index"},
                                                {c.mask, " mask"},
                                                {c.sinks, " sinks"},
                                                {c.intervals, " intervals"},
                                                {c.grad_lse, " grad_lse"},
                                                {c.segment, " segment"},
                                                {c.rotates, " rotates"},
                                                {c.rotates && c.interleaved, " interleaved"},
                                                {c.rel_q, " rel_q"},
                                                {c.rel_k, " rel_k"},
                                                {c.rel_q && c.own_rel_query, " own_rel_query"}};
  for (const auto& [set, name] : flags) text += set ? name : "";
  const char* indices[] = {"identity", "clipped", "constant", "rising", "jumping"};
  if (c.rel_q || c.rel_k) text += std::string(" rel_index=") + indices[static_cast<int>(c.rel_index)];
  const char* blocks[] = {"none", "full", "mixed", "partial"};
  if (c.blocks != Blocks::none) text += std::string(" blocks=") + blocks[static_cast<int>(c.blocks)];
  return text;
}

struct Instance : Tensors {
  Instance(const Case& c, bool guard_before) : Tensors(c.seed, guard_before), c_(c) {
    AttentionProblem& p = problem;
    p.dtype = c.dtype;
    p.batch = c.batch, p.heads = c.heads(), p.kv_heads = c.kv_heads;
    p.q_len = c.q_len, p.k_len = c.k_len, p.head_dim = c.head_dim, p.value_dim = c.value_dim;
    p.left = c.left, p.right = c.right;
    p.scale = 1 / std::sqrt(static_cast<double>(c.head_dim)), p.softcap = c.softcap, p.dropout_p = c.dropout,
    p.seed = c.seed;
    p.query = input(c.heads(), c.q_len, c.head_dim);
    p.key = input(c.kv_heads, c.k_len, c.head_dim);
    p.value = input(c.kv_heads, c.k_len, c.value_dim);
    p.grad_out = input(c.heads(), c.q_len, c.value_dim);
    p.out = output("out", c.heads(), c.q_len, c.value_dim);
    p.grad_query = output("grad_query", c.heads(), c.q_len, c.head_dim);
    p.grad_key = output("grad_key", c.kv_heads, c.k_len, c.head_dim);
    p.grad_value = output("grad_value", c.kv_heads, c.k_len, c.value_dim);
    const int64_t rows = c.batch * c.heads() * c.q_len;
    p.lse = static_cast<double*>(result("lse", View::make(1, 1, 1, rows, 0, 0), DType::f64).data());
    if (c.grad_lse) p.grad_lse = static_cast<const double*>(numbers(rows, DType::f64));
    if (c.sinks) {
      p.sinks = numbers(c.heads(), c.accumulator());
      p.grad_sinks = flat("grad_sinks", c.heads());
    }
    add_masks();
    add_blocks();
    add_biases();
    add_relative();
    add_segments();
    add_sequences();
    if (c_.rotates) add_rotation();
  }

  // Runs forward (once more with rotated queries and keys) and backward; the results by name, as numbers.
  Results run(const KernelTable& kernels, const Parallel& parallel) {
    return run_and_take([&](Results& values) {
      if (c_.rotates) {
        AttentionProblem rotated = problem;
        rotated.rotate_query = &rotate_query_, rotated.rotate_key = &rotate_key_;
        kernels.attention_forward(rotated, parallel);
        for (Result& result : results_)
          if (result.name == "out" || result.name == "lse") values["rotated " + result.name] = take(result);
      }
      kernels.attention_forward(problem, parallel);
      kernels.attention_backward(problem, parallel);
    });
  }

  AttentionProblem problem;

 private:
  Input input(int64_t heads, int64_t rows, int64_t columns) {
    const View view = layout(c_.batch, heads, rows, columns);
    return strided<const void*>(view, filled(view, c_.dtype, [&] { return number(); }));
  }
  Output output(const std::string& name, int64_t heads, int64_t rows, int64_t columns) {
    const View view = layout(c_.batch, heads, rows, columns);
    return strided<void*>(view, result(name, view, c_.dtype));
  }
  void* flat(const std::string& name, int64_t count) {
    return result(name, View::make(1, 1, 1, count, 0, 0), c_.accumulator()).data();
  }
  // A gradient that the kernel adds to; now and then it is not wanted.
  void* flat_sum(const std::string& name, int64_t count) {
    if (random_.one_in(3)) return nullptr;
    void* data = flat(name, count);
    results_.back().zeroed = true;
    return data;
  }
  void add_masks() {
    if (c_.intervals) {
      const bool batched = random_.one_in(2);
      problem.intervals_batch = batched ? c_.q_len * 2 : 0;
      const int64_t count = (batched ? c_.batch : 1) * c_.q_len * 2;
      const int64_t range = c_.k_len + 10;  // some reach beyond the keys, some are empty
      problem.intervals = integers(count, [&](int64_t i) {
        const int64_t at = random_.below(range);
        return static_cast<int32_t>(i % 2 ? c_.k_len + 5 - at / 2 : at - 5);
      });
    }
    if (c_.mask) {
      const int64_t batch = random_.one_in(2) ? c_.batch : 1, heads = random_.one_in(2) ? c_.heads() : 1;
      const int64_t rows = random_.one_in(3) ? 1 : c_.q_len;
      const View view = layout(batch, heads, rows, c_.k_len);
      masks_.push_back(std::make_unique<Memory>(view.elements(), 1, guard_before_));
      char* bytes = static_cast<char*>(masks_.back()->data());
      for (int64_t i = 0; i < view.elements(); ++i) bytes[i] = !random_.one_in(3);
      problem.mask = broadcast(strided<const void*>(view, *masks_.back()), view);
    }
  }

  void add_blocks() {
    if (c_.blocks == Blocks::none) return;
    const int64_t rows = (c_.q_len + kBlock - 1) / kBlock, columns = (c_.k_len + kBlock - 1) / kBlock, bitmaps = 4;
    const int64_t batch = one_or(c_.batch), heads = one_or(c_.heads());
    std::vector<int32_t> offsets, entries;
    for (int64_t table = 0; table < batch * heads; ++table) {
      for (int64_t row = 0; row <= rows; ++row) {
        offsets.push_back(static_cast<int32_t>(entries.size() / 2));
        for (int64_t column = 0; row < rows && column < columns; ++column) {
          if (random_.one_in(3)) continue;
          const bool full = c_.blocks == Blocks::full || (c_.blocks == Blocks::mixed && random_.one_in(2));
          entries.push_back(static_cast<int32_t>(column));
          entries.push_back(static_cast<int32_t>(full ? -1 : random_.below(bitmaps)));
        }
      }
    }
    auto list = [&](const std::vector<int32_t>& from) {
      return integers(static_cast<int64_t>(from.size()), [&](int64_t i) { return from[static_cast<size_t>(i)]; });
    };
    problem.block_offsets = list(offsets), problem.block_index = list(entries);
    problem.block_head = heads == 1 ? 0 : rows + 1, problem.block_batch = batch == 1 ? 0 : heads * (rows + 1);
    const int64_t row_bytes = kBlock / 8;
    masks_.push_back(std::make_unique<Memory>(bitmaps * kBlock * row_bytes, 1, guard_before_));
    char* bits = static_cast<char*>(masks_.back()->data());
    for (int64_t i = 0; i < bitmaps * kBlock * row_bytes; ++i) {
      // The first bitmap hides whole panels, the second whole rows.
      const bool hidden = i / row_bytes < kBlock ? i % row_bytes < 9 : i / row_bytes < kBlock + kBlock / 2;
      bits[i] = static_cast<char>(hidden ? 0 : random_.one_in(2) ? -1 : random_.below(256));
    }
    problem.block_bits = reinterpret_cast<const uint8_t*>(bits);
  }

  void add_biases() {
    if (c_.dense) {
      const int64_t batch = random_.one_in(2) ? c_.batch : 1, heads = random_.one_in(2) ? c_.heads() : 1;
      const int64_t rows = random_.one_in(3) ? 1 : c_.q_len;
      const View view = layout(batch, heads, rows, c_.k_len), packed = View::make(batch, heads, rows, c_.k_len, 0, 0);
      problem.dense_dtype = c_.dense_dtype;
      Memory& dense = filled(view, problem.dense_dtype, [&] { return number(); });
      problem.dense = broadcast(strided<const void*>(view, dense), view);
      if (!random_.one_in(3)) {
        Memory& sum = result("grad_dense", packed, c_.accumulator());
        problem.grad_dense = broadcast(strided<void*>(packed, sum), view);
        results_.back().zeroed = true;
      }
    }
    if (c_.diag) {
      const int64_t strip = std::max<int64_t>(0, c_.q_len + c_.k_len - 1);
      problem.diag_heads = random_.one_in(2) ? c_.heads() : 1;
      problem.diag_rows = c_.diag_index ? 5 : strip;
      if (c_.diag_index) {
        problem.diag_index = integers(strip, [&](int64_t i) { return static_cast<int32_t>(i * 5 / strip); });
      }
      problem.diag = numbers(problem.diag_heads * problem.diag_rows, c_.accumulator());
      if (!random_.one_in(3)) problem.grad_diag = flat("grad_diag", problem.diag_heads * problem.diag_rows);
    }
  }

  void add_relative() {
    if (!c_.rel_q && !c_.rel_k) return;
    const int64_t length = std::max<int64_t>(0, c_.q_len + c_.k_len - 1), reach = 1 + random_.below(40);
    int32_t risen = 0;
    auto row = [&](int64_t u) -> int64_t {
      switch (c_.rel_index) {
        case Index::identity:
          return u;
        case Index::clipped:
          return std::min(std::max<int64_t>(u - length / 2 + reach, 0), 2 * reach);
        case Index::constant:
          return 1;
        case Index::rising:
          return risen += u > 0 && random_.one_in(3);
        case Index::jumping:
          return random_.below(7);
      }
      return 0;
    };
    problem.rel_rows = c_.rel_index == Index::clipped ? 2 * reach + 1 : std::max<int64_t>(length, 7);
    problem.rel_index = integers(length, [&](int64_t u) { return static_cast<int32_t>(row(u)); });
    auto rows = [&](const char* name, Input& to, int64_t& batch, int64_t& heads) {
      batch = one_or(c_.batch), heads = one_or(c_.heads());
      const View view = layout(batch, heads, problem.rel_rows, c_.head_dim);
      to = broadcast(strided<const void*>(view, filled(view, c_.dtype, [&] { return number(); })), view);
      return flat_sum(name, batch * heads * problem.rel_rows * c_.head_dim);
    };
    if (c_.rel_k) problem.grad_rel_k = rows("grad_rel_k", problem.rel_k, problem.rel_k_batch, problem.rel_k_heads);
    if (!c_.rel_q) return;
    problem.grad_rel_q = rows("grad_rel_q", problem.rel_q, problem.rel_q_batch, problem.rel_q_heads);
    problem.rel_query = c_.own_rel_query ? input(c_.heads(), c_.q_len, c_.head_dim) : problem.query;
    problem.grad_rel_query = output("grad_rel_query", c_.heads(), c_.q_len, c_.head_dim);
  }

  void add_segments() {
    if (!c_.segment) return;
    const int64_t count = c_.batch * c_.heads() * c_.q_len * 2;
    problem.segment = numbers(count, c_.accumulator());
    auto ids = [&](int64_t length, int64_t& batch_stride) {
      const int64_t batch = one_or(c_.batch);
      batch_stride = batch == 1 ? 0 : length;
      return integers(batch * length, [&](int64_t) { return static_cast<int32_t>(random_.below(3)); });
    };
    problem.segment_q = ids(c_.q_len, problem.segment_q_batch);
    problem.segment_k = ids(c_.k_len, problem.segment_k_batch);
    problem.grad_segment = flat_sum("grad_segment", count);
  }

  void add_sequences() {
    problem.sequences = c_.sequences;
    if (!c_.sequences) return;
    auto cuts = [&](int64_t length) {
      std::vector<int32_t> at{0, static_cast<int32_t>(length)};
      while (static_cast<int64_t>(at.size()) <= c_.sequences)
        at.push_back(static_cast<int32_t>(random_.below(length + 1)));
      std::sort(at.begin(), at.end());
      return integers(c_.sequences + 1, [&](int64_t i) { return at[static_cast<size_t>(i)]; });
    };
    problem.cu_seqlens_q = cuts(c_.q_len);
    problem.cu_seqlens_k = cuts(c_.k_len);
  }

  void add_rotation() {
    const int64_t half = random_.below(c_.head_dim / 2 + 1), rows = std::max(c_.q_len, c_.k_len) + random_.below(3);
    const DType dtype = random_.one_in(2) ? c_.accumulator() : static_cast<DType>(random_.below(4));
    auto rotation = [&](const Input& x, int64_t heads, int64_t length) {
      RotaryProblem p;
      p.dtype = c_.dtype, p.table_dtype = dtype, p.interleaved = c_.interleaved;
      p.batch = c_.batch, p.heads = heads, p.length = length, p.head_dim = c_.head_dim, p.half = half, p.x = x;
      p.cos = {numbers(rows * half, dtype), 0, 0, half}, p.sin = {numbers(rows * half, dtype), 0, 0, half};
      if (random_.one_in(2)) {
        const int64_t batch = one_or(c_.batch);
        positions_.emplace_back();
        for (int64_t i = 0; i < batch * length; ++i) positions_.back().push_back(random_.below(rows));
        p.positions = positions_.back().data(), p.positions_batch = batch == 1 ? 0 : length;
      }
      return p;
    };
    rotate_query_ = rotation(problem.query, c_.heads(), c_.q_len);
    rotate_key_ = rotation(problem.key, c_.kv_heads, c_.k_len);
  }

  Case c_;
  RotaryProblem rotate_query_, rotate_key_;
  std::deque<std::vector<int64_t>> positions_;
  std::vector<std::unique_ptr<Memory>> masks_;
};

}  // namespace

void attention_case(Random& random) {
  const Case c = make_case(random);
  context().text += describe(c);
  check<Instance>(c);
}

}  // namespace pyext
