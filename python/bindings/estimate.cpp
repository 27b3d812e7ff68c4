// estimate_block_scores: checks, tensors -> EstimateProblem.
#include "attnsieve/capability.h"
#include "python/bindings/backend.h"
#include "python/bindings/layout.h"
#include "python/bindings/ops.h"

namespace attnsieve::binding {
namespace {

// `name` is q or k: its codes, scales and layout. `batch`: of packed sequences, else -1.
CodedRows coded_rows(const std::string& name, const Tensor& codes, const Tensor& scales,
                     int64_t scale_rows, int64_t block_rows, int64_t batch) {
  const std::string codes_name = name + "_codes";
  const std::string scales_name = name + "_scales";
  const bool packed = batch >= 0;
  check_dim(codes_name.c_str(), codes, packed ? 3 : 4,
            packed ? "[tokens, heads, head_dim]" : "[batch, heads, rows, head_dim]");
  check_aligned_rows(codes_name.c_str(), codes);
  CodedRows rows;
  rows.bits = codes.scalar_type() == ScalarType::Byte ? 4 : 8;
  if (rows.bits == 8) check_dtype(codes_name.c_str(), codes, ScalarType::Char);
  const Dims dims = packed ? kVarlen : kBatched;
  rows.codes = head_tensor(codes, dims);
  rows.scale_rows = check_scale_rows(scale_rows);
  if (block_rows < 1 || block_rows > kMaxScaleRows)
    invalid((name + "_block_rows").c_str(), "expected a power of two up to 128, got ", block_rows);
  rows.block_rows = static_cast<int32_t>(block_rows);
  const ScaleLayout layout = rows.layout();
  const int64_t total = codes.size(dims.row);
  rows.num_scales = (packed ? packed_chunks(batch, total, layout.rows)
                            : (total + layout.rows - 1) / layout.rows) *
                    layout.scales;
  check_dim(scales_name.c_str(), scales, packed ? 2 : 3,
            packed ? "[heads, scales]" : "[batch, heads, scales]");
  check_dtype(scales_name.c_str(), scales, ScalarType::Float);
  check_same_device(scales_name.c_str(), scales, codes);
  if (!packed) check_size(scales_name.c_str(), scales, 0, codes.size(0), "batch");
  check_size(scales_name.c_str(), scales, scales.dim() - 2, codes.size(dims.head), "heads");
  check_size(scales_name.c_str(), scales, scales.dim() - 1, rows.num_scales, "scales of the rows");
  if (!scales.is_contiguous()) invalid(scales_name.c_str(), "must be contiguous");
  rows.scales = scales.const_data_ptr<float>();
  return rows;
}

int64_t code_dim(const Tensor& codes) {
  return codes.size(codes.dim() - 1) * (codes.scalar_type() == ScalarType::Byte ? 2 : 1);
}

}  // namespace

Tensor estimate_block_scores(const Tensor& q_codes, const Tensor& q_scales, int64_t q_scale_rows,
                             int64_t q_block_rows, const Tensor& k_codes, const Tensor& k_scales,
                             int64_t k_scale_rows, int64_t k_block_rows,
                             const std::optional<Tensor>& threshold,
                             const std::optional<Tensor>& cu_seqlens_q,
                             const std::optional<Tensor>& cu_seqlens_k, int64_t seqlen_q,
                             int64_t seqlen_k, int64_t block_q, int64_t block_k, int64_t row_stride,
                             int64_t key_pool, bool sum, bool bits, double softmax_scale,
                             bool causal, int64_t window_left, int64_t window_right) {
  const bool packed = cu_seqlens_q.has_value();
  if (packed != cu_seqlens_k.has_value())
    invalid(packed ? "cu_seqlens_k" : "cu_seqlens_q", "both must be given, or neither");
  if (packed) {
    check_cu_seqlens("cu_seqlens_q", *cu_seqlens_q, q_codes);
    check_cu_seqlens("cu_seqlens_k", *cu_seqlens_k, q_codes);
    check_size("cu_seqlens_k", *cu_seqlens_k, 0, cu_seqlens_q->size(0), "length of cu_seqlens_q");
  }
  const int64_t batch = packed ? cu_seqlens_q->size(0) - 1 : -1;
  const Dims dims = packed ? kVarlen : kBatched;
  EstimateProblem problem;
  problem.q = coded_rows("q", q_codes, q_scales, q_scale_rows, q_block_rows, batch);
  problem.k = coded_rows("k", k_codes, k_scales, k_scale_rows, k_block_rows, batch);
  check_same_device("k_codes", k_codes, q_codes);
  if (!packed) check_size("k_codes", k_codes, 0, q_codes.size(0), "batch");
  problem.batch = packed ? batch : q_codes.size(0);
  problem.num_heads = q_codes.size(dims.head);
  problem.num_kv_heads = k_codes.size(dims.head);
  problem.total_q = q_codes.size(dims.row);
  problem.total_k = k_codes.size(dims.row);
  problem.seqlen_q = seqlen_q;
  problem.seqlen_k = seqlen_k;
  problem.head_dim = code_dim(q_codes);
  if (code_dim(k_codes) != problem.head_dim)
    invalid("k_codes", "expected head_dim ", problem.head_dim, ", got ", code_dim(k_codes));
  if (problem.num_kv_heads == 0 || problem.num_heads % problem.num_kv_heads != 0) {
    invalid("q_codes", "the number of heads must be a multiple of k_codes' ", problem.num_kv_heads,
            ", got ", problem.num_heads);
  }
  problem.block_q = check_block("block_q", block_q);
  problem.block_k = check_block_k(block_k);
  problem.row_stride = static_cast<int32_t>(row_stride);
  problem.key_pool = static_cast<int32_t>(key_pool);
  problem.reduce = sum ? EstimateReduce::kSum : EstimateReduce::kMax;
  if (packed) {
    problem.varlen = {cu_seqlens_q->const_data_ptr<int32_t>(),
                      cu_seqlens_k->const_data_ptr<int32_t>()};
  }
  if (!(softmax_scale > 0)) invalid("softmax_scale", "must be positive, got ", softmax_scale);
  problem.softmax_scale = static_cast<float>(softmax_scale);
  problem.mask = make_mask(causal, window_left, window_right);
  if (threshold) {
    check_dim("threshold", *threshold, packed ? 2 : 3,
              packed ? "[tokens, heads]" : "[batch, heads, query rows]");
    check_dtype("threshold", *threshold, ScalarType::Float);
    check_same_device("threshold", *threshold, q_codes);
    for (int64_t dim = 0; dim < threshold->dim(); ++dim)
      check_size("threshold", *threshold, dim, q_codes.size(dim), "as q_codes");
    problem.threshold = {const_cast<float*>(threshold->const_data_ptr<float>()),
                         packed ? 0 : threshold->stride(0), threshold->stride(1),
                         threshold->stride(packed ? 0 : 2)};
  }
  require_supported("estimate_block_scores", q_codes.is_cuda() ? Backend::kSm80 : Backend::kCpu,
                    DType::kFloat32, problem.head_dim);
  if (seqlen_q < 0 || seqlen_k < 0)
    invalid("seqlen_q, seqlen_k", "expected numbers >= 0, got ", seqlen_q, " and ", seqlen_k);
  if (key_pool < 1) invalid("key_pool", "expected 1, 2, 4 or 8, got ", key_pool);
  if (!packed) {
    check_size("q_codes", q_codes, 2, seqlen_q, "seqlen_q");
    check_size("k_codes", k_codes, 2, problem.num_keys(), "ceil(seqlen_k / key_pool)");
  }

  const int64_t columns = bits ? (problem.num_k_blocks() + 31) / 32 : problem.num_k_blocks();
  const Tensor out = empty({problem.batch, problem.num_heads, problem.num_q_blocks(), columns},
                           bits ? aoti_torch_dtype_int32() : aoti_torch_dtype_float32(), q_codes);
  if (bits) {
    problem.bits = reinterpret_cast<uint32_t*>(out.mutable_data_ptr<int32_t>());
  } else {
    problem.scores = out.mutable_data_ptr<float>();
  }
  check_estimate(problem);
  run<EstimateProblem>(q_codes, problem, cpu::estimate_block_scores, cuda::estimate_block_scores);
  return out;
}

}  // namespace attnsieve::binding
