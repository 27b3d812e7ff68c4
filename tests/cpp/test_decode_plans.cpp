// How the CUDA backend cuts decode and threshold_decode: every query vector and every key has a place.
#include <cstdint>
#include <string>

#include "attnsieve/status.h"
#include "check.h"
#include "cuda/dispatch/plan_decode.h"

using namespace attnsieve;

namespace {

DecodeProblem decode_problem(int64_t heads, int64_t kv_heads, int64_t rows, int64_t keys) {
  DecodeProblem problem;
  problem.batch = 3;
  problem.num_heads = heads;
  problem.num_kv_heads = kv_heads;
  problem.seqlen_q = rows;
  problem.seqlen_k = keys;
  return problem;
}

void decode_plans() {
  // Every query vector is in one item, and items fit their columns.
  for (int64_t kv_heads : {1, 2, 8}) {
    for (int64_t group : {1, 3, 4, 7, 16, 20}) {
      for (int64_t rows = 1; rows <= kMaxDecodeRows; ++rows) {
        for (int64_t lists : {int64_t{0}, int64_t{1}, kv_heads, kv_heads * group}) {
          for (bool per_row : {false, true}) {
            if (per_row && lists == 0) continue;
            DecodeProblem problem = decode_problem(kv_heads * group, kv_heads, rows, 5000);
            problem.index.capacity = 100;
            if (lists > 0)
              problem.index.heads_per_list = static_cast<int>(problem.num_heads / lists);
            problem.index.num_rows = per_row ? static_cast<int>(rows) : 1;
            const cuda::DecodePlan plan = cuda::plan_decode(problem, {80, 108});
            check::context = plan.to_string();
            CHECK(plan.columns <= 16 && plan.columns == plan.rows * plan.heads);
            CHECK(plan.shared_heads % plan.heads == 0 || plan.items_per_group > 1);
            CHECK(int64_t{plan.heads} * plan.items_per_group >= plan.shared_heads);
            CHECK(int64_t{plan.heads} * (plan.items_per_group - 1) < plan.shared_heads);
            CHECK(plan.group_size % plan.shared_heads == 0);
            const int64_t row_parts = rows / plan.rows;
            CHECK(plan.items_per_row * row_parts == plan.items_per_batch);
            CHECK(plan.items == 3 * plan.items_per_batch);
          }
        }
      }
    }
  }
  // Parts cover the keys, are at most as many as wished for, and do not depend on the batch.
  for (int64_t keys : {0, 1, 127, 128, 129, 8192, 8193, 131072, 1 << 20}) {
    for (int splits : {0, 1, 2, 7, kMaxDecodeSplits}) {
      DecodeProblem problem = decode_problem(8, 2, 1, keys);
      problem.num_splits = splits;
      const cuda::DecodePlan plan = cuda::plan_decode(problem, {80, 108});
      check::context = std::to_string(splits) + " splits of " + plan.to_string();
      CHECK(plan.chunk_keys >= 16 && plan.chunk_unit % 16 == 0 && plan.chunk_unit > 0);
      CHECK(plan.max_chunks >= 1 && plan.max_chunks <= (splits > 0 ? splits : kMaxDecodeSplits));
      CHECK(int64_t{plan.chunk_keys} * plan.max_chunks >= keys);
      problem.batch = 64;
      CHECK(cuda::plan_decode(problem, {80, 108}).chunk_keys == plan.chunk_keys);
    }
  }
  check::context = "a range whose begin only the device knows may be all of the cache";
  DecodeProblem problem = decode_problem(8, 2, 1, 100000);
  problem.index.capacity = 256;
  problem.index.heads_per_list = 4;
  CHECK(cuda::plan_decode(problem, {80, 108}).max_chunks == 2);
  problem.recent = 64;
  CHECK(cuda::plan_decode(problem, {80, 108}).max_chunks == 3);
  const int32_t begin = 0;
  problem.dense_begin = &begin;
  CHECK(int64_t{cuda::plan_decode(problem, {80, 108}).chunk_keys} *
            cuda::plan_decode(problem, {80, 108}).max_chunks >=
        100256);
  check::context = "clusters for short lists on Hopper, where the parts are not the caller's";
  CHECK(cuda::plan_decode(problem, {90, 132}).ranks == 0);
  problem.dense_begin = nullptr;
  problem.batch = 1;
  CHECK(cuda::plan_decode(problem, {90, 132}).ranks == 8);
  problem.batch = 64;
  CHECK(cuda::plan_decode(problem, {90, 132}).ranks == 4);
  CHECK(cuda::plan_decode(problem, {80, 108}).ranks == 0);
  problem.num_splits = 3;
  CHECK(cuda::plan_decode(problem, {90, 132}).ranks == 0);
  problem.num_splits = 0;
  problem.dense_begin = &begin;
  for (int64_t page_size : {int64_t{1} << 23, int64_t{1} << 31}) {
    check::context = "more keys than 32 bits count";
    bool refused = false;
    problem.index.page_size = page_size;
    try {
      cuda::plan_decode(problem, {80, 108});
    } catch (const InvalidArgument& error) {
      refused = check::contains(error.what(), "keys");
    }
    CHECK(refused);
  }
}

// The items of decode; a warp for each of the caller's splits, four a CTA.
void threshold_plans() {
  for (int64_t heads : {2, 8, 40}) {
    for (int64_t rows = 1; rows <= kMaxDecodeRows; ++rows) {
      for (int splits : {1, 3, 4, 5, 64, kMaxDecodeSplits}) {
        DecodeProblem problem = decode_problem(heads, 2, rows, 5000);
        problem.num_splits = splits;
        const cuda::DecodePlan plan = cuda::plan_threshold_decode(problem);
        const cuda::DecodePlan same = cuda::plan_decode(problem, {80, 108});
        check::context = std::to_string(splits) + " splits of " + plan.to_string();
        CHECK(plan.items == same.items && plan.columns == same.columns && plan.heads == same.heads);
        CHECK(plan.items_per_group == same.items_per_group && plan.rows == rows);
        CHECK(plan.max_chunks * 4 >= splits && (plan.max_chunks - 1) * 4 < splits);
      }
    }
  }
  check::context = "positions that 32 bits do not count";
  DecodeProblem problem = decode_problem(8, 2, 1, int64_t{1} << 31);
  problem.num_splits = 1;
  bool refused = false;
  try {
    cuda::plan_threshold_decode(problem);
  } catch (const InvalidArgument& error) {
    refused = check::contains(error.what(), "2147483648 keys");
  }
  CHECK(refused);
}

}  // namespace

int main() {
  decode_plans();
  threshold_plans();
  return check::finish();
}
