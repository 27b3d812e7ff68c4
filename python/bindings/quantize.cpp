// quantize_blocks: checks, outputs, tensors -> QuantizeProblem.
#include "attnsieve/capability.h"
#include "python/bindings/backend.h"
#include "python/bindings/layout.h"
#include "python/bindings/ops.h"

namespace attnsieve::binding {
std::tuple<Tensor, Tensor, Tensor> quantize_blocks(const Tensor& x,
                                                   const std::optional<Tensor>& cu_seqlens,
                                                   int64_t bits, int64_t scale_rows,
                                                   int64_t block_rows, bool smooth,
                                                   const std::optional<Tensor>& smoothed) {
  const bool packed = cu_seqlens.has_value();
  check_dim("x", x, packed ? 3 : 4,
            packed ? "[tokens, heads, head_dim]" : "[batch, heads, rows, head_dim]");
  check_aligned_rows("x", x);
  if (packed) check_cu_seqlens("cu_seqlens", *cu_seqlens, x);
  if (block_rows < 1 || block_rows > kMaxScaleRows)
    invalid("block_rows", "expected a power of two up to 128, got ", block_rows);

  const Dims dims = packed ? kVarlen : kBatched;
  QuantizeProblem problem;
  problem.dtype = element_dtype("x", x);
  problem.batch = packed ? cu_seqlens->size(0) - 1 : x.size(0);
  problem.num_heads = x.size(1);
  problem.seqlen = x.size(dims.row);
  problem.head_dim = x.size(dims.last);
  problem.bits = static_cast<int32_t>(bits);
  problem.scale_rows = check_scale_rows(scale_rows);
  problem.block_rows = static_cast<int32_t>(block_rows);
  problem.x = head_tensor(x, dims);
  if (packed) problem.cu_seqlens = cu_seqlens->const_data_ptr<int32_t>();
  require_supported("quantize_blocks", x.is_cuda() ? Backend::kSm80 : Backend::kCpu, problem.dtype,
                    problem.head_dim);
  check_quantize(problem);
  if (smoothed.has_value()) {
    check_dim("smoothed", *smoothed, static_cast<int64_t>(x.dim()), "like x");
    for (int64_t dim = 0; dim < static_cast<int64_t>(x.dim()); ++dim)
      check_size("smoothed", *smoothed, dim, x.size(dim), "as x");
    check_dtype("smoothed", *smoothed, x.scalar_type());
    check_same_device("smoothed", *smoothed, x);
    check_aligned_rows("smoothed", *smoothed);
    problem.smoothed = head_tensor(*smoothed, dims);
  }

  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  if (bits == 4) sizes.back() /= 2;
  const Tensor codes =
      empty(sizes, bits == 4 ? aoti_torch_dtype_uint8() : aoti_torch_dtype_int8(), x);
  const Tensor scales =
      packed ? empty({problem.num_heads, problem.num_scales()}, aoti_torch_dtype_float32(), x)
             : empty({problem.batch, problem.num_heads, problem.num_scales()},
                     aoti_torch_dtype_float32(), x);
  const std::vector<int64_t> mean_sizes = {problem.batch, problem.num_heads, problem.head_dim};
  const Tensor mean =
      empty(smooth ? mean_sizes : std::vector<int64_t>{0}, aoti_torch_dtype_float32(), x);
  problem.codes = head_tensor(codes, dims);
  problem.scales = scales.mutable_data_ptr<float>();
  if (smooth) problem.mean = mean.mutable_data_ptr<float>();
  std::optional<Tensor> workspace;
  if (x.is_cuda()) {
    const size_t bytes = cuda::quantize_workspace_bytes(problem);
    if (bytes > 0) {
      workspace = empty({static_cast<int64_t>(bytes)}, aoti_torch_dtype_uint8(), x);
      problem.workspace = workspace->mutable_data_ptr();
    }
  }
  run<QuantizeProblem>(x, problem, cpu::quantize_blocks, cuda::quantize_blocks);
  return {codes, scales, mean};
}

}  // namespace attnsieve::binding
