// cpu::append_kv: writes new rows into a KV cache and what is kept beside it.
//
// An item is one KV head of one sequence, so that no two write the same rows: first its rows of K
// and V, then the rows of its proxies, then the bounds of the pages it touched, read back from the
// cache.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <string>

#include "attnsieve/capability.h"
#include "attnsieve/launch.h"
#include "attnsieve/status.h"
#include "attnsieve/visibility.h"
#include "cpu/codes.h"
#include "kernels.h"

namespace attnsieve::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::align_val_t kAlignment{64};

// The buffers of one thread.
struct Scratch {
  explicit Scratch(const AppendKvProblem& problem) {
    const int64_t dim = problem.head_dim;
    const int64_t proxy_dim = problem.proxy_dim;
    const int64_t floats =
        2 * dim * kColumns + dim * proxy_dim + 2 * proxy_dim * kColumns + 3 * dim + kColumns;
    memory = ::operator new(floats * sizeof(float), kAlignment, std::nothrow);
    if (memory == nullptr) return;
    rows = static_cast<float*>(memory);
    std::fill_n(rows, floats, 0.0f);
    rows_t = rows + dim * kColumns;
    projection = rows_t + dim * kColumns;
    out_t = projection + dim * proxy_dim;
    out = out_t + proxy_dim * kColumns;
    line = out + proxy_dim * kColumns;
    min = line + dim;
    max = min + dim;
    ones = max + dim;
    std::fill_n(ones, kColumns, 1.0f);
  }
  ~Scratch() { ::operator delete(memory, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* memory = nullptr;
  float *rows, *rows_t, *projection, *out_t, *out;  // of a product of up to kColumns rows
  float *line, *min, *max, *ones;
};

// The rows [begin, end) of k and v that a sequence owns, and where the first of them goes.
struct NewRows {
  NewRows(const AppendKvProblem& problem, int64_t batch) {
    const int64_t length = problem.pages.seq_lens[batch];
    int64_t count = problem.seqlen_q;
    if (problem.cu_seqlens != nullptr) {
      source = problem.cu_seqlens[batch];
      count = problem.cu_seqlens[batch + 1] - source;
    }
    end = min64(length, problem.seqlen_k);
    begin = max64(0, length - count);
    source += begin - (length - count);
  }

  int64_t source = 0;  // the row of k and v that goes to position `begin`
  int64_t begin = 0;
  int64_t end = 0;  // positions that the cache has; begin >= end: none
};

class HeadAppend {
 public:
  HeadAppend(const AppendKvProblem& problem, const Kernels& kernels, int64_t batch, int64_t head,
             Scratch& scratch)
      : problem_(problem),
        kernels_(kernels),
        scratch_(scratch),
        batch_(batch),
        head_(head),
        rows_(problem, batch) {}

  void run() {
    for (int64_t j = rows_.begin; j < rows_.end; ++j) {
      store(problem_.k, problem_.k_scale, problem_.k_cache, j);
      store(problem_.v, problem_.v_scale, problem_.v_cache, j);
    }
    if (problem_.proxy.data != nullptr) {
      const int64_t group = problem_.num_proxy_heads / problem_.num_kv_heads;
      for (int64_t i = 0; i < group; ++i) project(head_ * group + i);
    }
    if (problem_.bounds.data == nullptr || rows_.begin >= rows_.end) return;
    const int64_t page = problem_.bounds_page_size;
    for (int64_t p = rows_.begin / page; p <= (rows_.end - 1) / page; ++p) update_bounds(p);
  }

 private:
  // The page that holds position j; -1 where there is none. Contiguous: the sequence.
  int64_t place_of(int64_t j) const {
    const PagedKv& pages = problem_.pages;
    if (pages.block_table == nullptr) return batch_;
    const int64_t page = pages.block_table[batch_ * pages.table_stride_batch + j / pages.page_size];
    return page >= 0 && page < pages.num_pages ? page : -1;
  }

  int64_t row_of(int64_t j) const {
    return problem_.pages.block_table == nullptr ? j : j % problem_.pages.page_size;
  }

  char* cached(const HeadTensor& cache, int64_t place, int64_t head, int64_t j,
               int64_t size) const {
    const int64_t offset =
        place * cache.stride_batch + head * cache.stride_head + row_of(j) * cache.stride_row;
    return static_cast<char*>(cache.data) + offset * size;
  }

  const char* new_row(const HeadTensor& rows, int64_t j) const {
    const int64_t row = rows_.source + j - rows_.begin;
    const int64_t offset =
        batch_ * rows.stride_batch + head_ * rows.stride_head + row * rows.stride_row;
    return static_cast<const char*>(rows.data) + offset * element_size(problem_.dtype);
  }

  void store(const HeadTensor& rows, const float* scale, const HeadTensor& cache, int64_t j) {
    const int64_t place = place_of(j);
    if (place < 0) return;
    const int64_t size = element_size(problem_.dtype, problem_.code);
    char* const to = cached(cache, place, head_, j, size);
    if (problem_.code == Code::kNone) {
      std::memcpy(to, new_row(rows, j), problem_.head_dim * size);
      return;
    }
    kernels_.widen(new_row(rows, j), problem_.dtype, 0, 1, problem_.head_dim, scratch_.line);
    for (int64_t d = 0; d < problem_.head_dim; ++d)
      reinterpret_cast<uint8_t*>(to)[d] = narrow_e4m3(scratch_.line[d] / scale[head_]);
  }

  // Rows of one proxy head: projection^T . new rows, up to kColumns at a time.
  void project(int64_t proxy_head) {
    const HeadTensor& matrix = problem_.projection;
    const int64_t first = proxy_head * matrix.stride_head;
    kernels_.widen(
        static_cast<const char*>(matrix.data) + first * element_size(problem_.projection_dtype),
        problem_.projection_dtype, matrix.stride_row, problem_.head_dim, problem_.proxy_dim,
        scratch_.projection);
    for (int64_t j = rows_.begin; j < rows_.end; j += kColumns)
      project_rows(proxy_head, j, static_cast<int>(min64(kColumns, rows_.end - j)));
  }

  void project_rows(int64_t proxy_head, int64_t first, int count) {
    const int dim = static_cast<int>(problem_.head_dim);
    const int proxy_dim = static_cast<int>(problem_.proxy_dim);
    const int columns = (count + kernels_.lanes - 1) / kernels_.lanes * kernels_.lanes;
    for (int i = 0; i < count; ++i) {
      kernels_.widen(new_row(problem_.k, first + i), problem_.dtype, 0, 1, dim,
                     scratch_.rows + i * dim);
    }
    kernels_.pack_query(scratch_.rows, DType::kFloat32, dim, count, dim, columns, scratch_.rows_t);
    std::fill_n(scratch_.out_t, static_cast<int64_t>(proxy_dim) * kColumns, 0.0f);
    kernels_.accumulate(scratch_.rows_t, scratch_.projection, proxy_dim, dim, proxy_dim,
                        scratch_.ones, columns, scratch_.out_t);
    kernels_.store_out(scratch_.out_t, scratch_.ones, count, proxy_dim, DType::kFloat32, proxy_dim,
                       scratch_.out);
    for (int i = 0; i < count; ++i) {
      const int64_t place = place_of(first + i);
      if (place < 0) continue;
      kernels_.narrow(
          scratch_.out + i * proxy_dim, problem_.proxy_dtype, proxy_dim,
          cached(problem_.proxy, place, proxy_head, first + i, element_size(problem_.proxy_dtype)));
    }
  }

  // Minimum and maximum of the page's keys as the cache holds them; NaN wins.
  void update_bounds(int64_t page) {
    const int64_t first = page * problem_.bounds_page_size;
    const int64_t place = place_of(first);
    if (place < 0) return;
    const int64_t dim = problem_.head_dim;
    float* const min = scratch_.min;
    float* const max = scratch_.max;
    std::fill_n(min, dim, kInfinity);
    std::fill_n(max, dim, -kInfinity);
    for (int64_t j = first; j < min64(first + problem_.bounds_page_size, rows_.end); ++j) {
      widen_elements(
          kernels_,
          cached(problem_.k_cache, place, head_, j, element_size(problem_.dtype, problem_.code)),
          problem_.dtype, problem_.code, dim, scratch_.line);
      for (int64_t d = 0; d < dim; ++d) {
        const float x = scratch_.line[d];
        min[d] = min[d] < x || std::isnan(min[d]) ? min[d] : x;
        max[d] = max[d] > x || std::isnan(max[d]) ? max[d] : x;
      }
    }
    const HeadTensor& bounds = problem_.bounds;
    const bool paged = problem_.pages.block_table != nullptr;
    const int64_t offset = place * bounds.stride_batch + head_ * bounds.stride_head +
                           (paged ? 0 : page * bounds.stride_row);
    const int64_t size = element_size(problem_.bounds_dtype);
    char* const to = static_cast<char*>(bounds.data) + offset * size;
    kernels_.narrow(min, problem_.bounds_dtype, dim, to);
    kernels_.narrow(max, problem_.bounds_dtype, dim, to + problem_.bounds_stride_bound * size);
  }

  const AppendKvProblem& problem_;
  const Kernels& kernels_;
  Scratch& scratch_;
  int64_t batch_;
  int64_t head_;
  NewRows rows_;
};

void check(const AppendKvProblem& problem) {
  require_supported("append_kv", Backend::kCpu, problem.dtype, problem.head_dim);
  if (problem.batch > 0 && problem.pages.seq_lens == nullptr)
    throw InvalidArgument("append_kv: lengths after the append are needed");
  if (problem.code == Code::kInt8 || (problem.code == Code::kFloat8E4m3 &&
                                      (problem.k_scale == nullptr || problem.v_scale == nullptr)))
    throw InvalidArgument("append_kv: codes are float8_e4m3, with scales of k and v");
  if (problem.proxy.data != nullptr)
    require_supported("append_kv", Backend::kCpu, problem.proxy_dtype, problem.proxy_dim);
  if (problem.proxy.data != nullptr && problem.num_proxy_heads % problem.num_kv_heads != 0)
    throw InvalidArgument("append_kv: the proxy heads must be a multiple of the KV heads");
  const PagedKv& pages = problem.pages;
  if (problem.bounds.data != nullptr &&
      (problem.bounds_page_size <= 0 ||
       (pages.block_table != nullptr && problem.bounds_page_size != pages.page_size)))
    throw InvalidArgument("append_kv: bounds_page_size must be that of the cache");
  if (problem.cu_seqlens == nullptr) return;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t begin = problem.cu_seqlens[b];
    const int64_t end = problem.cu_seqlens[b + 1];
    if (begin < 0 || end < begin || end > problem.seqlen_q)
      throw InvalidArgument(
          "append_kv: cu_seqlens must be ascending and end within the tokens; "
          "entry " +
          std::to_string(b) + " is not");
  }
}

}  // namespace

void append_kv(const AppendKvProblem& problem, const ParallelFor& parallel_for) {
  check(problem);
  const Kernels& widest = kernels();
  std::atomic<bool> out_of_memory{false};
  parallel_for(problem.batch * problem.num_kv_heads, [&](int64_t begin, int64_t end) {
    Scratch scratch(problem);  // the only allocation
    if (scratch.memory == nullptr) {
      out_of_memory = true;
      return;
    }
    for (int64_t flat = begin; flat < end; ++flat) {
      HeadAppend(problem, widest, flat / problem.num_kv_heads, flat % problem.num_kv_heads, scratch)
          .run();
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace attnsieve::cpu
