#include "attend_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace attnsieve::test {
namespace {

// Rows that the storage holds beyond the tensor's own, per head and at the end: NaN that no kernel
// may touch.
constexpr int64_t kPadding = 8;

void make_tensor(TensorData& t, const AttendCase& c, int64_t batch, int64_t heads, int64_t rows) {
  t.heads = heads;
  t.rows = rows;
  t.head_dim = c.head_dim;
  t.values.assign(batch * heads * rows * c.head_dim, 0.0f);
  if (c.strided) {
    t.view.stride_head = c.head_dim + kPadding;
    t.view.stride_row = heads * t.view.stride_head + kPadding;
    t.view.stride_batch = (rows + 1) * t.view.stride_row;
  } else {
    t.view.stride_row = c.head_dim;
    t.view.stride_head = rows * c.head_dim;
    t.view.stride_batch = heads * rows * c.head_dim;
  }
  // Exactly as many bytes as the last element needs, so that a sanitizer sees any access beyond it.
  const int64_t elements = batch * heads * rows == 0
                               ? 0
                               : (batch - 1) * t.view.stride_batch +
                                     (heads - 1) * t.view.stride_head +
                                     (rows - 1) * t.view.stride_row + c.head_dim;
  t.storage.assign(elements * cpu::element_size(c.dtype), 0xff);  // NaN in all three types
  t.view.data = t.storage.data();
}

template <class Visit>
void each_row(const TensorData& t, int64_t batch, Visit visit) {
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < t.heads; ++h) {
      for (int64_t row = 0; row < t.rows; ++row) {
        visit(((b * t.heads + h) * t.rows + row) * t.head_dim,
              b * t.view.stride_batch + h * t.view.stride_head + row * t.view.stride_row);
      }
    }
  }
}

std::vector<int32_t> prefix_sums(const std::vector<int32_t>& lengths) {
  std::vector<int32_t> sums{0};
  for (int32_t length : lengths) sums.push_back(sums.back() + length);
  return sums;
}

// A pool with a spare page; tables deal its pages out at random and end in garbage.
void make_pages(AttendData& data, std::mt19937& rng) {
  const AttendCase& c = data.spec;
  PagedKv& paged = data.problem.paged;
  paged.page_size = c.page_size;
  paged.max_pages = static_cast<int32_t>(c.seqlen_k / c.page_size);
  paged.num_pages = c.batch * paged.max_pages + 1;
  paged.table_stride_batch = paged.max_pages;
  std::vector<int32_t> deck(paged.num_pages);
  for (size_t i = 0; i < deck.size(); ++i) deck[i] = static_cast<int32_t>(i);
  std::shuffle(deck.begin(), deck.end(), rng);
  data.block_table.assign(deck.begin(), deck.end() - 1);
  for (int64_t b = 0; b < c.batch; ++b) {
    // The first one fills its last page in part; one of the others may claim more than there is.
    data.seq_lens.push_back(b == 0 ? static_cast<int32_t>(c.seqlen_k - c.page_size + 1 + rng() % 16)
                                   : static_cast<int32_t>(rng() % (c.seqlen_k + 40)));
    for (int64_t slot = 0; slot < paged.max_pages; ++slot) {
      int32_t& entry = data.block_table[b * paged.max_pages + slot];
      const bool behind = slot * c.page_size >= data.seq_lens[b];
      if (behind || (c.bad_pages && rng() % 4 == 0)) {
        const int32_t bad[] = {-1, static_cast<int32_t>(paged.num_pages),
                               std::numeric_limits<int32_t>::max(),
                               std::numeric_limits<int32_t>::min()};
        entry = bad[rng() % 4];
      }
    }
  }
  paged.block_table = data.block_table.data();
  paged.seq_lens = data.seq_lens.data();
}

// Copies the logical rows that exist into their pages; everything else there stays NaN.
void fill_pages(const AttendData& data, const TensorData& t, std::vector<uint8_t>& pages,
                HeadTensor& view) {
  const PagedKv& paged = data.problem.paged;
  view.stride_head = t.head_dim;
  view.stride_row = t.heads * t.head_dim;
  view.stride_batch = paged.page_size * view.stride_row;
  const int64_t size = cpu::element_size(data.spec.dtype);
  pages.assign(paged.num_pages * view.stride_batch * size, 0xff);
  view.data = pages.data();
  for (int64_t b = 0; b < data.spec.batch; ++b) {
    for (int64_t key = 0; key < std::min<int64_t>(data.seq_lens[b], t.rows); ++key) {
      if (!data.key_exists(b, key)) continue;
      const int64_t page = data.block_table[b * paged.max_pages + key / paged.page_size];
      for (int64_t h = 0; h < t.heads; ++h) {
        const int64_t from =
            b * t.view.stride_batch + h * t.view.stride_head + key * t.view.stride_row;
        const int64_t to = page * view.stride_batch + h * view.stride_head +
                           key % paged.page_size * view.stride_row;
        std::memcpy(pages.data() + to * size, t.storage.data() + from * size, t.head_dim * size);
      }
    }
  }
}

