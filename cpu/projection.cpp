#include "cpu/projection.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "kernels.h"

namespace attnsieve::cpu {
namespace {

// The query rows of one sequence and head; one thread sums a number, always in the same order.
class HeadProjection {
 public:
  explicit HeadProjection(const ProxyScoresProblem& problem)
      : p_(problem),
        matrix_(p_.query_dim * p_.head_dim),
        query_(p_.query_dim),
        sums_(p_.head_dim) {}

  void run(int64_t batch, int64_t head, char* to) {
    const HeadTensor& projection = p_.projection;
    const int64_t own = head / (p_.num_heads / p_.num_projections);
    kernels().widen(at(projection, batch * projection.stride_batch + own * projection.stride_head),
                    p_.dtype, projection.stride_row, p_.query_dim, p_.head_dim, matrix_.data());
    for (int64_t row = 0; row < p_.num_rows; ++row) {
      const int64_t from =
          batch * p_.q.stride_batch + head * p_.q.stride_head + row * p_.q.stride_row;
      kernels().widen(at(p_.q, from), p_.dtype, 0, 1, p_.query_dim, query_.data());
      std::fill(sums_.begin(), sums_.end(), 0.0f);
      for (int64_t d = 0; d < p_.query_dim; ++d) {
        const float* const line = matrix_.data() + d * p_.head_dim;
        for (int64_t c = 0; c < p_.head_dim; ++c) sums_[c] += query_[d] * line[c];
      }
      kernels().narrow(sums_.data(), p_.dtype, p_.head_dim,
                       to + row * p_.head_dim * element_size(p_.dtype));
    }
  }

 private:
  const char* at(const HeadTensor& tensor, int64_t element) const {
    return static_cast<const char*>(tensor.data) + element * element_size(p_.dtype);
  }

  const ProxyScoresProblem& p_;
  std::vector<float> matrix_, query_, sums_;
};

}  // namespace

ProxyScoresProblem project_queries(const ProxyScoresProblem& problem,
                                   const ParallelFor& parallel_for, std::vector<char>* rows) {
  const int64_t head_rows = problem.num_rows * problem.head_dim;
  const int64_t head_bytes = head_rows * element_size(problem.dtype);
  rows->resize(problem.batch * problem.num_heads * head_bytes);
  std::atomic<bool> out_of_memory{false};
  parallel_for(problem.batch * problem.num_heads, [&](int64_t begin, int64_t end) {
    try {
      HeadProjection projection(problem);
      for (int64_t flat = begin; flat < end; ++flat) {
        projection.run(flat / problem.num_heads, flat % problem.num_heads,
                       rows->data() + flat * head_bytes);
      }
    } catch (const std::bad_alloc&) {  // must not leave a thread
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
  ProxyScoresProblem projected = problem;
  projected.q = {rows->data(), problem.num_heads * head_rows, head_rows, problem.head_dim};
  projected.projection.data = nullptr;
  return projected;
}

}  // namespace attnsieve::cpu
