// What was compiled: one entry per kernel, for attnsieve.kernel_attributes() and the doctor.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace attnsieve {

struct KernelEntry {
  std::string name;
  const void* function = nullptr;
  int threads = 0;
  size_t shared_bytes = 0;
};

namespace cuda {
// Names are "<op> <arch> <dtype> hd<head_dim> <variant>".
std::vector<KernelEntry> kernel_table();
}  // namespace cuda

}  // namespace attnsieve
