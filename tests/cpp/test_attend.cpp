// cpu::attend against a plain double loop: sizes, dtypes, masks, lists, GQA, varlen, strides, sink,
// bad arguments.
#include <cmath>
#include <cstring>

#include "attend_case.h"
#include "attnsieve/status.h"
#include "check.h"
#include "threads.h"

using namespace attnsieve;
using namespace attnsieve::test;

namespace {

constexpr int64_t kEdges[] = {1, 2, 7, 63, 64, 65, 127, 129, 255};

bool close(double got, double want, double relative, double absolute) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return std::abs(got - want) <= relative * std::abs(want) + absolute;
}

double rounding_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 4e-6;
    case DType::kFloat16: return std::ldexp(1.0, -11) * 1.01;
    case DType::kBFloat16: return std::ldexp(1.0, -8) * 1.01;
  }
  return 0.0;
}

void compare(const AttendData& data, const Expected& expected) {
  bool out_ok = true;
  bool lse_ok = true;
  for (size_t i = 0; i < expected.out.size(); ++i) {
    out_ok =
        out_ok && close(data.out.values[i], expected.out[i], rounding_of(data.spec.dtype), 4e-6);
  }
  for (size_t i = 0; i < expected.lse.size(); ++i) {
    lse_ok = lse_ok && close(data.lse[i], expected.lse[i], 1e-6, 4e-6);
  }
  CHECK(out_ok);
  CHECK(lse_ok);
}

void run_case(const AttendCase& c) {
  AttendData data(c);
  const Expected expected = expected_of(data);
  for (const cpu::Kernels* kernels : all_kernels()) {
    check::context = std::string(kernels->name) + " " + data.spec.describe();
    data.run(*kernels, serial());
    compare(data, expected);
    CHECK(data.counters == expected.counters);
    const std::vector<uint8_t> once = data.out.storage;
    const std::vector<float> lse = data.lse;
    data.run(*kernels, threaded<3>());
    CHECK(data.out.storage == once);
    CHECK(std::memcmp(data.lse.data(), lse.data(), lse.size() * sizeof(float)) == 0);
  }
}

void sizes() {
  for (int64_t sq : kEdges) {
    for (int64_t sk : kEdges) {
      AttendCase c;
      c.seqlen_q = sq;
      c.seqlen_k = sk;
      c.head_dim = 8 * (1 + (sq + sk) % 4);
      c.mask.causal = (sq + sk / 2) % 2 == 0;
      c.seed = static_cast<uint32_t>(sq * 1000 + sk);
      run_case(c);
    }
  }
}

void head_dims_and_dtypes() {
  for (int64_t head_dim = 8; head_dim <= 256; head_dim += 8) {
    for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      AttendCase c;
      c.seqlen_q = 33;
      c.seqlen_k = 70;
      c.head_dim = head_dim;
      c.dtype = dtype;
      c.strided = head_dim % 16 == 0;
      c.num_heads = 2;
      c.seed = static_cast<uint32_t>(head_dim);
      run_case(c);
    }
  }
}

void masks() {
  const Mask all[] = {{true, -1, -1},  {false, 0, 0},   {false, 5, 3},
                      {false, 70, -1}, {false, -1, 9},  {true, 40, -1},
                      {true, 64, 64},  {false, 200, 1}, {true, 0, -1}};
  for (const Mask& mask : all) {
    for (auto [sq, sk] : {std::pair<int64_t, int64_t>{129, 129},
                          {200, 65},
                          {65, 200},
                          {1, 255},
                          {255, 1},
                          {96, 320}}) {
      AttendCase c;
      c.seqlen_q = sq;
      c.seqlen_k = sk;
      c.head_dim = 16;
      c.mask = mask;
      c.sink = (sq + sk) % 2 == 0;
      c.skip_block = mask.causal ? 64 : 128;
      run_case(c);
    }
  }
}

void lists() {
  uint32_t seed = 0;
  for (int block_q : {64, 128}) {
    for (int block_k : {16, 32, 64, 128}) {
      for (double density : {0.0, 0.3, 1.0}) {
        for (bool malformed : {false, true}) {
          for (bool causal : {false, true}) {
            AttendCase c;
            c.batch = 2;
            c.num_heads = 4;
            c.num_kv_heads = 2;
            c.list_heads = ++seed % 3 == 0 ? 1 : (seed % 3 == 1 ? 2 : 4);
            c.seqlen_q = 300;
            c.seqlen_k = 411;
            c.head_dim = 24;
            c.indexed = true;
            c.block_q = block_q;
            c.block_k = block_k;
            c.density = density;
            c.malformed_lists = malformed;
            c.mask.causal = causal;
            if (seed % 5 == 0) c.mask.window_left = 100;
            c.sink = seed % 4 == 0;
            c.skip_block = seed % 2 ? 64 : 128;
            c.seed = seed;
            run_case(c);
          }
        }
      }
    }
  }
}

