// fetch_tokens: a working set of a cache's tokens that follows the lists of each step.
#pragma once

#include <string>

#include "attnsieve/launch.h"
#include "attnsieve/status.h"
#include "attnsieve/tensor_view.h"

namespace attnsieve {

// For each sequence and head: tokens of a list that a slot holds stay there; the others, in the
// list's order, take the slots of no listed token, the first ones first, and their rows of K and V
// are copied there. positions[i] is the slot of the list's token i. On a GPU K and V may be pinned
// host memory.
struct FetchProblem {
  // [B, H, capacity], strictly increasing in its first counts[b, h]; contiguous. Other entries, and
  // those outside [0, num_tokens), get position -1.
  const int32_t* indices = nullptr;
  const int32_t* counts = nullptr;     // [B, H] contiguous
  const int32_t* first_new = nullptr;  // [B]: no slot holds this token or a later one; nullptr: all
  HeadTensor k, v;  // [B, H, num_tokens, D]
  int32_t* slots = nullptr;  // [B, H, num_slots] contiguous: the token there, -1 for none
  HeadTensor k_slots, v_slots;  // [B, H, num_slots, D]
  int32_t* positions = nullptr;  // [B, H, capacity] contiguous
  int64_t* moved = nullptr;  // [2]: tokens listed and tokens copied are added; or nullptr
  void* workspace = nullptr;  // CUDA: fetch_workspace_bytes()
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t num_tokens = 0;
  int32_t num_slots = 0;  // at least capacity
  int32_t capacity = 0;
  int64_t row_bytes = 0;  // of K, and of V; a multiple of 16, strides are in such
};

// The place of a token in a list, -1 if it is not there.
ATTNSIEVE_HD int32_t place_in_list(const int32_t* list, int32_t count, int32_t token) {
  int32_t begin = 0;
  int32_t end = count;
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (list[middle] < token) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin < count && list[begin] == token ? begin : -1;
}

inline void check_fetch(const FetchProblem& problem) {
  const auto refuse = [](const std::string& text) {
    throw InvalidArgument("fetch_tokens: " + text);
  };
  if (problem.batch < 0 || problem.num_heads < 0 || problem.num_tokens < 0 || problem.capacity < 0)
    refuse("sizes must not be negative");
  if (problem.num_slots < problem.capacity) {
    refuse("slots: lists of " + std::to_string(problem.capacity) + " tokens do not fit in " +
           std::to_string(problem.num_slots));
  }
  if (problem.row_bytes % 16 != 0) refuse("rows must be multiples of 16 bytes");
}

namespace cpu {
void fetch_tokens(const FetchProblem& problem, const ParallelFor& parallel_for);
}
namespace cuda {
size_t fetch_workspace_bytes(const FetchProblem& problem);
void fetch_tokens(const FetchProblem& problem, void* stream);
}  // namespace cuda

}  // namespace attnsieve
