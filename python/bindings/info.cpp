// The _C module: build info, compiled kernels and their attributes. Tensors never pass through it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "python/bindings/build_info.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &attnsieve::build_info);
  m.def("kernel_names", &attnsieve::kernel_names);
  m.def("kernel_attributes", [] {
    py::list rows;
    for (const auto& row : attnsieve::kernel_attributes()) {
      py::dict entry;
      entry["name"] = row.name;
      entry["threads"] = row.threads;
      entry["registers"] = row.registers;
      entry["local_bytes"] = row.local_bytes;
      entry["static_shared_bytes"] = row.static_shared_bytes;
      entry["dynamic_shared_bytes"] = row.dynamic_shared_bytes;
      entry["ctas_per_sm"] = row.ctas_per_sm;
      rows.append(entry);
    }
    return rows;
  });
  m.def("capabilities", [] {
    py::list rows;
    for (const auto& row : attnsieve::capability_rows()) {
      py::dict entry;
      entry["op"] = row.op;
      entry["backend"] = row.backend;
      entry["supported"] = row.supported;
      entry["features"] = row.features;
      rows.append(entry);
    }
    return rows;
  });
}
