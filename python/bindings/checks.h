// Argument checks of the torch boundary: every message names the argument, what it got and what it
// wanted.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <string>

#include "attnsieve/estimate.h"
#include "attnsieve/problem.h"
#include "attnsieve/status.h"

namespace attnsieve::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void invalid(const char* argument, const Parts&... parts) {
  std::ostringstream text;
  text << argument << ": ";
  (text << ... << parts);
  throw InvalidArgument(text.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i)
    text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline const char* dtype_of(const Tensor& tensor) {
  return torch::headeronly::toString(tensor.scalar_type());
}

inline void check_dtype(const char* argument, const Tensor& tensor, ScalarType wanted) {
  if (tensor.scalar_type() != wanted) {
    invalid(argument, "expected dtype ", torch::headeronly::toString(wanted), ", got ",
            dtype_of(tensor));
  }
}

inline void check_dim(const char* argument, const Tensor& tensor, int64_t wanted,
                      const char* meaning) {
  if (tensor.dim() != wanted) {
    invalid(argument, "expected ", wanted, " dimensions ", meaning, ", got shape ",
            shape_of(tensor));
  }
}

inline void check_size(const char* argument, const Tensor& tensor, int64_t dim, int64_t wanted,
                       const char* meaning) {
  if (tensor.size(dim) != wanted) {
    invalid(argument, "expected size ", wanted, " (", meaning, ") at dimension ", dim,
            ", got shape ", shape_of(tensor));
  }
}

inline void check_same_device(const char* argument, const Tensor& tensor, const Tensor& q) {
  if (tensor.is_cuda() != q.is_cuda() || tensor.get_device_index() != q.get_device_index()) {
    invalid(argument, "must be on the device of the first argument");
  }
}

inline void check_last_contiguous(const char* argument, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) > 1 && tensor.stride(last) != 1) {
    invalid(argument, "the last dimension must be contiguous, got stride ", tensor.stride(last));
  }
}

// Kernels move rows in 16-byte pieces.
inline void check_aligned_rows(const char* argument, const Tensor& tensor) {
  constexpr int64_t kAlignment = 16;
  check_last_contiguous(argument, tensor);
  if (tensor.numel() == 0) return;
  const int64_t element = tensor.element_size();
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment != 0) {
    invalid(argument, "data must start at a multiple of 16 bytes (a slice with an odd offset?)");
  }
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) {
    if (tensor.size(i) > 1 && tensor.stride(i) * element % kAlignment != 0) {
      invalid(argument, "rows must be multiples of 16 bytes apart, got stride ", tensor.stride(i),
              " elements of ", element, " bytes at dimension ", i);
    }
  }
}

inline void check_cu_seqlens(const char* name, const Tensor& cu_seqlens, const Tensor& q) {
  check_dim(name, cu_seqlens, 1, "[batch + 1]");
  check_dtype(name, cu_seqlens, ScalarType::Int);
  check_same_device(name, cu_seqlens, q);
  check_last_contiguous(name, cu_seqlens);
  if (cu_seqlens.size(0) < 1)
    invalid(name, "expected [batch + 1] offsets, got shape ", shape_of(cu_seqlens));
}

// Where an op takes float32, as the text of a refusal.
constexpr const char* kEverywhere = "";
constexpr const char* kOnCpuOnly = " (CPU only)";

inline DType element_dtype(const char* argument, const Tensor& tensor,
                           const char* float32_where = kEverywhere) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default:
      throw Unsupported(std::string(argument) + " has dtype " + dtype_of(tensor) +
                        "; supported: float32" + float32_where + ", float16, bfloat16");
  }
}

inline Mask make_mask(bool causal, int64_t window_left, int64_t window_right) {
  if (window_left < kUnbounded || window_right < kUnbounded) {
    invalid("window", "sides must be >= 0, or -1 for no limit, got (", window_left, ", ",
            window_right, ")");
  }
  return {causal, window_left, window_right};
}

// block_q and skip_block.
inline int32_t check_block(const char* argument, int64_t block) {
  if (block != 64 && block != 128) invalid(argument, "expected 64 or 128, got ", block);
  return static_cast<int32_t>(block);
}

inline int32_t check_block_k(int64_t block) {
  if (block != 16 && block != 32 && block != 64 && block != 128) {
    invalid("block_k", "expected 16, 32, 64 or 128, got ", block);
  }
  return static_cast<int32_t>(block);
}

inline ScaleRows check_scale_rows(int64_t scale_rows) {
  if (scale_rows < 0 || scale_rows > static_cast<int64_t>(ScaleRows::kKeyQuads))
    invalid("scale_rows", "expected 0, 1 or 2, got ", scale_rows);
  return static_cast<ScaleRows>(scale_rows);
}

inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            int32_t dtype, const Tensor& like) {
  AtenTensorHandle handle = nullptr;
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return empty_strided(sizes, strides, dtype, like);
}

inline int32_t raw_dtype(const Tensor& tensor) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

}  // namespace attnsieve::binding
