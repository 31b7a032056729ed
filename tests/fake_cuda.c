/* A libcuda.so.1 that launches nothing: a launch goes to a callback, and everything else answers as an H100 would.

Device n has one context, whose address is &contexts[n]. A module belongs to the context that is current when it is
loaded, and to launch its kernels in another context is an error, as it is with CUDA. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#define DEVICES 4
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, INVALID_HANDLE = 400 };

typedef struct { int device; } Context;
typedef struct { Context *context; } Module;
typedef struct { Module *module; } Function;
typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned count;
} Launch;
typedef int (*Callback)(Function *, int device, const unsigned *grid, const unsigned *block, unsigned shared,
                        uint64_t stream, void **parameters);

static Context contexts[DEVICES] = {{0}, {1}, {2}, {3}};
static _Thread_local Context *current;
static Callback callback;

/* For the tests. */
void fake_on_launch(Callback given) { callback = given; }
void fake_set_device(int device) { current = &contexts[device]; }
int fake_device(void) { return current ? current->device : 0; }

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuGetErrorString(int error, const char **text) {
    *text = error == INVALID_HANDLE ? "invalid resource handle: a kernel of another device's context" : "a fake error";
    return SUCCESS;
}
int cuGetErrorName(int error, const char **text) { return cuGetErrorString(error, text); }

int cuDeviceGetCount(int *count) { *count = DEVICES; return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < DEVICES ? SUCCESS : INVALID_VALUE; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 8: *value = 49152; break;   /* shared memory of a block */
    case 10: *value = 32; break;     /* a warp */
    case 12: *value = 65536; break;  /* registers of a block */
    case 16: *value = 132; break;    /* multiprocessors */
    case 75: *value = 9; break;      /* compute capability 9.0 */
    case 76: *value = 0; break;
    case 81: *value = 233472; break; /* shared memory of a multiprocessor, and of a block that asks for it */
    case 97: *value = 232448; break;
    default: *value = 1;
    }
    return SUCCESS;
}

int cuCtxGetCurrent(Context **context) { *context = current; return SUCCESS; }
int cuCtxSetCurrent(Context *context) { current = context; return SUCCESS; }
int cuCtxGetDevice(int *device) { *device = fake_device(); return current ? SUCCESS : INVALID_CONTEXT; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return SUCCESS; }
int cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }
int cuDevicePrimaryCtxRetain(Context **context, int device) { *context = &contexts[device]; return SUCCESS; }

int cuModuleLoadData(Module **module, const void *image) {
    if (!current) return INVALID_CONTEXT;
    if (!(*module = malloc(sizeof **module))) return OUT_OF_MEMORY;
    (*module)->context = current;
    return SUCCESS;
}
/* Neither is freed: an address says which kernel it is for as long as the process lives. */
int cuModuleUnload(Module *module) { return SUCCESS; }
int cuModuleGetFunction(Function **function, Module *module, const char *name) {
    if (!(*function = malloc(sizeof **function))) return OUT_OF_MEMORY;
    (*function)->module = module;
    return SUCCESS;
}
int cuFuncGetAttribute(int *value, int attribute, Function *function) {
    *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0; /* threads of a block, registers */
    return SUCCESS;
}
int cuFuncSetAttribute(Function *function, int attribute, int value) { return SUCCESS; }
int cuFuncSetCacheConfig(Function *function, int config) { return SUCCESS; }
int cuOccupancyMaxActiveClusters(int *count, Function *function, const Launch *launch) { *count = 1; return SUCCESS; }

int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return SUCCESS; }
int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) {
    *(uint64_t *)value = pointer; /* the only one that Triton asks for: the address on the device */
    return SUCCESS;
}
int cuPointerGetAttributes(unsigned count, int *attributes, void **values, uint64_t pointer) {
    for (unsigned i = 0; i < count; i++) {
        if (attributes[i] == 3) *(uint64_t *)values[i] = pointer;
        else *(uint32_t *)values[i] = 0;
    }
    return SUCCESS;
}
int cuTensorMapEncodeTiled(void) { return INVALID_VALUE; } /* no kernel has a tensor descriptor */
int cuTensorMapEncodeIm2col(void) { return INVALID_VALUE; }

int cuLaunchKernelEx(const Launch *launch, Function *function, void **parameters, void **extra) {
    if (!current) return INVALID_CONTEXT;
    if (function->module->context != current) return INVALID_HANDLE;
    return callback ? callback(function, current->device, launch->grid, launch->block, launch->shared,
                               (uint64_t)launch->stream, parameters) : SUCCESS;
}
