// cpu::attend with a given set of kernels, so that tests can run every set the machine has.
#pragma once

#include "attnsieve/launch.h"
#include "kernels.h"

namespace attnsieve::cpu {

void attend(const AttendProblem& problem, const ParallelFor& parallel_for, const Kernels& kernels);

}  // namespace attnsieve::cpu
