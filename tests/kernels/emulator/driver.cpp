// A CUDA driver whose GPU is the emulator: what Triton's launcher calls, as libcuda.so.1.
//
// A module is a text in PTX instead of a binary. Addresses are those of the process.

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"

extern "C" {
#include "../driver_calls.h"
}

namespace {

std::vector<std::unique_ptr<emulator::Program>> programs;
std::string last_fault = "no fault";

// Of this launch: a test may have several.
uint32_t seed() {
  const char* const given = std::getenv("EMULATOR_SEED");
  return given ? static_cast<uint32_t>(std::atoi(given)) : 0;
}

// The most that a block may have, as the CUDA programming guide lists it.
size_t most_shared_bytes() {
  const char* const given = std::getenv("EMULATOR_ARCH");
  return size_t{given && std::atoi(given) == 80 ? 163u : 227u} << 10;
}

template <class Body>
CUresult told(CUresult error, Body body) {
  try {
    body();
  } catch (const std::exception& fault) {
    last_fault = fault.what();
    return error;
  }
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  return told(CUDA_ERROR_INVALID_PTX, [&] {
    const std::string text = static_cast<const char*>(image);
    programs.push_back(std::make_unique<emulator::Program>(emulator::parse(text)));
    *module = reinterpret_cast<CUmodule>(programs.back().get());
  });
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  if (reinterpret_cast<emulator::Program*>(module)->name != name) return CUDA_ERROR_NOT_FOUND;
  *function = reinterpret_cast<CUfunction>(module);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void**) {
  return told(CUDA_ERROR_ILLEGAL_ADDRESS, [&] {
    if (config->sharedMemBytes > most_shared_bytes()) {
      throw emulator::Fault(std::to_string(config->sharedMemBytes) + " bytes of shared memory");
    }
    emulator::run({reinterpret_cast<const emulator::Program*>(function),
                   {config->gridDimX, config->gridDimY, config->gridDimZ},
                   {config->blockDimX, config->blockDimY, config->blockDimZ},
                   config->sharedMemBytes,
                   parameters},
                  seed());
  });
}

CUresult cuGetErrorString(CUresult, const char** text) {
  *text = last_fault.c_str();
  return CUDA_SUCCESS;
}

// Of the rest nothing is asked here.
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute, CUdevice) {
  *value = static_cast<int>(most_shared_bytes());
  return CUDA_SUCCESS;
}

}  // extern "C"
