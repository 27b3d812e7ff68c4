// Stands in for the CUDA backend in builds without nvcc.
#include "attnsieve/fetch.h"
#include "attnsieve/launch.h"
#include "attnsieve/status.h"

namespace attnsieve::cuda {
namespace {

[[noreturn]] void refuse() {
  throw Unsupported(
      "this build has the CPU backend only; install from source on a machine with nvcc");
}

}  // namespace

size_t attend_workspace_bytes(const AttendProblem&) { refuse(); }
size_t decode_workspace_bytes(const DecodeProblem&) { refuse(); }
size_t threshold_decode_workspace_bytes(const DecodeProblem&) { refuse(); }
void attend(const AttendProblem&, void*) { refuse(); }
void decode(const DecodeProblem&, void*) { refuse(); }
void threshold_decode(const DecodeProblem&, void*) { refuse(); }
size_t proxy_scores_workspace_bytes(const ProxyScoresProblem&) { refuse(); }
void proxy_scores(const ProxyScoresProblem&, void*) { refuse(); }
void append_kv(const AppendKvProblem&, void*) { refuse(); }
void merge_states(const MergeProblem&, void*) { refuse(); }
void select_blocks(const SelectProblem&, void*) { refuse(); }
size_t select_tokens_workspace_bytes(const TokenSelectProblem&) { refuse(); }
void select_tokens(const TokenSelectProblem&, void*) { refuse(); }
size_t quantize_workspace_bytes(const QuantizeProblem&) { refuse(); }
void quantize_blocks(const QuantizeProblem&, void*) { refuse(); }
void estimate_block_scores(const EstimateProblem&, void*) { refuse(); }
size_t fetch_workspace_bytes(const FetchProblem&) { refuse(); }
void fetch_tokens(const FetchProblem&, void*) { refuse(); }

}  // namespace attnsieve::cuda
