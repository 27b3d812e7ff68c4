// cpu::fetch_tokens: hits stay, misses take the slots that no listed token holds.
#include "attnsieve/fetch.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace attnsieve::cpu {
namespace {

char* row_of(const HeadTensor& rows, int64_t batch, int64_t head, int64_t row) {
  return static_cast<char*>(rows.data) + batch * rows.stride_batch + head * rows.stride_head +
         row * rows.stride_row;
}

// The number of tokens copied.
int64_t fetch_list(const FetchProblem& p, int64_t batch, int64_t head, int32_t count) {
  const int64_t line = batch * p.num_heads + head;
  const int32_t* const list = p.indices + line * p.capacity;
  int32_t* const slots = p.slots + line * p.num_slots;
  int32_t* const positions = p.positions + line * p.capacity;
  std::fill_n(positions, p.capacity, -1);
  for (int32_t slot = 0; slot < p.num_slots; ++slot) {
    if (p.first_new != nullptr && slots[slot] >= p.first_new[batch]) slots[slot] = -1;
    if (slots[slot] < 0) continue;
    const int32_t place = place_in_list(list, count, slots[slot]);
    if (place >= 0) positions[place] = slot;
  }
  int64_t copied = 0;
  int32_t slot = 0;
  for (int32_t place = 0; place < count; ++place) {
    const int32_t token = list[place];
    if (positions[place] >= 0 || token < 0 || token >= p.num_tokens) continue;
    const auto is_used = [&](int32_t at) {
      return slots[at] >= 0 && place_in_list(list, count, slots[at]) >= 0;
    };
    while (slot < p.num_slots && is_used(slot)) ++slot;
    if (slot == p.num_slots) break;  // only where a list or the slots name a token twice
    slots[slot] = token;
    positions[place] = slot;
    std::memcpy(row_of(p.k_slots, batch, head, slot), row_of(p.k, batch, head, token), p.row_bytes);
    std::memcpy(row_of(p.v_slots, batch, head, slot), row_of(p.v, batch, head, token), p.row_bytes);
    ++slot;
    ++copied;
  }
  return copied;
}

}  // namespace

void fetch_tokens(const FetchProblem& p, const ParallelFor& parallel_for) {
  check_fetch(p);
  std::atomic<int64_t> listed{0};
  std::atomic<int64_t> copied{0};
  parallel_for(p.batch * p.num_heads, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int32_t count = std::clamp(p.counts[line], 0, p.capacity);
      copied += fetch_list(p, line / p.num_heads, line % p.num_heads, count);
      listed += count;
    }
  });
  if (p.moved == nullptr) return;
  p.moved[0] += listed;
  p.moved[1] += copied;
}

}  // namespace attnsieve::cpu
