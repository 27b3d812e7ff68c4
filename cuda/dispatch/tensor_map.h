// Tensor maps of the bulk copy engine, built on the host and passed to kernels by value.
#pragma once

#include <cuda.h>

#include <array>

#include "attnsieve/tensor_view.h"

namespace attnsieve::cuda {

// Fastest dimension first; strides in elements, that of dimension 0 is 1.
struct TensorMapShape {
  int rank = 0;
  std::array<int64_t, 5> sizes{};
  std::array<int64_t, 5> strides{};
  std::array<int, 5> box{};
};

// Boxes land in shared memory with the swizzle of their row: 128 or 64 bytes. Elements outside the
// tensor read as zero.
CUtensorMap make_tensor_map(const void* data, DType dtype, const TensorMapShape& shape);
// The same of bytes; rows of boxes may have 32 too.
CUtensorMap make_byte_map(const void* data, const TensorMapShape& shape);

}  // namespace attnsieve::cuda
