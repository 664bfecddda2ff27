/* A CUDA driver without a GPU: what Triton's launcher calls, up to the launch, which a function of
 * the test is told of instead. Compiled against Triton's own cuda.h as libcuda.so.1. */
#include "../driver_calls.h"

typedef void (*watcher)(const CUlaunchConfig *config, CUfunction function, void **parameters);

static watcher on_launch;
static unsigned long long functions;

void watch_launches(watcher each) { on_launch = each; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                          void **extra) {
  (void)extra;
  on_launch(config, function, parameters);
  return CUDA_SUCCESS;
}

/* Every function has a number of its own. */
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  (void)module, (void)name;
  *function = (CUfunction)++functions;
  return CUDA_SUCCESS;
}

/* An H100's shared memory; of the rest nothing is asked here. */
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  (void)attribute, (void)device;
  *value = 227 << 10;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  (void)error;
  *text = "an error of the stand-in";
  return CUDA_SUCCESS;
}
