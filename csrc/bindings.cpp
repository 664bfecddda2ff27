// The only file that knows both Python and the engine.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cerrno>
#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cast/cast.h"
#include "core/blend.h"
#include "core/digest.h"
#include "core/engine.h"
#include "core/error.h"
#include "core/failure_point.h"
#include "core/pack.h"
#include "core/read.h"
#include "core/tiles.h"

namespace py = pybind11;
using namespace nanotron_fast;

namespace {

// A table of moves: any C-contiguous buffer of int64, flat or with a row for each move.
class Table {
 public:
  explicit Table(const py::buffer& buffer) : info_(buffer.request()) {
    const bool has_rows = info_.ndim == 2 && info_.shape[1] == Move::kNumColumns;
    const bool is_flat = info_.ndim == 1 && info_.size % Move::kNumColumns == 0;
    if (!info_.item_type_is_equivalent_to<int64_t>() || !(has_rows || is_flat) ||
        !PyBuffer_IsContiguous(info_.view(), 'C')) {
      throw PlanError("a table of moves is contiguous int64 with " +
                      std::to_string(Move::kNumColumns) + " columns");
    }
  }
  const int64_t* data() const { return static_cast<const int64_t*>(info_.ptr); }
  int64_t num_moves() const { return info_.size / Move::kNumColumns; }

 private:
  py::buffer_info info_;
};

// The scales of quantised sources: the same, or nothing.
class ScaleTable {
 public:
  explicit ScaleTable(const std::optional<py::buffer>& buffer) {
    if (!buffer) return;
    info_ = buffer->request();
    if (!info_.item_type_is_equivalent_to<int64_t>() || info_.size % Scales::kNumColumns != 0 ||
        !PyBuffer_IsContiguous(info_.view(), 'C')) {
      throw PlanError("a table of scales is contiguous int64 with " +
                      std::to_string(Scales::kNumColumns) + " columns");
    }
  }
  MoveTable with(const Table& moves) const {
    return {moves.data(), moves.num_moves(), static_cast<const int64_t*>(info_.ptr),
            info_.size / Scales::kNumColumns};
  }

