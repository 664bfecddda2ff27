#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// The system calls of the file layer: tried again where a signal interrupts them, and made to fail
// where a failure point says so. They return what the system does, or minus the errno.
namespace nanotron_fast::calls {

// Relative to the folder's descriptor. `path` is what messages and failure points call the file.
int open_at(int folder, const std::string& name, int flags, const std::string& path);

// Flags of the kernel's for one transfer: do not keep in the page cache what was not there.
constexpr int kDontCache = 0x80;

// May carry fewer bytes than asked for; a read at the end of a file carries none.
int64_t read_at(int descriptor, const std::string& path, std::byte* destination, int64_t num_bytes,
                int64_t offset_bytes, int flags = 0);
int64_t write_at(int descriptor, const std::string& path, const std::byte* source,
                 int64_t num_bytes, int64_t offset_bytes, int flags = 0);

// Asks for a range to be written out, and returns once it has been where `waits`. Zero bytes stand
// for all that follow.
int write_back(int descriptor, const std::string& path, int64_t offset_bytes, int64_t num_bytes,
               bool waits);
int sync(int descriptor, const std::string& path);
int close(int descriptor, const std::string& path);

// Asks the kernel to forget what is clean in a range. No more than advice, which cannot fail.
void drop_cache(int descriptor, int64_t offset_bytes, int64_t num_bytes);

}  // namespace nanotron_fast::calls