void varlen() {
  for (bool indexed : {false, true}) {
    for (bool causal : {false, true}) {
      AttendCase c;
      c.lengths_q = {65, 0, 1, 130, 64, 7};
      c.lengths_k = {129, 5, 0, 64, 200, 63};
      c.num_heads = 6;
      c.num_kv_heads = 3;
      c.list_heads = 3;
      c.head_dim = 40;
      c.indexed = indexed;
      c.mask.causal = causal;
      c.strided = indexed;
      c.sink = causal;
      c.dtype = indexed ? DType::kBFloat16 : DType::kFloat32;
      run_case(c);
    }
  }
}

void pages() {
  uint32_t seed = 900;
  for (int page_size : {16, 48, 64, 256}) {
    for (int block_k : {0, 16, 32, 64, 128}) {
      for (bool bad_pages : {false, true}) {
        AttendCase c;
        c.batch = 3;
        c.num_heads = 4;
        c.num_kv_heads = 2;
        c.list_heads = 2;
        c.seqlen_q = ++seed % 3 == 0 ? 150 : 70;
        c.seqlen_k = 300;
        c.head_dim = 24;
        c.dtype = static_cast<DType>(seed % 3);
        c.mask.causal = seed % 2 == 0;
        if (seed % 5 == 0) c.mask.window_left = 100;
        c.indexed = block_k > 0;
        c.block_q = seed % 4 < 2 ? 64 : 128;
        c.block_k = block_k > 0 ? block_k : 64;
        c.page_size = page_size;
        c.bad_pages = bad_pages;
        c.sink = seed % 4 == 0;
        c.seed = seed;
        run_case(c);
      }
    }
  }
}

void fewer_list_rows_than_query_blocks() {
  AttendCase c;
  c.seqlen_q = 200;
  c.indexed = true;
  c.density = 1.0;
  AttendData data(c);
  data.problem.index.num_rows = 2;
  const Expected expected = expected_of(data);
  data.run(*all_kernels().back(), serial());
  check::context = "rows beyond nQ";
  compare(data, expected);
  CHECK(data.lse[128] == -INFINITY && data.out.at(0, 0, 128, 0) == 0.0f);
  data.problem.lse.data = nullptr;  // not wanted
  data.problem.threshold.counters = nullptr;
  data.run(*all_kernels().back(), serial());
  CHECK(close(data.out.at(0, 0, 5, 5), expected.out[5 * 64 + 5], 4e-6, 4e-6));
}

template <class Error>
bool throws(AttendProblem problem) {
  try {
    cpu::attend(problem, serial(), cpu::kernels());
  } catch (const Error&) {
    return true;
  } catch (...) {
  }
  return false;
}

void refusals() {
  check::context = "refusals";
  AttendData data{AttendCase{}};
  AttendProblem problem = data.problem;
  for (int64_t head_dim : {0, 4, 12, 264, -8}) {
    problem.head_dim = head_dim;
    CHECK(throws<Unsupported>(problem));
  }
  problem = data.problem;
  problem.num_heads = 3;
  problem.num_kv_heads = 2;
  CHECK(throws<InvalidArgument>(problem));
  problem = data.problem;
  problem.threshold.skip_block = 32;
  CHECK(throws<Unsupported>(problem));
  AttendCase listed;
  listed.indexed = true;
  AttendData with_list{listed};
  for (int block_k : {0, 8, 48, 256}) {
    with_list.problem.index.block_k = block_k;
    CHECK(throws<Unsupported>(with_list.problem));
  }
  with_list.problem.index.block_k = 64;
  with_list.problem.index.block_q = 32;
  CHECK(throws<Unsupported>(with_list.problem));
  AttendCase cache;
  cache.page_size = 16;
  AttendData paged{cache};
  paged.run(cpu::kernels(), serial());  // puts the pages in place
  problem = paged.problem;
  problem.paged.page_size = 24;
  CHECK(throws<Unsupported>(problem));
  problem = paged.problem;
  problem.paged.seq_lens = nullptr;
  CHECK(throws<InvalidArgument>(problem));
  problem = paged.problem;
  problem.seqlen_k -= 1;
  CHECK(throws<InvalidArgument>(problem));
  AttendCase packed;
  packed.lengths_q = packed.lengths_k = {10, 20};
  for (int32_t bad : {-1, 31, 1 << 30}) {
    AttendData broken{packed};
    broken.cu_k[1] = bad;
    CHECK(throws<InvalidArgument>(broken.problem));
  }
  AttendProblem empty = data.problem;
  empty.batch = 0;
  cpu::attend(empty, serial(), cpu::kernels());
  empty = data.problem;
  empty.seqlen_q = 0;
  cpu::attend(empty, serial(), cpu::kernels());
  empty = data.problem;
  empty.seqlen_k = 0;
  cpu::attend(empty, serial(), cpu::kernels());
  CHECK(data.lse[3] == -INFINITY);
  data.download(data.out);
  CHECK(data.out.at(0, 0, 3, 3) == 0.0f);
}

}  // namespace

int main() {
  sizes();
  head_dims_and_dtypes();
  masks();
  lists();
  varlen();
  pages();
  fewer_list_rows_than_query_blocks();
  refusals();
  return check::finish();
}
