# Finds the pinned CUTLASS/CuTe headers: -DCUTLASS_DIR=<dir with include/>, or the package nvidia-cutlass==4.2.0.0.
# Nothing is vendored.
if(NOT CUTLASS_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0] + '/source')"
    OUTPUT_VARIABLE CUTLASS_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
if(NOT EXISTS "${CUTLASS_DIR}/include/cute/tensor.hpp")
  message(FATAL_ERROR "CuTe headers not found: pip install --no-deps nvidia-cutlass==4.2.0.0, or set CUTLASS_DIR")
endif()
add_library(cutlass_headers INTERFACE)
target_include_directories(cutlass_headers SYSTEM INTERFACE "${CUTLASS_DIR}/include")
# Their host half includes libcu++ (cuda/std/...). nvcc knows where it lies and CMake 4 reports that folder; with an older
# CMake a host compiler has to be told (CUDA 13 moved it to include/cccl).
find_path(CCCL_INCLUDE_DIR cuda/std/utility HINTS ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} PATH_SUFFIXES cccl REQUIRED)
target_include_directories(cutlass_headers SYSTEM INTERFACE $<$<COMPILE_LANGUAGE:CXX>:${CCCL_INCLUDE_DIR}>)
