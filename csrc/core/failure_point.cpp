#include "core/failure_point.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

namespace nanotron_fast {

namespace {

constexpr std::pair<const char*, Call> kCalls[] = {
    {"open", Call::kOpen},           {"read", Call::kRead},  {"write", Call::kWrite},
    {"writeback", Call::kWriteback}, {"fsync", Call::kSync}, {"close", Call::kClose}};
constexpr std::pair<const char*, int> kErrors[] = {
    {"EIO", EIO},       {"ENOSPC", ENOSPC},         {"EDQUOT", EDQUOT}, {"EINTR", EINTR},
    {"EINVAL", EINVAL}, {"EOPNOTSUPP", EOPNOTSUPP}, {"ENOSYS", ENOSYS}, {"ENOENT", ENOENT}};

struct FailurePoint {
  Call call;
  int64_t first;
  int64_t last;
  bool is_odd;
  bool kills;
  Failure failure;
  std::string part;
  mutable std::atomic<int64_t> count{0};
};

template <typename Value, size_t kSize>
std::optional<Value> look_up(const std::pair<const char*, Value> (&entries)[kSize],
                             const std::string& name) {
  for (const auto& [text, value] : entries) {
    if (name == text) return value;
  }
  return std::nullopt;
}

[[noreturn]] void refuse(const std::string& text) {
  throw std::invalid_argument("failure point '" + text + "': write call:which:what[:path]");
}

std::shared_ptr<const FailurePoint> parse(const std::string& text) {
  std::vector<std::string> words;
  size_t start = 0;
  for (size_t end; words.size() < 3 && (end = text.find(':', start)) != std::string::npos;) {
    words.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  words.push_back(text.substr(start));
  if (words.size() < 3) refuse(text);

  const auto point = std::make_shared<FailurePoint>();
  const std::optional<Call> call = look_up(kCalls, words[0]);
  if (!call) refuse(text);
  point->call = *call;
  point->is_odd = words[1] == "odd";
  if (point->is_odd) {
    point->first = 1;
    point->last = INT64_MAX;
  } else {
    char* end = nullptr;
    point->first = std::strtoll(words[1].c_str(), &end, 10);
    const std::string rest = end;
    if (point->first < 1 || !(rest.empty() || rest == "+")) refuse(text);
    point->last = rest.empty() ? point->first : INT64_MAX;
  }
  point->kills = words[2] == "KILL";
  if (words[2] == "short") {
    point->failure = {Failure::Kind::kOneByte, 0};
  } else if (words[2] == "half") {
    point->failure = {Failure::Kind::kHalf, 0};
  } else if (!point->kills) {
    const std::optional<int> error = look_up(kErrors, words[2]);
    // What is always interrupted is tried for ever.
    if (!error || (*error == EINTR && point->last == INT64_MAX && !point->is_odd)) refuse(text);
    point->failure = {Failure::Kind::kError, *error};
  }
  if (words.size() == 4) point->part = words[3];
  return point;
}

std::shared_ptr<const FailurePoint> from_environment() {
  const char* text = std::getenv("NANOTRON_FAST_TEST_FAILURE");
  return text == nullptr || *text == '\0' ? nullptr : parse(text);
}

// What a run costs without one: a load of is_set.
struct State {
  std::mutex mutex;
  std::shared_ptr<const FailurePoint> point = from_environment();
  std::atomic<bool> is_set{point != nullptr};

  std::shared_ptr<const FailurePoint> get() {
    const std::lock_guard<std::mutex> lock(mutex);
    return point;
  }
};

// The one thing that the file layer shares across a process: it stands for the machine under it.
State& state() {
  static State the_state;
  return the_state;
}

}  // namespace

void set_failure_point(const std::string& text) {
  std::shared_ptr<const FailurePoint> point = text.empty() ? nullptr : parse(text);
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().is_set = point != nullptr;
  state().point = std::move(point);
}

int64_t failure_point_calls() {
  const std::shared_ptr<const FailurePoint> point = state().get();
  return point == nullptr ? 0 : point->count.load();
}

Failure failure_of(Call call, const std::string& path) {
  if (!state().is_set.load(std::memory_order_relaxed)) return {};
  const std::shared_ptr<const FailurePoint> point = state().get();
  if (point == nullptr || point->call != call || path.find(point->part) == std::string::npos) {
    return {};
  }
  const int64_t count = ++point->count;
  if (count < point->first || count > point->last || (point->is_odd && count % 2 == 0)) return {};
  if (point->kills) {
    ::kill(::getpid(), SIGKILL);
    for (;;) ::pause();
  }
  return point->failure;
}

}  // namespace nanotron_fast
