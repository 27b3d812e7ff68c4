// cpu::merge_states: against doubles, and the edge cases of empty states.
#include <cmath>
#include <random>
#include <vector>

#include "attend_case.h"
#include "check.h"
#include "threads.h"

using namespace attnsieve;
using namespace attnsieve::test;

namespace {

struct Merge {
  Merge(int64_t states, int64_t rows, int64_t head_dim, DType dtype)
      : outs(states * rows * head_dim),
        lses(states * rows),
        out(rows * head_dim, -9.0f),
        lse(rows, -9.0f) {
    problem.num_states = states;
    problem.rows = rows;
    problem.head_dim = head_dim;
    problem.dtype = dtype;
  }

  void run() {
    const int64_t size = cpu::element_size(problem.dtype);
    std::vector<uint8_t> in(outs.size() * size), result(out.size() * size);
    const cpu::Kernels& kernels = *cpu::baseline_kernels();
    if (!outs.empty()) {
      kernels.narrow(outs.data(), problem.dtype, outs.size(), in.data());
      kernels.widen(in.data(), problem.dtype, 0, 1, outs.size(), outs.data());
    }
    problem.outs = in.data();
    problem.lses = lses.data();
    problem.out = result.data();
    problem.lse = lse.data();
    cpu::merge_states(problem, threaded<2>());
    kernels.widen(result.data(), problem.dtype, 0, 1, out.size(), out.data());
  }

  std::vector<float> outs, lses, out, lse;
  MergeProblem problem;
};

void against_doubles() {
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (int64_t head_dim : {1, 7, 64, 300}) {
      Merge m(4, 9, head_dim, dtype);
      for (float& x : m.outs) x = normal(rng);
      for (float& x : m.lses) x = normal(rng) * 5.0f;
      m.lses[3] = -INFINITY;
      for (int64_t d = 0; d < head_dim; ++d) m.outs[3 * head_dim + d] = NAN;
      m.run();
      check::context = std::string("merge ") + dtype_name(dtype) + " D" + std::to_string(head_dim);
      bool ok = true;
      for (int64_t row = 0; row < 9; ++row) {
        double sum = 0.0;
        for (int n = 0; n < 4; ++n) sum += std::exp(static_cast<double>(m.lses[n * 9 + row]));
        ok = ok && std::abs(m.lse[row] - std::log(sum)) < 2e-6;
        for (int64_t d = 0; d < head_dim; ++d) {
          double want = 0.0;
          for (int n = 0; n < 4; ++n) {
            const double weight = std::exp(static_cast<double>(m.lses[n * 9 + row])) / sum;
            if (weight > 0) want += weight * m.outs[(n * 9 + row) * head_dim + d];
          }
          const double rounding = dtype == DType::kFloat32   ? 1e-6
                                  : dtype == DType::kFloat16 ? 5e-4
                                                             : 4e-3;
          ok = ok && std::abs(m.out[row * head_dim + d] - want) <= rounding * std::abs(want) + 1e-6;
        }
      }
      CHECK(ok);
    }
  }
}

void edges() {
  check::context = "merge of nothing";
  Merge none(0, 3, 8, DType::kFloat32);
  none.run();
  CHECK(none.out[0] == 0.0f && none.out[23] == 0.0f && none.lse[2] == -INFINITY);

  check::context = "all states empty";
  Merge empty(2, 1, 8, DType::kFloat16);
  for (float& x : empty.outs) x = NAN;
  for (float& x : empty.lses) x = -INFINITY;
  empty.run();
  CHECK(empty.out[5] == 0.0f && empty.lse[0] == -INFINITY);

  check::context = "one state is returned as it is";
  Merge one(1, 1, 8, DType::kFloat32);
  for (int d = 0; d < 8; ++d) one.outs[d] = 0.1f * static_cast<float>(d);
  one.lses[0] = 1e30f;
  one.run();
  CHECK(one.out == one.outs && one.lse[0] == 1e30f);

  check::context = "NaN and +inf";
  Merge broken(2, 2, 8, DType::kFloat32);
  broken.lses = {NAN, INFINITY, 0.0f, 0.0f};
  broken.run();
  CHECK(std::isnan(broken.lse[0]) && std::isnan(broken.out[0]));
  CHECK(broken.lse[1] == INFINITY && std::isnan(broken.out[8]));
}

// Two halves of the keys, merged, are the whole.
void halves_of_attention() {
  AttendCase c;
  c.seqlen_q = 70;
  c.seqlen_k = 256;
  AttendData whole(c);
  whole.run(cpu::kernels(), serial());
  Merge m(2, c.seqlen_q, c.head_dim, DType::kFloat32);
  for (int half = 0; half < 2; ++half) {
    AttendData part(c);
    part.problem.seqlen_k = 128;
    for (HeadTensor* t : {&part.problem.k, &part.problem.v}) {
      t->data = static_cast<float*>(t->data) + half * 128 * t->stride_row;
    }
    part.run(cpu::kernels(), serial());
    std::copy(part.out.values.begin(), part.out.values.end(),
              m.outs.begin() + half * c.seqlen_q * c.head_dim);
    std::copy(part.lse.begin(), part.lse.end(), m.lses.begin() + half * c.seqlen_q);
  }
  m.run();
  check::context = "merge of two halves";
  bool ok = true;
  for (size_t i = 0; i < m.out.size(); ++i)
    ok = ok && std::abs(m.out[i] - whole.out.values[i]) < 2e-6;
  for (size_t i = 0; i < m.lse.size(); ++i) ok = ok && std::abs(m.lse[i] - whole.lse[i]) < 2e-6;
  CHECK(ok);
}

}  // namespace

int main() {
  against_doubles();
  edges();
  halves_of_attention();
  return check::finish();
}
