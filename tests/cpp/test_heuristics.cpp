// Host-side choices of the CUDA backend and the capability table they refuse by: no GPU involved.
#include <cstdint>
#include <string>
#include <vector>

#include "attnsieve/capability.h"
#include "check.h"
#include "cuda/dispatch/heuristics.h"

using namespace attnsieve;

namespace {

AttendProblem problem_of(DType dtype, int64_t head_dim) {
  AttendProblem problem;
  problem.dtype = dtype;
  problem.head_dim = head_dim;
  return problem;
}

Backend choose(const AttendProblem& problem, int compute_capability, const char* forced = nullptr) {
  return cuda::choose_attend_backend(problem,
                                     cuda::device_of_family({compute_capability, 108}, forced));
}

// The text of the refusal, "" where a backend is chosen.
std::string refusal(DType dtype, int64_t head_dim, int compute_capability,
                    const char* forced = nullptr) {
  try {
    choose(problem_of(dtype, head_dim), compute_capability, forced);
    return "";
  } catch (const Unsupported& error) {
    return error.what();
  }
}

void backends() {
  for (int compute_capability : {80, 86, 89, 90, 100, 120}) {
    for (DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      for (int64_t head_dim : {64, 96, 128, 256}) {
        check::context = std::string(dtype_name(dtype)) + " hd" + std::to_string(head_dim) +
                         " on " + std::to_string(compute_capability);
        const AttendProblem problem = problem_of(dtype, head_dim);
        const Backend best = compute_capability == 90 ? Backend::kSm90 : Backend::kSm80;
        const std::string missing = "head_dim " + std::to_string(head_dim) + ";";
        if (!capability("attend", Backend::kSm80).supports(dtype, head_dim)) {
          CHECK(check::contains(refusal(dtype, head_dim, compute_capability, "sm_80"), missing));
          const std::string text = refusal(dtype, head_dim, compute_capability);
          CHECK(best == Backend::kSm90 ? text.empty() : check::contains(text, missing));
          continue;
        }
        CHECK(choose(problem, compute_capability) == best);
        CHECK(choose(problem, compute_capability, "") == best);
        CHECK(choose(problem, compute_capability, "sm_80") == Backend::kSm80);
        const std::string forced = refusal(dtype, head_dim, compute_capability, "sm_90");
        CHECK(compute_capability == 90 ? forced.empty() : check::contains(forced, "9.0"));
      }
    }
  }
  check::context = "old GPUs";
  for (int compute_capability : {0, 61, 75}) {
    const std::string text = refusal(DType::kFloat16, 64, compute_capability);
    CHECK(text.rfind(Unsupported::kPrefix, 0) == 0);
    CHECK(check::contains(text, "8.0"));
  }
  CHECK(check::contains(refusal(DType::kFloat16, 64, 75), "7.5"));

  check::context = "refusals print what was asked and what is supported";
  const std::string wrong_dtype = refusal(DType::kFloat32, 64, 90);
  CHECK(check::contains(wrong_dtype, "got dtype float32, head_dim 64"));
  CHECK(check::contains(wrong_dtype, "dtype in {float16, bfloat16} and head_dim in {64, "));
  for (const char* forced : {"sm_80", "sm_90"}) {
    const Backend backend = forced == std::string("sm_80") ? Backend::kSm80 : Backend::kSm90;
    for (int64_t head_dim : {0, 8, 63, 64, 65, 96, 128, 192, 256}) {
      const bool served = capability("attend", backend).supports(DType::kBFloat16, head_dim);
      const std::string text = refusal(DType::kBFloat16, head_dim, 90, forced);
      CHECK(served ? text.empty()
                   : check::contains(text, "head_dim " + std::to_string(head_dim) + ";"));
    }
  }
  check::context = "a backend that does not exist";
  bool refused = false;
  try {
    choose(problem_of(DType::kFloat16, 64), 90, "sm_100");
  } catch (const InvalidArgument& error) {
    refused = check::contains(error.what(), "sm_100") && check::contains(error.what(), "sm_90");
  }
  CHECK(refused);
}

// What every plan must respect, whatever its choices: pieces that lie together in memory and fill
// tiles, tiles that a vote does not outgrow.
void plan_invariants(int64_t head_dim, int block_q, int block_k, int page_size, int skip_block,
                     bool voted, int heads_per_list) {
  AttendProblem problem = problem_of(DType::kBFloat16, head_dim);
  problem.num_heads = 8;
  problem.num_kv_heads = 2;
  problem.threshold.skip_block = skip_block;
  problem.threshold.enabled = voted;
  const int32_t some = 0;
  if (block_q > 0) {
    problem.index.counts = &some;
    problem.index.block_q = block_q;
    problem.index.block_k = block_k;
    problem.index.heads_per_list = heads_per_list;
  }
  if (page_size > 0) {
    problem.paged.block_table = &some;
    problem.paged.page_size = page_size;
  }
  if (voted && head_dim == 256 && skip_block == 128) {
    check::context = "votes on 128 keys of 256 columns";
    std::string text;
    try {
      sm90::plan_attend(problem);
    } catch (const Unsupported& error) {
      text = error.what();
    }
    CHECK(check::contains(text, "skip_block 128") && check::contains(text, "head_dim 256"));
    CHECK(check::contains(text, "use skip_block 64"));
    return;
  }
  const sm90::AttendPlan plan = sm90::plan_attend(problem);
  check::context = "hd" + std::to_string(head_dim) + ", " + plan.to_string();
  CHECK(plan.warpgroups >= 1 && plan.warpgroups <= 2);
  CHECK(plan.tile_n == 64 || plan.tile_n == 128);
  CHECK(plan.piece_keys >= 16 && plan.tile_n % plan.piece_keys == 0);
  CHECK(page_size == 0 || page_size % plan.piece_keys == 0);
  CHECK(block_q == 0 || problem.index.unit_keys() % plan.piece_keys == 0);
  CHECK(!voted || (plan.voted && skip_block % plan.tile_n == 0));
  CHECK(!plan.pack_heads || heads_per_list > 1);
  CHECK(!plan.dynamic);  // there is no counter
  problem.workspace = &problem;
  const sm90::AttendPlan counted = sm90::plan_attend(problem);
  CHECK(!counted.dynamic || counted.persistent);
  CHECK(counted.dynamic == (block_q > 0 && counted.warpgroups == 2));
  // Two rows of an index never share a CTA unless heads do instead.
  CHECK(block_q != 64 || plan.warpgroups == 1 || plan.pack_heads);
  CHECK(head_dim <= 128 || plan.tile_n == 64);
  // A warpgroup that feeds itself owns a row of an index, does not vote, and is not persistent.
  CHECK(plan.self_fed == (block_q == 64 && !plan.pack_heads && !plan.voted && head_dim <= 128));
  CHECK(!plan.self_fed || (plan.warpgroups == 1 && !counted.persistent));
  // Warpgroups whose last tiles may differ do not vote.
  CHECK(!plan.voted || plan.warpgroups == 1 || plan.tile_n == 128);
  // Slices of a tile behind each other take no pieces below 64 keys; one slice takes any.
  CHECK(plan.interleaved == (head_dim > 64 && plan.piece_keys < 64));
}

void plans() {
  for (int64_t head_dim : {64, 96, 128, 256}) {
    for (int block_q : {0, 64, 128}) {
      for (int block_k : {16, 32, 64, 128}) {
        for (int page_size : {0, 16, 48, 64, 256}) {
          for (int skip_block : {64, 128}) {
            for (bool voted : {false, true}) {
              for (int heads_per_list : {1, 4, 8}) {
                plan_invariants(head_dim, block_q, block_k, page_size, skip_block, voted,
                                heads_per_list);
              }
            }
          }
        }
      }
    }
  }
}

// Both 64-row groups of a row tile have their last visible key in the same KV tile, whatever the
// diagonal: the tile visited first is then the last of either.
void first_rows() {
  constexpr int kTileKeys = 128;
  const auto tile_of_last_key = [](int group_begin, int end_shift) {
    const int last_key = group_begin + kGroupRows - 1 + end_shift - 1;
    return (last_key + 1000 * kTileKeys) / kTileKeys;
  };
  for (int end_shift = -500; end_shift <= 500; ++end_shift) {
    check::context = "first_row_of_tiles at end_shift " + std::to_string(end_shift);
    const int first = sm90::first_row_of_tiles(end_shift, kTileKeys);
    CHECK(first == 0 || first == -kGroupRows);
    for (int row : {first, first + 2 * kGroupRows}) {
      CHECK(tile_of_last_key(row, end_shift) == tile_of_last_key(row + kGroupRows, end_shift));
    }
  }
}

void selection_threads() {
  check::context = "select_threads";
  int before = 0;
  for (int64_t blocks = 0; blocks < 5000; ++blocks) {
    const int threads = cuda::select_threads(blocks);
    CHECK(threads % 32 == 0 && threads >= before);
    CHECK(threads == 256 || threads >= blocks);
    before = threads;
  }
  CHECK(cuda::select_threads(int64_t{1} << 40) == 256);
}

void token_selection() {
  for (int64_t lists : {0, 1, 2, 8, 65, 66, 67, 132, 1000, 1 << 20}) {
    for (int64_t columns :
         {0, 1, 4096, 4097, 49152, 49153, 65536, 131072, 131073, 1 << 20, INT32_MAX}) {
      for (int num_sms : {1, 2, 20, 108, 132}) {
        check::context = "plan_select_tokens: " + std::to_string(lists) + " x " +
                         std::to_string(columns) + " on " + std::to_string(num_sms);
        TokenSelectProblem problem;
        problem.batch = lists;
        problem.num_lists = 1;
        problem.columns = columns;
        const sm80::SelectTokensPlan plan = sm80::plan_select_tokens(problem, {80, num_sms});
        CHECK(plan.threads == 512 || plan.threads == 1024);
        CHECK(plan.parts >= 1);
        // Lists that fill the GPU are not split, nor those that one CTA samples.
        CHECK(plan.parts == 1 || (2 * lists <= num_sms && !plan.sampled));
        CHECK(plan.sampled == (columns <= sm80::kMaxSampledColumns));
        // Every part fits a CTA.
        CHECK(plan.parts == 1 || (columns + plan.parts - 1) / plan.parts <= 16384);
        // The same for any way of counting lists: batch neighbours are lists too.
        problem.batch = 1;
        problem.num_lists = lists;
        const sm80::SelectTokensPlan again = sm80::plan_select_tokens(problem, {80, num_sms});
        CHECK(again.threads == plan.threads && again.parts == plan.parts);
        CHECK(plan.ranks == 1);
        const sm80::SelectTokensPlan hopper = sm80::plan_select_tokens(problem, {90, num_sms});
        CHECK(hopper.ranks == 1 || (hopper.parts == 1 && lists * hopper.ranks <= num_sms));
        CHECK(hopper.ranks == 1 || columns >= hopper.ranks * 6144);
      }
    }
  }
  check::context = "plan_select_tokens: one long list uses the whole GPU";
  TokenSelectProblem problem;
  problem.batch = problem.num_lists = 1;
  problem.columns = 1 << 20;
  CHECK(sm80::plan_select_tokens(problem, {80, 132}).parts >= 132);
  check::context = "plan_select_tokens: one launch on Hopper, of 1, 2, 4 or 8 CTAs a list";
  CHECK(sm80::plan_select_tokens(problem, {90, 132}).ranks == 8);
  problem.num_lists = 32;
  CHECK(sm80::plan_select_tokens(problem, {90, 132}).ranks == 2);
  problem.num_lists = 64;
  CHECK(sm80::plan_select_tokens(problem, {90, 132}).ranks == 1);
  problem.num_lists = 8;
  problem.columns = 65536;
  CHECK(sm80::plan_select_tokens(problem, {90, 132}).ranks == 8);
  problem.columns = 8192;
  CHECK(sm80::plan_select_tokens(problem, {90, 132}).ranks == 1);
  check::context = "plan_select_tokens: what the list of keys has no room for is not sampled";
  problem.capacity = 6144;
  CHECK(sm80::plan_select_tokens(problem, {90, 132}).sampled);
  problem.capacity = 6145;
  CHECK(!sm80::plan_select_tokens(problem, {90, 132}).sampled);
  problem.rule = TokenRule::kThreshold;
  CHECK(sm80::plan_select_tokens(problem, {90, 132}).sampled);
}

void table() {
  for (const Capability& row : capabilities()) {
    check::context = std::string(row.op) + " on " + backend_name(row.backend);
    CHECK(!row.dtypes.empty());
    CHECK(&capability(row.op, row.backend) == &row);
    CHECK(!row.supports(row.dtypes[0], 0) && !row.supports(row.dtypes[0], -8));
    for (int head_dim : row.head_dims) {
      CHECK(head_dim <= row.max_head_dim);
      CHECK(row.supports(row.dtypes[0], head_dim));
      CHECK(check::contains(row.supported(), std::to_string(head_dim)));
    }
    if (row.head_dims.empty() && row.max_head_dim > 0) {
      CHECK(row.supports(row.dtypes[0], row.max_head_dim));
      CHECK(!row.supports(row.dtypes[0], row.max_head_dim + 8));
      CHECK(!row.supports(row.dtypes[0], 12));
    }
    for (DType dtype : row.dtypes) CHECK(check::contains(row.supported(), dtype_name(dtype)));
  }
  check::context = "an op that does not exist";
  bool refused = false;
  try {
    capability("no_such_op", Backend::kCpu);
  } catch (const Unsupported& error) {
    refused = check::contains(error.what(), "no_such_op");
  }
  CHECK(refused);

  check::context = "require_supported";
  require_supported("attend", Backend::kCpu, DType::kFloat32, 256);
  refused = false;
  try {
    require_supported("attend", Backend::kCpu, DType::kFloat32, 264);
  } catch (const Unsupported& error) {
    refused = check::contains(error.what(), "a multiple of 8 up to 256");
  }
  CHECK(refused);
}

}  // namespace

int main() {
  backends();
  plans();
  first_rows();
  selection_threads();
  token_selection();
  table();
  return check::finish();
}
