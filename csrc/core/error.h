#pragma once

#include <stdexcept>
#include <string>
#include <system_error>

namespace nanotron_fast {

// A system call failed on a file. Becomes OSError(errno, message, path) in Python.
class IoError : public std::runtime_error {
 public:
  IoError(int error_number, const std::string& path)
      : std::runtime_error(path + ": " + std::generic_category().message(error_number)),
        error_number_(error_number),
        path_(path) {}
  int error_number() const { return error_number_; }
  const std::string& path() const { return path_; }

 private:
  int error_number_;
  std::string path_;
};

// The move table contradicts itself or the files. Becomes PlanError in Python.
class PlanError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// A file that is read has changed since the plan was made. Becomes CheckpointError in Python.
class ChangedError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Somebody called Progress::cancel. Becomes Cancelled in Python.
class Cancelled : public std::runtime_error {
 public:
  Cancelled() : std::runtime_error("cancelled") {}
};

}  // namespace nanotron_fast
