// bench_attend: times attend without torch, for Nsight, compute-sanitizer and the results files.
//   bench_attend --seqlen-k 32768 --block-q 64 --block-k 64 --density 0.1,0.25 --verify
// TF counts the kept (query, key) pairs: 4 * head_dim * pairs / time. With --threshold the pairs
// are scaled by the share of tiles that were not skipped.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <exception>
#include <fstream>
#include <nvtx3/nvtx3.hpp>
#include <thread>

#include "attnsieve/launch.h"
#include "bench_options.h"
#include "bench_verify.h"
#include "cuda/common/cuda_check.h"
#include "kernels.h"

using namespace attnsieve;
using namespace attnsieve::bench;

namespace {

constexpr int kWarmUpRuns = 3;

struct NvtxDomain {
  static constexpr const char* name = "attnsieve";
};
using NvtxRange = nvtx3::scoped_range_in<NvtxDomain>;

class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes) : bytes_(bytes) {
    if (bytes > 0) check_cuda(cudaMalloc(&data_, bytes), "cudaMalloc");
  }
  template <class T>
  explicit DeviceBuffer(const std::vector<T>& host) : DeviceBuffer(host.size() * sizeof(T)) {
    if (bytes_ == 0) return;
    check_cuda(cudaMemcpy(data_, host.data(), bytes_, cudaMemcpyHostToDevice), "upload");
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  // A destructor has nobody to tell; an earlier fault has been thrown already.
  ~DeviceBuffer() { static_cast<void>(cudaFree(data_)); }

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  template <class T>
  void download(std::vector<T>& host) const {
    if (bytes_ == 0) return;
    check_cuda(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost), "download");
  }
  void clear(cudaStream_t stream) const {
    if (bytes_ == 0) return;
    check_cuda(cudaMemsetAsync(data_, 0, bytes_, stream), "cudaMemsetAsync");
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

class Event {
 public:
  Event() { check_cuda(cudaEventCreate(&event_), "cudaEventCreate"); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() { static_cast<void>(cudaEventDestroy(event_)); }

  void record(cudaStream_t stream) const {
    check_cuda(cudaEventRecord(event_, stream), "cudaEventRecord");
  }
  double milliseconds_since(const Event& begin) const {
    check_cuda(cudaEventSynchronize(event_), "attend");
    float elapsed = 0.0f;
    check_cuda(cudaEventElapsedTime(&elapsed, begin.event_, event_), "cudaEventElapsedTime");
    return elapsed;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

struct Stream {
  Stream() { check_cuda(cudaStreamCreate(&stream), "cudaStreamCreate"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { static_cast<void>(cudaStreamDestroy(stream)); }
  cudaStream_t stream = nullptr;
};

// What one case leaves on the host.
struct Outcome {
  double milliseconds = 0.0;  // median
  std::vector<uint8_t> out;
  std::vector<float> lse;
  std::vector<int64_t> counters;  // (skipped, total) per head; empty without a threshold

  Outcome(const BenchCase& c, const BenchInputs& inputs)
      : out(inputs.q.size()),
        lse(c.batch * c.num_heads * c.seqlen_q),
        counters(c.threshold ? 2 * c.batch * c.num_heads : 0) {}

  double share_of_tiles() const {
    double skipped = 0.0, total = 0.0;
    for (size_t i = 0; i + 1 < counters.size(); i += 2) {
      skipped += static_cast<double>(counters[i]);
      total += static_cast<double>(counters[i + 1]);
    }
    return total > 0.0 ? 1.0 - skipped / total : 1.0;
  }
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  if (values.size() % 2 == 1) return values[middle];
  return 0.5 * (values[middle - 1] + values[middle]);
}

int l2_bytes() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device),
             "cudaDeviceGetAttribute");
  return bytes;
}

Outcome run_cuda(const BenchCase& c, const BenchInputs& inputs, int iterations) {
  Outcome outcome(c, inputs);
  const DeviceBuffer q(inputs.q), k(inputs.k), v(inputs.v), counts(inputs.counts),
      columns(inputs.columns), out(outcome.out), lse(outcome.lse), counters(outcome.counters);
  const DeviceBuffer flush(2 * static_cast<size_t>(l2_bytes()));
  const AttendProblem problem =
      make_problem(c, inputs,
                   {q.as<void>(), k.as<void>(), v.as<void>(), out.as<void>(), lse.as<float>(),
                    counts.as<int32_t>(), columns.as<int32_t>(), counters.as<int64_t>()});
  const Stream stream;
  {
    const NvtxRange range("warm-up");
    for (int i = 0; i < kWarmUpRuns; ++i) cuda::attend(problem, stream.stream);
    check_cuda(cudaStreamSynchronize(stream.stream), "attend");
  }
  const NvtxRange range(c.name());
  const Event begin, end;
  std::vector<double> times;
  for (int i = 0; i < iterations; ++i) {
    flush.clear(stream.stream);
    begin.record(stream.stream);
    {
      const NvtxRange call("attend");
      cuda::attend(problem, stream.stream);
    }
    end.record(stream.stream);
    times.push_back(end.milliseconds_since(begin));
  }
  outcome.milliseconds = median(times);
  out.download(outcome.out);
  lse.download(outcome.lse);
  counters.download(outcome.counters);
  return outcome;
}

void run_threads(int64_t items, ParallelFor::Body body, void* context) {
  const int64_t count = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (int64_t t = 1; t < count; ++t)
    threads.emplace_back([=] { body(context, items * t / count, items * (t + 1) / count); });
  body(context, 0, items / count);
  for (std::thread& thread : threads) thread.join();
}

Outcome run_cpu(const BenchCase& c, BenchInputs& inputs, int iterations) {
  Outcome outcome(c, inputs);
  const AttendProblem problem = make_problem(
      c, inputs,
      {inputs.q.data(), inputs.k.data(), inputs.v.data(), outcome.out.data(), outcome.lse.data(),
       inputs.counts.data(), inputs.columns.data(), outcome.counters.data()});
  const ParallelFor parallel_for{run_threads};
  cpu::attend(problem, parallel_for);
  const NvtxRange range(c.name());
  std::vector<double> times;
  for (int i = 0; i < iterations; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    cpu::attend(problem, parallel_for);
    const std::chrono::duration<double, std::milli> elapsed =
        std::chrono::steady_clock::now() - begin;
    times.push_back(elapsed.count());
  }
  outcome.milliseconds = median(times);
  return outcome;
}

std::string device_name(bool cpu) {
  if (cpu) return "cpu";
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return properties.name;
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  char text[16];
  std::strftime(text, sizeof text, "%Y-%m-%d", std::gmtime(&now));
  return text;
}

std::string json_object(const BenchCase& c, const std::string& device, double milliseconds,
                        double tf, double density) {
  char numbers[128];
  std::snprintf(numbers, sizeof numbers,
                "\"ours_ms\": %.5g, \"peers\": {}, \"tf\": %.5g, \"density\": %.5g", milliseconds,
                tf, density);
  return "  {\"op\": \"attend\", \"case\": \"" + c.name() + "\", \"device\": \"" + device + "\", " +
         numbers + ", \"dtype\": \"" + dtype_name(c.dtype) + "\", \"shape\": " + c.shape() +
         ", \"date\": \"" + today() + "\", \"kernel_hash\": \"" ATTNSIEVE_KERNEL_HASH "\"}";
}

void write_json(const std::string& path, const std::vector<std::string>& objects) {
  std::ofstream file(path);
  file << "[\n";
  for (size_t i = 0; i < objects.size(); ++i)
    file << objects[i] << (i + 1 < objects.size() ? ",\n" : "\n");
  file << "]\n";
  file.close();
  if (!file) throw InvalidArgument("--json: cannot write " + path);
}

// Returns whether every verified case passed.
bool run(const BenchOptions& options) {
  const std::string device = device_name(options.cpu);
  std::printf("%-6s %-58s %10s %9s %9s %8s\n", "", device.c_str(), "ms", "TF", "density", "error");
  bool all_ok = true;
  std::vector<std::string> objects;
  for (const BenchCase& c : options.cases) {
    BenchInputs inputs = make_inputs(c);
    const Outcome outcome = options.cpu ? run_cpu(c, inputs, options.iterations)
                                        : run_cuda(c, inputs, options.iterations);
    const double pairs = inputs.kept_pairs * outcome.share_of_tiles();
    const double density = inputs.visible_pairs > 0.0 ? pairs / inputs.visible_pairs : 0.0;
    const double tf = 4.0 * static_cast<double>(c.head_dim) * pairs / (outcome.milliseconds * 1e9);
    const char* mark = "[--]";
    char error[16] = "";
    if (options.verify) {
      const Verification checked = verify(c, inputs, outcome.out, outcome.lse);
      mark = checked.ok() ? "[OK]" : "[FAIL]";
      all_ok = all_ok && checked.ok();
      // Share of the allowed error; 1 is the limit.
      std::snprintf(error, sizeof error, "%8.3f", std::max(checked.worst_out, checked.worst_lse));
    }
    std::printf("%-6s %-58s %10.4f %9.3f %9.4f %8s\n", mark, c.name().c_str(), outcome.milliseconds,
                tf, density, error);
    std::fflush(stdout);
    objects.push_back(json_object(c, device, outcome.milliseconds, tf, density));
  }
  if (!options.json_path.empty()) write_json(options.json_path, objects);
  return all_ok;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const BenchOptions options = parse_options(argc, argv);
    if (options.help) {
      std::printf("%s", kUsage);
      return 0;
    }
    return run(options) ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_attend: %s\n", error.what());
    return 2;
  }
}
