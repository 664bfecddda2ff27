#pragma once

#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace nanotron_fast {

// Runs work(worker, should_stop) on num_workers threads and waits for all of them. The first
// exception makes should_stop true for the others and is rethrown here.
template <typename Work>
void run_workers(int num_workers, Work work) {
  std::atomic<bool> should_stop{false};
  std::exception_ptr first_error;
  std::mutex error_mutex;
  const auto guarded = [&](int worker) {
    try {
      work(worker, should_stop);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!first_error) first_error = std::current_exception();
      should_stop = true;
    }
  };
  std::vector<std::thread> threads;
  for (int worker = 1; worker < num_workers; ++worker) {
    try {
      threads.emplace_back(guarded, worker);
    } catch (const std::system_error&) {
      break;  // the machine has no more threads to give: fewer do the same work
    }
  }
  guarded(0);
  for (std::thread& thread : threads) thread.join();
  if (first_error) std::rethrow_exception(first_error);
}

}  // namespace nanotron_fast
