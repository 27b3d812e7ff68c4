// How the CUDA backend cuts proxy_scores and append_kv: every unit and every new row has a place.
#include <cstdint>
#include <string>

#include "attnsieve/capability.h"
#include "check.h"
#include "cuda/dispatch/cache_plans.h"

using namespace attnsieve;

namespace {

ProxyScoresProblem scores_of(int64_t heads, int64_t key_heads, int64_t out_heads, int64_t rows) {
  ProxyScoresProblem problem;
  problem.batch = 3;
  problem.num_heads = heads;
  problem.num_key_heads = key_heads;
  problem.num_out_heads = out_heads;
  problem.num_rows = rows;
  problem.head_dim = 128;
  problem.dtype = DType::kBFloat16;
  problem.head_reduce = Reduction::kMax;
  return problem;
}

void stream_plan(const ProxyScoresProblem& problem, int num_sms) {
  const sm80::ProxyScoresPlan plan = sm80::plan_proxy_scores(problem, num_sms);
  CHECK(plan.streamed);
  CHECK(plan.stream_dim >= problem.head_dim);
  const bool bounds = problem.element == ProxyElement::kBounds;
  const int tiles = sm80::stream_tiles(plan.stream_dim, bounds);
  CHECK(plan.step_units == 16 * tiles);
  // Two rows of a tile, both sides: 16 loads a lane.
  CHECK(2 * tiles * sm80::stream_pieces(plan.stream_dim) * (bounds ? 2 : 1) == 16);
  const int64_t block = int64_t{plan.steps} * sm80::kStreamWarps * plan.step_units;
  CHECK(plan.steps >= 1 && plan.steps <= 6 && plan.stream_blocks * block >= problem.units);
  CHECK((plan.stream_blocks - 1) * block < problem.units);
  CHECK(plan.items == problem.batch * problem.num_key_heads * plan.stream_blocks);
}

void streams() {
  for (int64_t head_dim : {8, 16, 32, 40, 64, 72, 128}) {
    for (int64_t units : {1, 15, 16, 129, 4096, 131072, 1 << 22}) {
      for (int64_t batch : {1, 3, 64}) {
        for (int num_sms : {1, 108, 132}) {
          for (ProxyElement element : {ProxyElement::kDot, ProxyElement::kBounds}) {
            ProxyScoresProblem problem = scores_of(8, 2, 2, 1);
            problem.head_dim = head_dim;
            problem.units = units;
            problem.batch = batch;
            problem.element = element;
            check::context = "dp " + std::to_string(head_dim) + ", " + std::to_string(batch) +
                             " x " + std::to_string(units) + " units on " + std::to_string(num_sms);
            stream_plan(problem, num_sms);
          }
        }
      }
    }
  }
}

// The kernel that streams keys is for nothing else.
void streamed_problems() {
  const auto streamed = [](const ProxyScoresProblem& problem) {
    return sm80::plan_proxy_scores(problem, 132).streamed;
  };
  ProxyScoresProblem plain = scores_of(8, 2, 2, 1);
  plain.units = 1000;
  check::context = "streamed problems";
  CHECK(streamed(plain));
  CHECK(streamed(scores_of(8, 2, 8, 1)) && streamed(scores_of(8, 1, 1, 1)));
  CHECK(!streamed(scores_of(8, 2, 4, 1)) && !streamed(scores_of(8, 2, 1, 1)));
  CHECK(!streamed(scores_of(16, 1, 1, 1)) && !streamed(scores_of(8, 2, 2, 2)));
  float scale = 1.0f;
  for (int feature = 0; feature < 6; ++feature) {
    ProxyScoresProblem problem = plain;
    if (feature == 0) problem.dtype = DType::kFloat32;
    if (feature == 1) problem.key_code = Code::kInt8;
    if (feature == 2) problem.key_scale.data = &scale;
    if (feature == 3) problem.softmax = true;
    if (feature == 4) problem.page_reduce = Reduction::kMax;
    if (feature == 5) problem.head_dim = 136;
    check::context = "feature " + std::to_string(feature);
    CHECK(!streamed(problem));
  }
}

void general_plan(const ProxyScoresProblem& problem) {
  const sm80::ProxyScoresPlan plan = sm80::plan_proxy_scores(problem, 132);
  const int64_t rows = problem.row_reduce == Reduction::kNone ? problem.num_rows : 1;
  CHECK(!plan.streamed && plan.out_rows == rows && plan.columns == problem.columns());
  CHECK(sm80::kScoreTileUnits % plan.lanes_per_column == 0);
  CHECK(int64_t{plan.lanes_per_column} * plan.turns >= problem.units_per_column());
  CHECK(int64_t{plan.lanes_per_column} * (plan.turns - 1) < problem.units_per_column());
  CHECK(int64_t{plan.column_blocks} * sm80::kScoreTileUnits / plan.lanes_per_column >=
        plan.columns);
  CHECK(plan.group_heads % plan.heads_per_out == 0);
  CHECK(problem.num_heads % plan.group_heads == 0 && rows % plan.group_rows == 0);
  CHECK(int64_t{plan.groups} * plan.group_rows * plan.group_heads == rows * problem.num_heads);
  CHECK(plan.turns == 1 || (plan.group_rows == 1 && plan.group_heads == plan.heads_per_out));
  CHECK(plan.items == problem.batch * plan.groups * plan.column_blocks);
  if (!problem.softmax) return;
  CHECK(int64_t{plan.chunks} * sm80::kSoftmaxChunkUnits >= problem.units);
  CHECK(plan.total_heads <= sm80::kScoreTileVectors && plan.total_heads <= plan.heads_per_key);
  CHECK(plan.total_items >= problem.batch * rows * problem.num_key_heads * plan.chunks);
}

void general_plans() {
  const int64_t heads[][3] = {{1, 1, 1}, {8, 2, 2}, {8, 2, 1}, {12, 4, 6}, {66, 2, 1}, {7, 1, 7}};
  for (const auto& h : heads) {
    for (int64_t rows : {1, 2, 70}) {
      for (int64_t page : {1, 2, 5, 16, 32, 33, 1500}) {
        for (int64_t units : {1, 31, 1024, 1025, 100000}) {
          for (Reduction row_reduce : {Reduction::kNone, Reduction::kMean}) {
            ProxyScoresProblem problem = scores_of(h[0], h[1], h[2], rows);
            problem.units = units;
            problem.row_reduce = row_reduce;
            problem.softmax = true;
            if (page > 1) problem.page_reduce = Reduction::kSum;
            problem.page_size = page;
            check::context = std::to_string(h[0]) + ":" + std::to_string(h[1]) + ":" +
                             std::to_string(h[2]) + " heads, " + std::to_string(rows) +
                             " rows, pages of " + std::to_string(page) + ", " +
                             std::to_string(units) + " units";
            general_plan(problem);
          }
        }
      }
    }
  }
}

void limits() {
  for (int64_t units : {int64_t{1} << 31, int64_t{1} << 40}) {
    check::context = std::to_string(units) + " units";
    for (int64_t rows : {1, 2}) {
      ProxyScoresProblem problem = scores_of(8, 2, 2, rows);
      problem.units = units;
      bool refused = false;
      try {
        sm80::plan_proxy_scores(problem, 132);
      } catch (const InvalidArgument& error) {
        refused = std::string(error.what()).find("32 bits") != std::string::npos;
      }
      CHECK(refused);
    }
  }
}

// Segments that rows [begin, begin + count) of a cache fall into.
int64_t touched(int64_t begin, int64_t count, int64_t keys) {
  return count == 0 ? 0 : (begin + count - 1) / keys - begin / keys + 1;
}

void segments() {
  float some = 0.0f;
  for (int64_t page : {0, 1, 5, 16, 48, 1000}) {  // 0: no bounds
    for (int64_t rows : {0, 1, 2, 8, 16, 17, 1000}) {
      AppendKvProblem problem;
      problem.batch = 3;
      problem.num_kv_heads = 2;
      problem.seqlen_q = rows;
      problem.bounds.data = page > 0 ? &some : nullptr;
      problem.bounds_page_size = page > 0 ? page : 1;
      check::context = std::to_string(rows) + " rows, pages of " + std::to_string(page);
      const sm80::AppendKvPlan plan = sm80::plan_append_kv(problem);
      const int64_t keys = plan.segment_keys;
      CHECK(keys >= 16 && (page == 0 || keys % page == 0));
      CHECK(plan.items == problem.batch * problem.num_kv_heads * plan.segments);
      int64_t most = 0;
      for (int64_t begin = 0; begin < 2 * keys; ++begin)
        most = most > touched(begin, rows, keys) ? most : touched(begin, rows, keys);
      CHECK(plan.segments == most);  // enough, and none that never has work

      const int32_t offsets[] = {2, 2 + static_cast<int32_t>(rows / 3),
                                 2 + static_cast<int32_t>(rows / 2),
                                 2 + static_cast<int32_t>(rows)};
      problem.cu_seqlens = offsets;
      problem.seqlen_q = rows + 5;
      const sm80::AppendKvPlan packed = sm80::plan_append_kv(problem);
      CHECK(packed.segments == 0 && packed.segment_keys == keys);
      const auto first = [&](int b) { return offsets[b] / keys + 2 * b; };
      for (int b = 0; b < 3; ++b) {
        const int64_t next = b == 2 ? packed.items / problem.num_kv_heads : first(b + 1);
        for (int64_t begin = 0; begin < 2 * keys; ++begin)
          CHECK(first(b) + touched(begin, offsets[b + 1] - offsets[b], keys) <= next);
      }
    }
  }
}

void capability_rows() {
  check::context = "capability rows";
  for (const char* op : {"proxy_scores", "append_kv"}) {
    for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (int64_t head_dim = 0; head_dim <= 264; ++head_dim) {
        CHECK(capability(op, Backend::kSm80).supports(dtype, head_dim) ==
              capability(op, Backend::kCpu).supports(dtype, head_dim));
      }
    }
  }
  // The dispatcher refuses by the sm_80 row, whichever family then runs.
  for (const char* op : {"decode", "select_topk", "select_threshold"}) {
    const Capability& row = capability(op, Backend::kSm90);
    CHECK(row.dtypes == capability(op, Backend::kSm80).dtypes);
    CHECK(row.head_dims == capability(op, Backend::kSm80).head_dims);
  }
}

}  // namespace

int main() {
  streams();
  streamed_problems();
  general_plans();
  limits();
  segments();
  capability_rows();
  return check::finish();
}
