#include "cuda/dispatch/tensor_map.h"

#include <algorithm>
#include <string>

#include "cuda/common/cuda_check.h"

namespace attnsieve::cuda {
namespace {

// The driver's encoder, reached through the runtime so that the library links no libcuda.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000,
                                                cudaEnableDefault, &found),
               "cuTensorMapEncodeTiled");
    if (pointer == nullptr) throw CudaError("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(pointer);
  }();
  return function;
}

CUtensorMapSwizzle swizzle_of(int row_bytes) {
  if (row_bytes == 128) return CU_TENSOR_MAP_SWIZZLE_128B;
  return row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B;
}

CUtensorMap encode(const void* data, CUtensorMapDataType type, int element_bytes,
                   const TensorMapShape& shape) {
  cuuint64_t sizes[5];
  cuuint64_t strides[4];
  cuuint32_t box[5];
  cuuint32_t steps[5];
  for (int i = 0; i < shape.rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(std::max<int64_t>(shape.sizes[i], 1));
    box[i] = static_cast<cuuint32_t>(shape.box[i]);
    steps[i] = 1;
    // The stride of a dimension of size 1 is never used; it may be anything in a torch tensor.
    if (i > 0) {
      strides[i - 1] =
          sizes[i] == 1 ? 16 : static_cast<cuuint64_t>(shape.strides[i]) * element_bytes;
    }
  }
  CUtensorMap map;
  const CUresult status = encoder()(
      &map, type, static_cast<cuuint32_t>(shape.rank), const_cast<void*>(data), sizes, strides, box,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(shape.box[0] * element_bytes),
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    std::string text = "cuTensorMapEncodeTiled: error " + std::to_string(status) + " for";
    for (int i = 0; i < shape.rank; ++i) {
      text += " " + std::to_string(shape.sizes[i]) + ":" + std::to_string(shape.strides[i]) + "/" +
              std::to_string(shape.box[i]);
    }
    throw CudaError(text);
  }
  return map;
}

}  // namespace

CUtensorMap make_tensor_map(const void* data, DType dtype, const TensorMapShape& shape) {
  const auto type =
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode(data, type, 2, shape);
}

CUtensorMap make_byte_map(const void* data, const TensorMapShape& shape) {
  return encode(data, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, shape);
}

}  // namespace attnsieve::cuda
