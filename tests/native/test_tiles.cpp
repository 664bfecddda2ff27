// What the threads of a GPU do for a table of moves, done by the host one thread after another: the
// same code, under the sanitizers, with every access checked for the alignment a GPU asks for.

#include "check.h"
#include "core/error.h"
#include "core/tiles.h"
#include "cuda/transpose.h"
#include "random_plan.h"
#include "random_regions.h"

using namespace nanotron_fast;

namespace {

void run_on_host(const TileTable& table) {
  alignas(16) std::byte shared[device::kSharedBytes];
  const auto num_items = static_cast<int32_t>(table.items.size());
  for (uint32_t number = 0; number < table.num_tiles; ++number) {
    const TileItem& item =
        table.items[static_cast<size_t>(device::find_item(table.items.data(), num_items, number))];
    const device::Tile tile =
        device::tile_of(item, static_cast<uint32_t>(number - item.first_tile));
    std::memset(shared, 0x55, sizeof shared);
    for (uint32_t thread = 0; thread < device::kThreads; ++thread) {
      device::begin_tile(item, tile, thread, shared);
    }
    if (item.kind != static_cast<int32_t>(TileKind::kTranspose)) continue;
    for (uint32_t thread = 0; thread < device::kThreads; ++thread) {
      device::finish_tile(item, tile, thread, shared);
    }
  }
}

// Runs a plan; returns its items so that a test can tell which way they took.
std::vector<TileItem> check_plan(Plan& plan, int64_t shift) {
  const Regions regions(plan, shift);
  const TileTable table = make_tiles(plan.table.data(), static_cast<int64_t>(plan.moves.size()),
                                     regions.sources(), regions.destinations());
  run_on_host(table);
  regions.check_destinations();
  return table.items;
}

void test_random_plans() {
  for (unsigned seed = 0; seed < 60; ++seed) {
    Plan plan(seed, seed % 3 == 0 ? 200 : 7);
    for (int tensor = 0; tensor < 8; ++tensor) {
      plan.pick(0, 1) == 0 ? plan.add_permuted() : plan.add_columns(plan.pick(0, 1) == 1);
    }
    check_plan(plan, seed % 5);
  }
}

const std::pair<Dtype, Dtype> kPairs[] = {
    {Dtype::kBFloat16, Dtype::kBFloat16}, {Dtype::kFloat32, Dtype::kFloat32},
    {Dtype::kFloat64, Dtype::kFloat64},   {Dtype::kBFloat16, Dtype::kFloat16},
    {Dtype::kBFloat16, Dtype::kFloat32},  {Dtype::kFloat16, Dtype::kBFloat16},
    {Dtype::kFloat16, Dtype::kFloat32},   {Dtype::kFloat32, Dtype::kBFloat16},
    {Dtype::kFloat32, Dtype::kFloat16}};

// One move of three dimensions in memory that is aligned but for `shift` bytes on either side.
// Strides are those of the source; the destination is row-major, rows `pitch` apart.
std::vector<TileItem> check_move(std::pair<Dtype, Dtype> dtypes, std::array<int64_t, 3> sizes,
                                 std::array<int64_t, 3> strides, int64_t pitch,
                                 int64_t source_shift, int64_t shift) {
  Plan plan(3, 1);
  for (int i = 0; i < kNumFiles; ++i) {
    plan.headers[i].clear();
    plan.destination_sizes[i] = 0;
  }
  const auto [from, to] = dtypes;
  int64_t last = 0;
  for (int dim = 0; dim < 3; ++dim) last += (sizes[dim] - 1) * strides[dim];
  plan.source_sizes[0] = source_shift + (last + 1) * item_size(from);
  const int64_t elements = (sizes[0] * sizes[1] - 1) * pitch + sizes[2];
  plan.destination_sizes[0] = shift + elements * item_size(to);
  plan.add({0, source_shift, 0, shift, sizes, strides, {sizes[1] * pitch, pitch, 1}, from, to});
  return check_plan(plan, 0);
}

void test_every_kind_at_every_alignment() {
  int32_t seen[5] = {};
  const auto note = [&](const std::vector<TileItem>& items) {
    for (const TileItem& item : items) seen[item.kind] |= 1 << item.width;
  };
  for (const auto& dtypes : kPairs) {
    for (const int64_t source_shift : {0, 1, 2, 4, 8, 16}) {
      for (const int64_t shift : {0, 1, 2, 4, 6, 8}) {
        // Contiguous, longer than a tile; and too short for a vector.
        note(check_move(dtypes, {1, 1, 5003}, {1, 1, 1}, 5003, source_shift, shift));
        note(check_move(dtypes, {1, 1, 3}, {1, 1, 1}, 3, source_shift, shift));
        // Rows of 96, 97 and 3 elements in wider ones, on either side.
        note(check_move(dtypes, {1, 37, 96}, {1, 128, 1}, 96, source_shift, shift));
        note(check_move(dtypes, {3, 7, 96}, {1000, 112, 1}, 104, source_shift, shift));
        note(check_move(dtypes, {5, 3, 97}, {400, 101, 1}, 99, source_shift, shift));
        note(check_move(dtypes, {2, 200, 3}, {1000, 5, 1}, 4, source_shift, shift));
        // Odd rows that begin aligned, and odd matrices whose rows do.
        note(check_move(dtypes, {1, 9, 97}, {1, 112, 1}, 104, source_shift, shift));
        note(check_move(dtypes, {1, 66, 129}, {1, 1, 80}, 136, source_shift, shift));
        note(check_move(dtypes, {1, 67, 128}, {1, 1, 80}, 136, source_shift, shift));
        // Transposed: even, odd, in three dimensions, and too narrow for a tile.
        note(check_move(dtypes, {1, 200, 130}, {1, 1, 208}, 136, source_shift, shift));
        note(check_move(dtypes, {1, 67, 129}, {1, 1, 67}, 129, source_shift, shift));
        note(check_move(dtypes, {3, 66, 70}, {70 * 66, 1, 66}, 70, source_shift, shift));
        note(check_move(dtypes, {1, 5, 40}, {1, 1, 5}, 40, source_shift, shift));
        // Every other element.
        note(check_move(dtypes, {1, 50, 31}, {1, 64, 2}, 31, source_shift, shift));
      }
    }
  }
  const auto at = [&](TileKind kind) { return seen[static_cast<int32_t>(kind)]; };
  CHECK(at(TileKind::kCopy) == (1 << 16 | 1 << 8 | 1 << 4 | 1 << 2 | 1 << 1));
  CHECK(at(TileKind::kCast) == (1 << 8 | 1 << 1 | 1));
  CHECK(at(TileKind::kTranspose) == (1 << 2 | 1 << 1));
  CHECK(at(TileKind::kStrided) == (1 << 1 | 1));
}

// Many items, so that a search has something to find; rows longer than a tile; zeros everywhere.
void test_many_items_and_fills() {
  Plan plan(5, 1);
  for (int64_t i = 0; i < 300; ++i) {
    const int64_t size = 1 + i * 7 % 40;
    const int64_t from = plan.take_source(i % kNumFiles, size * 2);
    const int64_t to = plan.take_destination(i % 3, size * 2);
    plan.add({i % 5 == 0 ? -1 : i % kNumFiles,
              from,
              i % 3,
              to,
              {size, 1, 1},
              {1, 1, 1},
              {1, 1, 1},
              Dtype::kFloat16,
              Dtype::kFloat16});
  }
  const int64_t at = plan.take_destination(3, 2 * 9000 * 4);
  plan.add({-1, 0, 3, at, {2, 4500, 1}, {0, 0, 0}, {9000, 1, 1}, Dtype::kFloat64, Dtype::kFloat32});
  plan.add({-1,
            0,
            3,
            at + 4500 * 4,
            {4500, 1, 1},
            {0, 0, 0},
            {2, 1, 1},
            Dtype::kFloat32,
            Dtype::kFloat16});
  for (const TileItem& item : check_plan(plan, 1))
    CHECK((item.source == 0) == (item.kind == 0 || item.kind == 4));
}

// The tile's arithmetic does not overflow where tensors are larger than 2^32 bytes.
void test_far_tiles() {
  const int64_t far = int64_t{1} << 33;
  const std::vector<int64_t> table{0, 0, 0, 0, far, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, -1};
  const Memory nowhere{nullptr, 2 * far};
  const TileTable tiles = make_tiles(table.data(), 1, {nowhere}, {nowhere});
  CHECK(tiles.num_tiles == 2 * far >> 15);
  const auto last = static_cast<uint32_t>(tiles.num_tiles - 1);
  const device::Tile tile = device::tile_of(tiles.items[0], last);
  CHECK(reinterpret_cast<int64_t>(tile.source) == 2 * far - (1 << 15));
  const auto run = [&] {
    const std::vector<int64_t> huge{-1, 0, 0, 0, int64_t{1} << 46, 1, 1, 0, 0, 0, 1, 1,
                                    1,  0, 0, -1};
    make_tiles(huge.data(), 1, {}, {{nullptr, int64_t{1} << 47}});
  };
  CHECK(contains(message_of<PlanError>(run), "move 0: more than 2147483646 tiles"));
}

template <typename Op>
void test_conversion(Dtype from, Dtype to) {
  using Source = typename Op::Source;
  using Destination = typename Op::Destination;
  const CastFunction cast = find_cast(from, to, SimdLevel::kScalar);
  // Every pattern of 16 bits; of 32, odd steps that come by every exponent and edge of rounding.
  const uint64_t step = sizeof(Source) == 2 ? 1 : 4093;
  const uint64_t end = uint64_t{1} << 8 * sizeof(Source);
  const auto check_bits = [&](uint64_t value) {
    const auto bits = static_cast<Source>(value);
    Destination wanted;
    cast(reinterpret_cast<const std::byte*>(&bits), reinterpret_cast<std::byte*>(&wanted), 1);
    CHECK(Op::convert(bits) == wanted);
  };
  for (uint64_t bits = 0; bits < end; bits += step) check_bits(bits);
  if (sizeof(Source) == 2) return;
  for (uint64_t exponent = 0; exponent < 512; ++exponent) {
    for (int bit = 0; bit < 23; ++bit) {
      for (const uint64_t near : {-1, 0, 1}) {
        check_bits(exponent << 23 | (((uint64_t{1} << bit) + near) & 0x7fffff));
        check_bits(exponent << 23 | (((uint64_t{3} << bit) + near) & 0x7fffff));
      }
    }
  }
}

}  // namespace

int main() {
  test_conversion<device::BFloat16ToFloat32>(Dtype::kBFloat16, Dtype::kFloat32);
  test_conversion<device::BFloat16ToFloat16>(Dtype::kBFloat16, Dtype::kFloat16);
  test_conversion<device::Float16ToFloat32>(Dtype::kFloat16, Dtype::kFloat32);
  test_conversion<device::Float16ToBFloat16>(Dtype::kFloat16, Dtype::kBFloat16);
  test_conversion<device::Float32ToBFloat16>(Dtype::kFloat32, Dtype::kBFloat16);
  test_conversion<device::Float32ToFloat16>(Dtype::kFloat32, Dtype::kFloat16);
  test_random_plans();
  test_every_kind_at_every_alignment();
  test_many_items_and_fills();
  test_far_tiles();
}