void make_lists(AttendData& data, std::mt19937& rng) {
  const AttendCase& c = data.spec;
  const int64_t longest_q =
      c.lengths_q.empty() ? c.seqlen_q : *std::max_element(c.lengths_q.begin(), c.lengths_q.end());
  const int64_t longest_k =
      c.lengths_k.empty() ? c.seqlen_k : *std::max_element(c.lengths_k.begin(), c.lengths_k.end());
  const int64_t rows = (longest_q + c.block_q - 1) / c.block_q;
  const int64_t blocks = (longest_k + c.block_k - 1) / c.block_k;
  const int64_t capacity = blocks + 3;
  data.counts.assign(c.batch * c.list_heads * rows, 0);
  data.columns.assign(data.counts.size() * capacity, 1 << 30);
  std::uniform_real_distribution<double> uniform;
  for (size_t r = 0; r < data.counts.size(); ++r) {
    int32_t* line = data.columns.data() + r * capacity;
    int32_t n = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      if (uniform(rng) < c.density) line[n++] = static_cast<int32_t>(block);
    }
    if (c.malformed_lists) {
      const int32_t bad[] = {-1, std::numeric_limits<int32_t>::min(),
                             std::numeric_limits<int32_t>::max(), line[0]};
      if (n > 0) line[n++] = bad[r % 4];  // the last one is a duplicate
      std::shuffle(line, line + n, rng);
    }
    data.counts[r] = c.malformed_lists && r % 3 == 0
                         ? 1 << 20
                         : n;  // beyond capacity: the tail's ids are invalid
    if (c.malformed_lists && r % 7 == 6) data.counts[r] = -5;
  }
  BlockIndexView& index = data.problem.index;
  index.counts = data.counts.data();
  index.columns = data.columns.data();
  index.counts_stride_head = rows;
  index.counts_stride_batch = c.list_heads * rows;
  index.columns_stride_row = capacity;
  index.columns_stride_head = rows * capacity;
  index.columns_stride_batch = c.list_heads * rows * capacity;
  index.num_rows = static_cast<int32_t>(rows);
  index.capacity = static_cast<int32_t>(capacity);
  index.heads_per_list = static_cast<int32_t>(c.num_heads / c.list_heads);
  index.block_q = c.block_q;
  index.block_k = c.block_k;
}

}  // namespace

std::string AttendCase::describe() const {
  std::string text = "B" + std::to_string(batch) + " H" + std::to_string(num_heads) + "/" +
                     std::to_string(num_kv_heads) + " Sq" + std::to_string(seqlen_q) + " Sk" +
                     std::to_string(seqlen_k) + " D" + std::to_string(head_dim) + " " +
                     dtype_name(dtype);
  if (mask.causal) text += " causal";
  text +=
      " window(" + std::to_string(mask.window_left) + "," + std::to_string(mask.window_right) + ")";
  if (indexed) text += " list " + std::to_string(block_q) + "x" + std::to_string(block_k);
  if (malformed_lists) text += " malformed";
  if (sink) text += " sink";
  if (threshold) text += " threshold " + std::to_string(*threshold);
  text += " skip" + std::to_string(skip_block);
  if (!lengths_q.empty()) text += " varlen";
  if (page_size > 0) text += " page" + std::to_string(page_size);
  if (bad_pages) text += " bad pages";
  if (strided) text += " strided";
  return text + " seed " + std::to_string(seed);
}

