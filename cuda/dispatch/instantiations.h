// Declarations of what the instantiation files define, so that the dispatcher compiles no kernels.
#pragma once

#include "attnsieve/problem.h"
#include "cuda/dispatch/heuristics.h"
#include "cuda/dispatch/kernel_table.h"
#include "cuda/sm80/append_kv/arguments.h"
#include "cuda/sm80/proxy_scores/arguments.h"
#include "cuda/sm90/attend/arguments.h"

namespace cutlass {
struct half_t;
struct bfloat16_t;
struct float_e4m3_t;
}  // namespace cutlass
namespace cute {
using cutlass::bfloat16_t;
using cutlass::float_e4m3_t;
using cutlass::half_t;
}  // namespace cute

struct __half;
struct __nv_bfloat16;

namespace attnsieve::sm80 {

template <class Element, int kHeadDim>
void launch_attend(const AttendProblem& problem, void* stream);
template <class Element, int kHeadDim>
std::vector<KernelEntry> attend_entries();

struct DecodeArguments;
// Stored: Element, or float_e4m3_t codes.
template <class Element, class Stored, int kHeadDim>
void launch_decode(const DecodeArguments& arguments, int num_sms, void* stream);
template <class Element, class Stored, int kHeadDim>
std::vector<KernelEntry> decode_entries();

template <class Element, class Stored, int kHeadDim>
void launch_threshold_decode(const DecodeArguments& arguments, void* stream);
template <class Element, class Stored, int kHeadDim>
std::vector<KernelEntry> threshold_decode_entries();

void launch_merge_states(const MergeProblem& problem, void* stream);
std::vector<KernelEntry> merge_states_entries();

void launch_select_blocks(const SelectProblem& problem, int threads, void* stream);
std::vector<KernelEntry> select_blocks_entries();

size_t select_tokens_workspace_bytes(int64_t lists, int parts);
// plan.parts > 1 needs problem.workspace.
void launch_select_tokens(const TokenSelectProblem& problem, const SelectTokensPlan& plan,
                          void* stream);
std::vector<KernelEntry> select_tokens_entries();

template <class Element>
void launch_proxy_scores(const ProxyScoresArguments& arguments, void* stream);
template <class Element>
std::vector<KernelEntry> proxy_scores_entries();

template <class Element>
void launch_append_kv(const AppendKvArguments& arguments, void* stream);
std::vector<KernelEntry> append_kv_entries();

}  // namespace attnsieve::sm80

namespace attnsieve::sm90 {

template <class Element, int kHeadDim, bool kInterleaved, bool kList>
void launch_attend(const AttendArguments& arguments, const AttendPlan& plan, int num_sms,
                   void* stream);
template <class Element, int kHeadDim, bool kInterleaved, bool kList>
std::vector<KernelEntry> attend_entries();

// For plans with clusters.
template <class Element, class Stored, int kHeadDim>
void launch_decode_lists(const sm80::DecodeArguments& arguments, void* stream);
template <class Element, class Stored, int kHeadDim>
std::vector<KernelEntry> decode_lists_entries();

// ranks in {2, 4, 8}: CTAs that share a list.
void launch_select_tokens(const TokenSelectProblem& problem, const sm80::SelectTokensPlan& plan,
                          void* stream);
std::vector<KernelEntry> select_tokens_entries();

}  // namespace attnsieve::sm90
