// What the host hands the kernels of fetch_tokens.
#pragma once

#include <vector>

#include "attnsieve/fetch.h"
#include "cuda/dispatch/kernel_table.h"

namespace attnsieve::sm80 {

// In the workspace, a line for each sequence and head: how many tokens are copied, the free slots in
// their order, of which the first are taken, and the tokens that take them.
struct FetchArguments {
  FetchProblem problem;
  int32_t* copied;  // [B * H]
  int32_t* free;    // [B * H, num_slots]
  int32_t* tokens;  // [B * H, capacity]
};

void launch_fetch_tokens(const FetchArguments& arguments, int num_sms, void* stream);
std::vector<KernelEntry> fetch_tokens_entries();

}  // namespace attnsieve::sm80