 private:
  py::buffer_info info_;
};

// The columns of a row by the names of nanotron_fast/moves/row.py.
py::dict move_columns() {
  py::dict columns;
  columns["SOURCE"] = Column::kSource;
  columns["SOURCE_OFFSET"] = Column::kSourceOffset;
  columns["DESTINATION"] = Column::kDestination;
  columns["DESTINATION_OFFSET"] = Column::kDestinationOffset;
  columns["SIZES"] = Column::kSizes;
  columns["SOURCE_STRIDES"] = Column::kSourceStrides;
  columns["DESTINATION_STRIDES"] = Column::kDestinationStrides;
  columns["SOURCE_DTYPE"] = Column::kSourceDtype;
  columns["DESTINATION_DTYPE"] = Column::kDestinationDtype;
  columns["SCALES"] = Column::kScales;
  return columns;
}

// Where a tile item has what, by the names of kernels/pack/item.py: in units of int64, and behind
// the first of them, kind, in units of int32.
py::dict tile_columns() {
  constexpr auto kWide = sizeof(int64_t), kNarrow = sizeof(int32_t);
  py::dict columns;
  columns["SOURCE"] = offsetof(TileItem, source) / kWide;
  columns["DESTINATION"] = offsetof(TileItem, destination) / kWide;
  columns["SIZES"] = offsetof(TileItem, sizes) / kWide;
  columns["SOURCE_STRIDES"] = offsetof(TileItem, source_strides) / kWide;
  columns["DESTINATION_STRIDES"] = offsetof(TileItem, destination_strides) / kWide;
  columns["FIRST_TILE"] = offsetof(TileItem, first_tile) / kWide;
  columns["KIND"] = offsetof(TileItem, kind) / kNarrow;
  columns["SOURCE_DTYPE"] = offsetof(TileItem, source_dtype) / kNarrow;
  columns["DESTINATION_DTYPE"] = offsetof(TileItem, destination_dtype) / kNarrow;
  columns["WIDTH"] = offsetof(TileItem, width) / kNarrow;
  columns["TILE_MIDDLE"] = offsetof(TileItem, tile_middle) / kNarrow;
  columns["TILE_INNER"] = offsetof(TileItem, tile_inner) / kNarrow;
  columns["TILES_MIDDLE"] = offsetof(TileItem, tiles_middle) / kNarrow;
  columns["TILES_INNER"] = offsetof(TileItem, tiles_inner) / kNarrow;
  columns["NUM_COLUMNS"] = sizeof(TileItem) / kWide;
  return columns;
}

// (path, literals, size in bytes) of a file to be written; a literal is (offset, bytes).
using OutputTuple = std::tuple<std::string, std::vector<std::pair<int64_t, std::string>>, int64_t>;
// (path, what it must be: device, inode, bytes, mtime in ns; or None) of a file to be read.
using SourceTuple = std::tuple<std::string, std::optional<std::array<int64_t, 4>>>;

std::vector<SourceFile> sources_of(const std::vector<SourceTuple>& tuples) {
  std::vector<SourceFile> sources;
  for (const auto& [path, state] : tuples) {
    if (state) {
      sources.emplace_back(path, FileState{(*state)[0], (*state)[1], (*state)[2], (*state)[3]});
    } else {
      sources.emplace_back(path);
    }
  }
  return sources;
}

EngineOptions make_options(int num_workers, bool sync, const std::string& io = "buffered") {
  if (num_workers < 1) throw std::invalid_argument("workers must be at least 1");
  const IoMode mode = parse_io_mode(io);
  try {
    return {num_workers, sync, default_simd_level(), mode};
  } catch (const std::invalid_argument& error) {
    const py::object type = py::module_::import("nanotron_fast.errors").attr("ConfigError");
    PyErr_SetString(type.ptr(), (std::string("NANOTRON_FAST_SIMD: ") + error.what()).c_str());
    throw py::error_already_set();
  }
}

// (offset, size in bytes) of a range whose digest is wanted.
using RangeTuple = std::pair<int64_t, int64_t>;

std::string execute_binding(const std::vector<SourceTuple>& sources,
                            const std::pair<int, std::string>& root,
                            const std::vector<OutputTuple>& outputs, const py::buffer& moves,
                            int workers, bool fsync, Progress& progress, const std::string& io,
                            const std::vector<std::vector<RangeTuple>>& hashed,
                            const std::vector<size_t>& there,
                            const std::optional<py::buffer>& scales) {
  const Table table(moves);
  const ScaleTable scale_table(scales);
  std::vector<OutputFile> files;
  for (const auto& [path, literals, size_bytes] : outputs) {
    OutputFile& file = files.emplace_back(OutputFile{path, {}, size_bytes});
    for (const auto& [offset, bytes] : literals) file.literals.push_back({offset, bytes});
  }
  if (!hashed.empty() && hashed.size() != files.size()) {
    throw std::invalid_argument("hashed has ranges for each output, or is empty");
  }
  for (size_t i = 0; i < hashed.size(); ++i) {
    for (const auto& [offset, size] : hashed[i]) files[i].hashed.push_back({offset, size});
  }
  for (const size_t i : there) files.at(i).is_there = true;
  const EngineOptions options = make_options(workers, fsync, io);
  const py::gil_scoped_release release;
  return execute(sources_of(sources), {root.first, root.second}, files, scale_table.with(table),
                 options, progress);
}

py::list bytes_of(const std::vector<Sha256::Digest>& digests) {
  py::list result;
  for (const Sha256::Digest& digest : digests) {
    result.append(py::bytes(reinterpret_cast<const char*>(digest.data()), digest.size()));
  }
  return result;
}

py::list take_finished_binding(Progress& progress) {
  py::list result;
  for (const Finished& finished : progress.take_finished()) {
    result.append(py::make_tuple(finished.output, bytes_of(finished.digests)));
  }
  return result;
}

// (file, offset, size in bytes).
using FileRangeTuple = std::tuple<int64_t, int64_t, int64_t>;

py::list digest_binding(const std::vector<SourceTuple>& files,
                        const std::vector<FileRangeTuple>& ranges, int workers, Progress& progress,
                        const std::string& io) {
  if (workers < 1) throw std::invalid_argument("workers must be at least 1");
  std::vector<FileRange> wanted;
  for (const auto& [file, offset, size] : ranges) wanted.push_back({file, {offset, size}});
  const IoMode mode = parse_io_mode(io);
  std::vector<Sha256::Digest> digests;
  {
    const py::gil_scoped_release release;
    digests = digest(sources_of(files), wanted, workers, mode, progress);
  }
  return bytes_of(digests);
}

py::bytes sha256_binding(const py::bytes& data, const std::string& level) {
  Sha256 sha = level.empty() ? Sha256() : Sha256(parse_sha256_level(level));
  const std::string_view view = data;
  sha.update(reinterpret_cast<const std::byte*>(view.data()), static_cast<int64_t>(view.size()));
  const Sha256::Digest digest = sha.finish();
  return py::bytes(reinterpret_cast<const char*>(digest.data()), digest.size());
}

std::vector<std::tuple<int64_t, int64_t, int64_t>> compare_binding(
    const std::vector<std::string>& sources, const std::vector<std::string>& destinations,
    const py::buffer& moves, int workers, Progress& progress,
    const std::optional<py::buffer>& scales) {
  const Table table(moves);
  const ScaleTable scale_table(scales);
  const EngineOptions options = make_options(workers, false);
  const py::gil_scoped_release release;
  std::vector<std::tuple<int64_t, int64_t, int64_t>> result;
  for (const Difference& difference :
       compare({sources.begin(), sources.end()}, {destinations.begin(), destinations.end()},
               scale_table.with(table), options, progress)) {
    result.emplace_back(difference.move, difference.num_elements, difference.first_offset_bytes);
  }
  return result;
}

// (address, size in bytes) of a tensor's memory.
using MemoryTuple = std::tuple<uintptr_t, int64_t>;

std::vector<Memory> memories_of(const std::vector<MemoryTuple>& tuples) {
  std::vector<Memory> memories;
  for (const auto& [address, size_bytes] : tuples) {
    memories.push_back({reinterpret_cast<std::byte*>(address), size_bytes});
  }
  return memories;
}

void pack_binding(const py::buffer& moves, const std::vector<MemoryTuple>& sources,
                  const std::vector<MemoryTuple>& destinations, int workers) {
  const Table table(moves);
  const EngineOptions options = make_options(workers, false);
  const py::gil_scoped_release release;
  pack(table.data(), table.num_moves(), memories_of(sources), memories_of(destinations),
       options.num_workers, options.simd_level);
}

std::pair<py::bytes, int64_t> tiles_binding(const py::buffer& moves,
                                            const std::vector<MemoryTuple>& sources,
                                            const std::vector<MemoryTuple>& destinations) {
  const Table table(moves);
  const TileTable tiles =
      make_tiles(table.data(), table.num_moves(), memories_of(sources), memories_of(destinations));
  return {py::bytes(reinterpret_cast<const char*>(tiles.items.data()),
                    tiles.items.size() * sizeof(TileItem)),
          tiles.num_tiles};
}

int64_t read_ranges_binding(const std::vector<std::string>& paths, const py::buffer& moves,
                            const std::vector<MemoryTuple>& destinations, int workers,
                            const std::optional<py::buffer>& scales) {
  const Table table(moves);
  const ScaleTable scale_table(scales);
  const EngineOptions options = make_options(workers, false);
  const py::gil_scoped_release release;
  return read_ranges(paths, scale_table.with(table), memories_of(destinations), options.num_workers,
                     options.simd_level);
}

py::bytes dequantise_binding(const py::bytes& codes, int64_t code, int64_t destination_dtype,
                             float scale, const std::string& simd) {
  const auto from = static_cast<Dtype>(code), to = static_cast<Dtype>(destination_dtype);
  if (code < 0 || code >= kNumDtypes || destination_dtype < 0 || !can_dequantise(from, to)) {
    throw std::invalid_argument("no values of these codes in this dtype");
  }
  const SimdLevel level = simd.empty() ? default_simd_level() : parse_simd_level(simd);
  const std::string_view bytes = codes;
  std::string result(bytes.size() * static_cast<size_t>(item_size(to)), '\0');
  find_dequantise(from, to, level)(reinterpret_cast<const std::byte*>(bytes.data()),
                                   reinterpret_cast<std::byte*>(result.data()),
                                   static_cast<int64_t>(bytes.size()), scale);
  return py::bytes(result);
}

py::bytes cast_binding(const py::bytes& source, int64_t source_dtype, int64_t destination_dtype,
                       const std::string& simd) {
  if (source_dtype < 0 || source_dtype >= kNumDtypes || destination_dtype < 0 ||
      destination_dtype >= kNumDtypes || source_dtype == destination_dtype ||
      !can_cast(static_cast<Dtype>(source_dtype), static_cast<Dtype>(destination_dtype))) {
    throw std::invalid_argument("no cast between these dtype codes");
  }
  const auto from = static_cast<Dtype>(source_dtype), to = static_cast<Dtype>(destination_dtype);
  const SimdLevel level = simd.empty() ? default_simd_level() : parse_simd_level(simd);
  const std::string_view bytes = source;
  if (bytes.size() % static_cast<size_t>(item_size(from)) != 0) {
    throw std::invalid_argument("source does not hold whole elements");
  }
  const int64_t num_elements = static_cast<int64_t>(bytes.size()) / item_size(from);
  std::string result(static_cast<size_t>(num_elements * item_size(to)), '\0');
  find_cast(from, to, level)(reinterpret_cast<const std::byte*>(bytes.data()),
                             reinterpret_cast<std::byte*>(result.data()), num_elements);
  return py::bytes(result);
}

// A one-dimensional contiguous buffer of T.
template <typename T>
T* flat(const py::buffer_info& info, const char* what) {
  if (info.ndim != 1 || !info.item_type_is_equivalent_to<T>() ||
      !PyBuffer_IsContiguous(info.view(), 'C')) {
    throw std::invalid_argument(std::string(what) + " has the wrong type or shape");
  }
  return static_cast<T*>(info.ptr);
}

void blend_binding(const py::buffer& weights, const py::buffer& taken, int64_t first, int64_t count,
                   const std::optional<py::buffer>& choices,
                   const std::optional<py::buffer>& places) {
  const py::buffer_info weight_info = weights.request(), taken_info = taken.request(true);
  const double* weight_data = flat<double>(weight_info, "weights");
  int64_t* taken_data = flat<int64_t>(taken_info, "taken");
  const int64_t num_sources = weight_info.size;
  if (num_sources < 1 || num_sources > 65535 || taken_info.size != num_sources || first < 0 ||
      count < 0) {
    throw std::invalid_argument("weights and taken are of the same 1 to 65535 sources");
  }
  const py::buffer_info choice_info = choices ? choices->request(true) : py::buffer_info();
  const py::buffer_info place_info = places ? places->request(true) : py::buffer_info();
  uint16_t* choice_data = choices ? flat<uint16_t>(choice_info, "choices") : nullptr;
  int64_t* place_data = places ? flat<int64_t>(place_info, "places") : nullptr;
  if ((choices && choice_info.size < count) || (places && place_info.size < count)) {
    throw std::invalid_argument("choices and places have room for count samples");
  }
  const py::gil_scoped_release release;
  blend(weight_data, num_sources, first, count, taken_data, choice_data, place_data);
}

// Messages may name files, and names of files need not be UTF-8.
void set_error(const char* type_name, const std::exception& error) {
  const py::object type = py::module_::import("nanotron_fast.errors").attr(type_name);
  const auto message = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.what()));
  if (message) PyErr_SetObject(type.ptr(), message.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const IoError& error) {
    errno = error.error_number();
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, error.path().c_str());
  } catch (const ChangedError& error) {
    set_error("CheckpointError", error);
  } catch (const PlanError& error) {
    set_error("PlanError", error);
  } catch (const Cancelled& error) {
    set_error("Cancelled", error);
  }
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The engine of nanotron_fast: executes a table of moves between files.";
  py::register_exception_translator(translate);

  py::class_<Progress>(module, "Progress")
      .def(py::init<>())
      .def_property_readonly("bytes_done", [](const Progress& p) { return p.bytes_done.load(); })
      .def("take_finished", &take_finished_binding)
      .def("cancel", [](Progress& p) { p.is_cancelled = true; });

  // Read by the tests, which hold Python's names of the columns to these.
  module.attr("NUM_COLUMNS") = Move::kNumColumns;
  module.attr("FILL") = Move::kFill;
  module.attr("UNSCALED") = Move::kUnscaled;
  module.attr("NUM_SCALE_COLUMNS") = Scales::kNumColumns;
  module.attr("COLUMNS") = move_columns();
  module.attr("TILE_COLUMNS") = tile_columns();
  module.def("execute", &execute_binding, py::arg("sources"), py::arg("root"), py::arg("outputs"),
             py::arg("moves"), py::kw_only(), py::arg("workers"), py::arg("fsync"),
             py::arg("progress"), py::arg("io") = "buffered",
             py::arg("hashed") = std::vector<std::vector<RangeTuple>>(),
             py::arg("there") = std::vector<size_t>(), py::arg("scales") = py::none());
  module.def("compare", &compare_binding, py::arg("sources"), py::arg("destinations"),
             py::arg("moves"), py::kw_only(), py::arg("workers"), py::arg("progress"),
             py::arg("scales") = py::none());
  module.def(
      "worker_buffer_bytes",
      [](const py::buffer& moves, const std::string& io, bool compares,
         const std::optional<py::buffer>& scales) {
        const Table table(moves);
        const MoveTable whole = ScaleTable(scales).with(table);
        return worker_buffer_bytes(whole, parse_io_mode(io), compares);
      },
      py::arg("moves"), py::kw_only(), py::arg("io") = "buffered", py::arg("compares") = false,
      py::arg("scales") = py::none());
  module.def("digest", &digest_binding, py::arg("files"), py::arg("ranges"), py::kw_only(),
             py::arg("workers"), py::arg("progress"), py::arg("io") = "buffered");
  module.def("sha256", &sha256_binding, py::arg("data"), py::kw_only(), py::arg("level") = "");
  module.def("sha256_levels", [] {
    std::vector<std::string> names;
    for (const Sha256Level level : supported_sha256_levels()) names.emplace_back(name_of(level));
    return names;
  });
  module.def("set_failure_point", &set_failure_point, py::arg("failure"));
  module.def("failure_point_calls", &failure_point_calls);
  module.def("pack", &pack_binding, py::arg("moves"), py::arg("sources"), py::arg("destinations"),
             py::kw_only(), py::arg("workers"));
  module.def("pack_tiles", &tiles_binding, py::arg("moves"), py::arg("sources"),
             py::arg("destinations"));
  module.def("read_ranges", &read_ranges_binding, py::arg("paths"), py::arg("moves"),
             py::arg("destinations"), py::kw_only(), py::arg("workers"),
             py::arg("scales") = py::none());
  module.def("blend", &blend_binding, py::arg("weights"), py::arg("taken"), py::kw_only(),
             py::arg("first"), py::arg("count"), py::arg("choices") = py::none(),
             py::arg("places") = py::none());
  module.def("cast", &cast_binding, py::arg("source"), py::arg("source_dtype"),
             py::arg("destination_dtype"), py::kw_only(), py::arg("simd") = "");
  module.def("dequantise", &dequantise_binding, py::arg("codes"), py::arg("code"),
             py::arg("destination_dtype"), py::arg("scale"), py::kw_only(), py::arg("simd") = "");
  module.def("simd_levels", [] {
    std::vector<std::string> names;
    for (const SimdLevel level : supported_simd_levels()) names.emplace_back(name_of(level));
    return names;
  });
}
