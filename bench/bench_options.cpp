#include "bench_options.h"

#include <cmath>
#include <cstdlib>

#include "attnsieve/status.h"

namespace attnsieve::bench {

const char* const kUsage =
    R"(usage: bench_attend [options]      LIST = one value or several, comma separated

  --seqlen-k LIST     keys (default 8192)
  --seqlen-q N        query rows (default: as many as keys)
  --batch N           (default 1)
  --heads N           query heads (default 16)
  --kv-heads N        key/value heads (default: as many as query heads)
  --head-dim LIST     (default 128)
  --dtype NAME        bf16, fp16, or fp32 with --cpu (default bf16)
  --block-q LIST      64 or 128 query rows share a list (default 128)
  --block-k LIST      16, 32, 64 or 128 keys per listed block (default 128)
  --density LIST      share of a row's visible blocks in its list, (0, 1] (default 1)
  --index             use lists at density 1 too; without it density 1 runs without an index
  --causal            bottom-right causal mask
  --threshold LAMBDA  skip tiles by the online-softmax rule
  --iterations N      timed runs per case, the median counts (default 20)
  --verify            compare sampled rows with a double-precision reference
  --json FILE         write the results as a JSON list
  --cpu               run the CPU backend

Exit status: 0, 1 where verification failed, 2 for a wrong call or an error.
)";

namespace {

[[noreturn]] void refuse(const std::string& name, const std::string& text, const char* wanted) {
  throw InvalidArgument(name + ": expected " + wanted + ", got '" + text + "'");
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t comma = text.find(','); comma != std::string::npos; comma = text.find(',', begin)) {
    parts.push_back(text.substr(begin, comma - begin));
    begin = comma + 1;
  }
  parts.push_back(text.substr(begin));
  return parts;
}

int64_t positive(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  constexpr long long kLargest = 1LL << 30;
  if (text.empty() || *end != '\0' || value < 1 || value > kLargest)
    refuse(name, text, "a positive integer");
  return value;
}

double real(const std::string& name, const std::string& text, const char* wanted) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !std::isfinite(value)) refuse(name, text, wanted);
  return value;
}

std::vector<int64_t> positives(const std::string& name, const std::string& text) {
  std::vector<int64_t> values;
  for (const std::string& part : split(text)) values.push_back(positive(name, part));
  return values;
}

std::vector<int64_t> block_sizes(const std::string& name, const std::string& text,
                                 int64_t smallest) {
  const std::vector<int64_t> values = positives(name, text);
  for (int64_t value : values) {
    if (value < smallest || value > 128 || (value & (value - 1)) != 0) {
      refuse(name, text, smallest == 64 ? "64 or 128" : "16, 32, 64 or 128");
    }
  }
  return values;
}

std::vector<double> densities(const std::string& name, const std::string& text) {
  std::vector<double> values;
  for (const std::string& part : split(text)) {
    values.push_back(real(name, part, "a number in (0, 1]"));
    if (values.back() <= 0.0 || values.back() > 1.0) refuse(name, part, "a number in (0, 1]");
  }
  return values;
}

DType dtype_of(const std::string& name, const std::string& text) {
  if (text == "bf16") return DType::kBFloat16;
  if (text == "fp16") return DType::kFloat16;
  if (text == "fp32") return DType::kFloat32;
  refuse(name, text, "bf16, fp16 or fp32");
}

}  // namespace

BenchOptions parse_options(int argc, char** argv) {
  BenchOptions options;
  BenchCase base;
  bool indexed = false;
  int64_t kv_heads = 0;
  std::vector<int64_t> seqlens_k = {8192}, head_dims = {128}, blocks_q = {128}, blocks_k = {128};
  std::vector<double> kept = {1.0};
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&]() -> std::string {
      if (++i >= argc) throw InvalidArgument(name + ": a value is missing");
      return argv[i];
    };
    if (name == "--seqlen-k")
      seqlens_k = positives(name, value());
    else if (name == "--seqlen-q")
      base.seqlen_q = positive(name, value());
    else if (name == "--batch")
      base.batch = positive(name, value());
    else if (name == "--heads")
      base.num_heads = positive(name, value());
    else if (name == "--kv-heads")
      kv_heads = positive(name, value());
    else if (name == "--head-dim")
      head_dims = positives(name, value());
    else if (name == "--dtype")
      base.dtype = dtype_of(name, value());
    else if (name == "--block-q")
      blocks_q = block_sizes(name, value(), 64);
    else if (name == "--block-k")
      blocks_k = block_sizes(name, value(), 16);
    else if (name == "--density")
      kept = densities(name, value());
    else if (name == "--index")
      indexed = true;
    else if (name == "--causal")
      base.causal = true;
    else if (name == "--threshold") {
      base.threshold = static_cast<float>(real(name, value(), "a number >= 0"));
      if (*base.threshold < 0.0f) refuse(name, argv[i], "a number >= 0");
    } else if (name == "--iterations") {
      options.iterations = static_cast<int>(positive(name, value()));
    } else if (name == "--verify")
      options.verify = true;
    else if (name == "--json")
      options.json_path = value();
    else if (name == "--cpu")
      options.cpu = true;
    else if (name == "--help" || name == "-h")
      options.help = true;
    else
      throw InvalidArgument("unknown option " + name);
  }
  base.num_kv_heads = kv_heads > 0 ? kv_heads : base.num_heads;
  if (base.num_heads % base.num_kv_heads != 0)
    throw InvalidArgument("--heads: must be a multiple of --kv-heads");
  for (int64_t head_dim : head_dims) {
    for (int64_t seqlen_k : seqlens_k) {
      for (int64_t block_q : blocks_q) {
        for (int64_t block_k : blocks_k) {
          for (double density : kept) {
            BenchCase c = base;
            c.head_dim = head_dim;
            c.seqlen_k = seqlen_k;
            if (c.seqlen_q == 0) c.seqlen_q = seqlen_k;
            c.block_q = static_cast<int32_t>(block_q);
            c.block_k = static_cast<int32_t>(block_k);
            c.density = density;
            c.indexed = indexed || density < 1.0;
            // Without an index the block sizes mean nothing: one case is enough.
            const bool first = block_q == blocks_q.front() && block_k == blocks_k.front();
            if (c.indexed || first) options.cases.push_back(c);
          }
        }
      }
    }
  }
  return options;
}

}  // namespace attnsieve::bench
