// The packer on NVIDIA GPUs, for Python. Knows addresses and a stream, and nothing of torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/pack.h"

namespace py = pybind11;
using namespace nanotron_fast;

namespace {

void launch_inline_binding(const py::bytes& items, int64_t num_tiles, int device,
                           uintptr_t stream) {
  const std::string_view bytes = items;
  const size_t num_items = bytes.size() / sizeof(TileItem);
  if (bytes.size() % sizeof(TileItem) != 0 || num_items > kMaxInlineItems) {
    throw std::invalid_argument(std::to_string(bytes.size()) + " bytes are not up to " +
                                std::to_string(kMaxInlineItems) + " items of " +
                                std::to_string(sizeof(TileItem)));
  }
  std::vector<TileItem> aligned(num_items);
  if (num_items > 0) std::memcpy(aligned.data(), bytes.data(), bytes.size());
  const py::gil_scoped_release release;
  launch_inline(aligned.data(), static_cast<int32_t>(num_items), num_tiles, device, stream);
}

void launch_binding(uintptr_t items, int32_t num_items, int64_t num_tiles, int device,
                    uintptr_t stream) {
  const py::gil_scoped_release release;
  launch(reinterpret_cast<const TileItem*>(items), num_items, num_tiles, device, stream);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The packer on NVIDIA GPUs. nanotron_fast/kernels/pack.py is the way to call it.";
  module.attr("ARCHITECTURES") = py::tuple(py::cast(architectures()));
  module.attr("MAX_INLINE_ITEMS") = kMaxInlineItems;
  module.def("launch_inline", &launch_inline_binding, py::arg("items"), py::kw_only(),
             py::arg("num_tiles"), py::arg("device"), py::arg("stream"));
  module.def("launch", &launch_binding, py::arg("items"), py::kw_only(), py::arg("num_items"),
             py::arg("num_tiles"), py::arg("device"), py::arg("stream"));
  module.def("problem_of", &problem_of, py::arg("device"));
}
