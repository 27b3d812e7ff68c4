// Command line of the attend bench.
#pragma once

#include <string>
#include <vector>

#include "bench_case.h"

namespace attnsieve::bench {

struct BenchOptions {
  std::vector<BenchCase> cases;  // the product of all lists on the command line
  int iterations = 20;
  bool verify = false;
  bool cpu = false;
  bool help = false;
  std::string json_path;
};

extern const char* const kUsage;

// Throws InvalidArgument that names the option.
BenchOptions parse_options(int argc, char** argv);

}  // namespace attnsieve::bench
