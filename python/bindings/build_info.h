// Facts about the compiled library, exported from libattnsieve.so for the _C module.
#pragma once

#include <map>
#include <string>
#include <vector>

#define ATTNSIEVE_EXPORT __attribute__((visibility("default")))

namespace attnsieve {

// version, kernel_hash, compiler, cuda ("" without), archs, head_dims, torch_target.
ATTNSIEVE_EXPORT std::map<std::string, std::string> build_info();

struct KernelAttributes {
  std::string name;
  int threads;
  int registers;
  int local_bytes;
  int static_shared_bytes;
  int dynamic_shared_bytes;
  int ctas_per_sm;
};

// Names of all compiled CUDA kernels; works without a GPU.
ATTNSIEVE_EXPORT std::vector<std::string> kernel_names();

// Attributes of every kernel on the current CUDA device. Throws without one.
ATTNSIEVE_EXPORT std::vector<KernelAttributes> kernel_attributes();

struct CapabilityRow {
  std::string op;
  std::string backend;
  std::string supported;
  std::string features;
};

ATTNSIEVE_EXPORT std::vector<CapabilityRow> capability_rows();

}  // namespace attnsieve
