#pragma once

#include <cstdint>
#include <string>

namespace nanotron_fast {

// The calls of the file layer that can be made to fail.
enum class Call { kOpen, kRead, kWrite, kWriteback, kSync, kClose };

// What the file layer is to do instead of a call: nothing special, fail with an errno, or carry
// fewer bytes.
struct Failure {
  enum class Kind { kNone, kError, kOneByte, kHalf };
  Kind kind = Kind::kNone;
  int error_number = 0;
};

// Makes calls of the file layer fail, for tests alone. A failure is written
//
//   call:which:what[:part of the path]
//
// where call is open, read, write, writeback, fsync or close; which is a number (that call, counted
// from 1), a number and + (that one and all that follow), or odd (the first, third, ... , so that
// each one that is tried again gets through); and what is EIO, ENOSPC, EDQUOT, EINTR, EINVAL,
// EOPNOTSUPP, ENOSYS, ENOENT, short (one byte is carried), half (half of the bytes are), or KILL
// (the process kills itself). Only calls whose path has the part in it are counted.
//
// An empty text switches it off. Throws std::invalid_argument on any other.
void set_failure_point(const std::string& text);
// How many calls have been counted since then.
int64_t failure_point_calls();

// What is to happen to this call. The environment variable NANOTRON_FAST_TEST_FAILURE holds a
// failure from the start; it is read at the first call.
Failure failure_of(Call call, const std::string& path);

}  // namespace nanotron_fast