AttendData::AttendData(const AttendCase& c) : spec(c) {
  const bool varlen = !c.lengths_q.empty();
  if (varlen) {
    cu_q = prefix_sums(c.lengths_q);
    cu_k = prefix_sums(c.lengths_k);
    spec.batch = static_cast<int64_t>(c.lengths_q.size());
    spec.seqlen_q = cu_q.back();
    spec.seqlen_k = cu_k.back();
  }
  if (spec.page_size > 0) {
    spec.seqlen_k = (spec.seqlen_k + spec.page_size - 1) / spec.page_size * spec.page_size;
  }
  const int64_t tensors = varlen ? 1 : spec.batch;
  make_tensor(q, spec, tensors, spec.num_heads, spec.seqlen_q);
  make_tensor(k, spec, tensors, spec.num_kv_heads, spec.seqlen_k);
  make_tensor(v, spec, tensors, spec.num_kv_heads, spec.seqlen_k);
  make_tensor(out, spec, tensors, spec.num_heads, spec.seqlen_q);
  lse.assign(tensors * spec.num_heads * spec.seqlen_q, -12345.0f);
  counters.assign(spec.batch * spec.num_heads * 2, -1);

  std::mt19937 rng(c.seed);
  std::normal_distribution<float> normal;
  for (float& x : q.values) x = normal(rng) * c.logit_scale;
  for (float& x : k.values) x = normal(rng);
  for (float& x : v.values) x = normal(rng);
  for (int64_t h = 0; h < spec.num_heads; ++h) sink.push_back(normal(rng) * 2.0f);
  upload(q);
  upload(k);
  upload(v);

  problem.q = q.view;
  problem.k = k.view;
  problem.v = v.view;
  problem.out = out.view;
  problem.lse = {lse.data(), spec.num_heads * spec.seqlen_q, spec.seqlen_q, 1};
  problem.batch = spec.batch;
  problem.num_heads = spec.num_heads;
  problem.num_kv_heads = spec.num_kv_heads;
  problem.seqlen_q = spec.seqlen_q;
  problem.seqlen_k = spec.seqlen_k;
  problem.head_dim = spec.head_dim;
  problem.dtype = spec.dtype;
  problem.softmax_scale = 1.0f / std::sqrt(static_cast<float>(spec.head_dim));
  problem.mask = spec.mask;
  if (varlen) {
    problem.varlen = {cu_q.data(), cu_k.data()};
    problem.q.stride_batch = problem.k.stride_batch = problem.v.stride_batch =
        problem.out.stride_batch = 0;
    problem.lse.stride_batch = 0;
  }
  if (spec.page_size > 0) make_pages(*this, rng);
  if (spec.indexed) make_lists(*this, rng);
  if (spec.sink) problem.sink = sink.data();
  problem.threshold.skip_block = spec.skip_block;
  problem.threshold.counters = counters.data();
  if (spec.threshold) {
    problem.threshold.enabled = true;
    lambda.assign(spec.batch * spec.num_heads, *spec.threshold);
    problem.threshold.per_head = lambda.data();
    problem.threshold.stride_batch = spec.num_heads;
    problem.threshold.stride_head = 1;
  }
}

void AttendData::upload(TensorData& t) {
  const int64_t size = cpu::element_size(spec.dtype);
  each_row(t, problem.varlen.cu_seqlens_q || !cu_q.empty() ? 1 : spec.batch,
           [&](int64_t dense, int64_t strided) {
             cpu::baseline_kernels()->narrow(t.values.data() + dense, spec.dtype, t.head_dim,
                                             t.storage.data() + strided * size);
           });
  download(t);
}

void AttendData::download(TensorData& t) {
  const int64_t size = cpu::element_size(spec.dtype);
  each_row(t, !cu_q.empty() ? 1 : spec.batch, [&](int64_t dense, int64_t strided) {
    cpu::baseline_kernels()->widen(t.storage.data() + strided * size, spec.dtype, 0, 1, t.head_dim,
                                   t.values.data() + dense);
  });
}

bool AttendData::key_exists(int64_t b, int64_t key) const {
  const PagedKv& paged = problem.paged;
  if (paged.page_size == 0) return true;
  const int64_t page = block_table[b * paged.max_pages + key / paged.page_size];
  return page >= 0 && page < paged.num_pages;
}

void AttendData::run(const cpu::Kernels& kernels, const ParallelFor& parallel_for) {
  if (spec.page_size > 0) {
    fill_pages(*this, k, pages_k, problem.k);
    fill_pages(*this, v, pages_v, problem.v);
  }
  std::fill(out.storage.begin(), out.storage.end(), uint8_t{0xff});
  std::fill(lse.begin(), lse.end(), -12345.0f);
  cpu::attend(problem, parallel_for, kernels);
  download(out);
}

std::vector<const cpu::Kernels*> all_kernels() {
  std::vector<const cpu::Kernels*> sets;
  for (const cpu::Kernels* set :
       {cpu::baseline_kernels(), cpu::avx2_kernels(), cpu::avx512_kernels()}) {
    if (set) sets.push_back(set);
  }
  return sets;
}

}  // namespace attnsieve::test
