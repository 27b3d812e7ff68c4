// visibility.h against the definition, key by key.
#include <string>

#include "attnsieve/visibility.h"
#include "check.h"

using namespace attnsieve;

namespace {

bool sees(const Mask& mask, int64_t row, int64_t key, int64_t seqlen_q, int64_t seqlen_k) {
  const int64_t diagonal = row + seqlen_k - seqlen_q;
  if (mask.causal && key > diagonal) return false;
  if (mask.window_left >= 0 && key < diagonal - mask.window_left) return false;
  return mask.window_right < 0 || key <= diagonal + mask.window_right;
}

void ranges() {
  const int64_t sizes[] = {1, 2, 5, 9, 13};
  const int64_t sides[] = {-1, 0, 1, 4, 20};
  for (int64_t sq : sizes) {
    for (int64_t sk : sizes) {
      for (int side = 0; side < 50; ++side) {
        const Mask mask{side % 2 == 1, sides[side / 2 % 5], sides[side / 10]};
        for (int64_t begin = 0; begin <= sq; ++begin) {
          for (int64_t end = begin; end <= sq; ++end) {
            int64_t first = sk, last = -1;
            for (int64_t row = begin; row < end; ++row) {
              for (int64_t key = 0; key < sk; ++key) {
                if (!sees(mask, row, key, sq, sk)) continue;
                first = min64(first, key);
                last = max64(last, key);
              }
            }
            const KeyRange got = visible_keys(mask, begin, end, sq, sk);
            const bool none = got.begin >= got.end;
            check::context = std::to_string(sq) + "x" + std::to_string(sk) + " rows " +
                             std::to_string(begin) + ".." + std::to_string(end) + " side " +
                             std::to_string(side);
            CHECK(last < 0 ? none : got.begin == first && got.end == last + 1);
          }
        }
      }
    }
  }
}

void diagonals() {
  for (int64_t sq : {1, 63, 64, 65, 130, 300}) {
    for (int64_t sk : {1, 63, 64, 65, 130, 300}) {
      for (int64_t block_q : {64, 128}) {
        for (int64_t block_k : {64, 128}) {
          for (int64_t r = 0; r * block_q < sq; ++r) {
            int64_t first = 1 << 20, last = -1;
            for (int64_t row = r * block_q; row < min64((r + 1) * block_q, sq); ++row) {
              const int64_t own = row + sk - sq;
              if (own < 0 || own >= sk) continue;
              first = min64(first, own / block_k);
              last = max64(last, own / block_k);
            }
            const KeyRange got = diagonal_blocks(r, block_q, block_k, sq, sk);
            check::context =
                std::to_string(sq) + "x" + std::to_string(sk) + " row " + std::to_string(r);
            CHECK(last < 0 ? got.begin >= got.end : got.begin == first && got.end == last + 1);
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  ranges();
  diagonals();
  return check::finish();
}
