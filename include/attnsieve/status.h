// Errors of the torch-free library. The binding layer lets them pass: torch maps
// std::invalid_argument to ValueError, and python/attnsieve/ops.py maps Unsupported (by its prefix)
// to NotImplementedError.
#pragma once

#include <stdexcept>
#include <string>

namespace attnsieve {

// The caller passed something malformed. The text names the argument, what it got and what it
// wanted.
struct InvalidArgument : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The request is well formed but no compiled kernel serves it. The text prints the supported set.
struct Unsupported : std::runtime_error {
  static constexpr const char* kPrefix = "attnsieve unsupported: ";
  explicit Unsupported(const std::string& what) : std::runtime_error(kPrefix + what) {}
};

// The CUDA runtime refused a launch or reported an earlier fault.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace attnsieve
