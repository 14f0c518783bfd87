// A libcuda.so.1 without a GPU: Triton's real launcher loads it, packs its arguments and
// "launches". Every launch is recorded, and handed to an executor if there is one. An H100, as far
// as Triton asks, but with the shared memory of sm_86, 89 and 120.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { CAPACITY = 65536, PARAMETERS = 40 };

struct module {
  long number;
  const char* image;
};

struct function {
  char name[128];
  struct module* module;
};

struct launch {
  struct function* function;
  unsigned grid, threads;
  uint64_t parameters[PARAMETERS];
};

static struct launch launches[CAPACITY];
static long count, modules;
long fake_parameters;  // of the next launches: how many are recorded

// Runs a launch of what a module was loaded from; not 0 for a failure, which it describes.
static int (*executor)(const char* image, unsigned grid, unsigned threads, unsigned shared,
                       void** parameters);
static char error[4096] = "an error";
void fake_executor(void* function) { executor = function; }
void fake_error(const char* text) { strncpy(error, text, sizeof error - 1); }

long fake_count(void) { return count; }
void fake_clear(void) { count = 0; }
const char* fake_name(long i) { return launches[i].function->name; }
long fake_module(long i) { return launches[i].function->module->number; }
long fake_grid(long i) { return launches[i].grid; }
long fake_threads(long i) { return launches[i].threads; }
uint64_t fake_parameter(long i, long k) { return launches[i].parameters[k]; }

#define DO(call, body) \
  CUresult call {      \
    body;              \
    return CUDA_SUCCESS; \
  }

DO(cuInit(unsigned flags), )
DO(cuDriverGetVersion(int* version), *version = 13000)
DO(cuCtxGetCurrent(CUcontext* context), *context = (CUcontext)1)
DO(cuCtxSetCurrent(CUcontext context), )
DO(cuCtxGetDevice(CUdevice* device), *device = 0)
DO(cuCtxGetLimit(size_t* value, CUlimit limit), *value = 1 << 20)
DO(cuCtxSetLimit(CUlimit limit, size_t value), )
DO(cuDeviceGet(CUdevice* device, int ordinal), *device = 0)
DO(cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device), *context = (CUcontext)1)
DO(cuModuleUnload(CUmodule module), )
DO(cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value), )
DO(cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config), )
DO(cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status),
   *status = CU_STREAM_CAPTURE_STATUS_NONE)
DO(cuGetErrorString(CUresult result, const char** text), *text = error)
DO(cuOccupancyMaxActiveClusters(int* n, CUfunction f, const CUlaunchConfig* config), *n = 1)
DO(cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer),
   *(CUdeviceptr*)data = pointer)

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 49152; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 101376; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 102400; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  struct module* loaded = malloc(sizeof *loaded);
  loaded->number = ++modules;
  // Machine code goes nowhere; a program in text, which ends with a 0, is kept.
  loaded->image = memcmp(image, "\177ELF", 4) ? strdup(image) : NULL;
  *module = (CUmodule)loaded;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* f, CUmodule module, const char* name) {
  struct function* function = calloc(1, sizeof *function);
  strncpy(function->name, name, sizeof function->name - 1);
  function->module = (struct module*)module;
  *f = (CUfunction)function;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction f, void** parameters,
                          void** extra) {
  struct launch* launch = &launches[count++ % CAPACITY];
  launch->function = (struct function*)f;
  launch->grid = config->gridDimX;
  launch->threads = config->blockDimX;
  for (long i = 0; i < fake_parameters && i < PARAMETERS; ++i)
    memcpy(&launch->parameters[i], parameters[i], 4);  // the lower half, all that a number has
  if (executor && executor(launch->function->module->image, config->gridDimX, config->blockDimX,
                           config->sharedMemBytes, parameters))
    return CUDA_ERROR_LAUNCH_FAILED;
  return CUDA_SUCCESS;
}

DO(cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* global,
                          const cuuint64_t* a, const cuuint64_t* b, const cuuint32_t* c,
                          const cuuint32_t* d, CUtensorMapInterleave e, CUtensorMapSwizzle f,
                          CUtensorMapL2promotion g, CUtensorMapFloatOOBfill h), )
DO(cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                           void* global, const cuuint64_t* a, const cuuint64_t* b, const int* c,
                           const int* d, cuuint32_t channels, cuuint32_t pixels,
                           const cuuint32_t* e, CUtensorMapInterleave f, CUtensorMapSwizzle g,
                           CUtensorMapL2promotion h, CUtensorMapFloatOOBfill i), )
