#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

// Ends the program with a message where the condition does not hold.
#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)

inline void check(bool holds, const char* condition, const char* file, int line) {
  if (holds) return;
  std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", file, line, condition);
  std::exit(1);
}

// The message of the Error that work() throws; ends the program where it throws none.
template <typename Error, typename Work>
std::string message_of(const Work& work) {
  try {
    work();
  } catch (const Error& error) {
    return error.what();
  }
  std::fprintf(stderr, "an error was expected, and none was thrown\n");
  std::exit(1);
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}
