// Host-side choices of the CUDA backend and the capability table they refuse by: no GPU involved.
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

// The text of the refusal, "" where the backend is chosen.
std::string refusal(DType dtype, int64_t head_dim, int compute_capability) {
  try {
    const Backend backend =
        cuda::choose_attend_backend(problem_of(dtype, head_dim), {compute_capability});
    CHECK(backend == Backend::kSm80);
    return "";
  } catch (const Unsupported& error) {
    return error.what();
  }
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void backends() {
  for (int compute_capability : {80, 86, 89, 90, 100, 120}) {
    for (DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      for (int64_t head_dim : {64, 128}) {
        check::context = std::string(dtype_name(dtype)) + " hd" + std::to_string(head_dim) +
                         " on " + std::to_string(compute_capability);
        CHECK(refusal(dtype, head_dim, compute_capability).empty());
      }
    }
  }
  check::context = "old GPUs";
  for (int compute_capability : {0, 61, 75}) {
    const std::string text = refusal(DType::kFloat16, 64, compute_capability);
    CHECK(text.rfind(Unsupported::kPrefix, 0) == 0);
    CHECK(contains(text, "8.0"));
  }
  CHECK(contains(refusal(DType::kFloat16, 64, 75), "7.5"));

  check::context = "refusals print what was asked and what is supported";
  const std::string wrong_dtype = refusal(DType::kFloat32, 64, 90);
  CHECK(contains(wrong_dtype, "got dtype float32, head_dim 64"));
  CHECK(contains(wrong_dtype, "dtype in {float16, bfloat16} and head_dim in {64, 128}"));
  for (int64_t head_dim : {0, 8, 63, 65, 96, 192, 256})
    CHECK(contains(refusal(DType::kBFloat16, head_dim, 90),
                   "head_dim " + std::to_string(head_dim) + ";"));
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

void table() {
  for (const Capability& row : capabilities()) {
    check::context = std::string(row.op) + " on " + backend_name(row.backend);
    CHECK(!row.dtypes.empty());
    CHECK(&capability(row.op, row.backend) == &row);
    CHECK(!row.supports(row.dtypes[0], 0) && !row.supports(row.dtypes[0], -8));
    for (int head_dim : row.head_dims) {
      CHECK(head_dim <= row.max_head_dim);
      CHECK(row.supports(row.dtypes[0], head_dim));
      CHECK(contains(row.supported(), std::to_string(head_dim)));
    }
    if (row.head_dims.empty() && row.max_head_dim > 0) {
      CHECK(row.supports(row.dtypes[0], row.max_head_dim));
      CHECK(!row.supports(row.dtypes[0], row.max_head_dim + 8));
      CHECK(!row.supports(row.dtypes[0], 12));
    }
    for (DType dtype : row.dtypes) CHECK(contains(row.supported(), dtype_name(dtype)));
  }
  check::context = "an op that does not exist";
  bool refused = false;
  try {
    capability("no_such_op", Backend::kCpu);
  } catch (const Unsupported& error) {
    refused = contains(error.what(), "no_such_op");
  }
  CHECK(refused);

  check::context = "require_supported";
  require_supported("attend", Backend::kCpu, DType::kFloat32, 256);
  refused = false;
  try {
    require_supported("attend", Backend::kCpu, DType::kFloat32, 264);
  } catch (const Unsupported& error) {
    refused = contains(error.what(), "a multiple of 8 up to 256");
  }
  CHECK(refused);
}

}  // namespace

int main() {
  backends();
  selection_threads();
  table();
  return check::finish();
}
