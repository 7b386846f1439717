/* A GPU that is not there: the CUDA runtime as PyTorch calls it, for a machine without a card or a driver.

   Put before the real libcudart with LD_PRELOAD. Memory is address space without pages behind it, up to the size of a
   card; kernels, matrix products and collectives return at once and are counted; copies to the host give zeros. So all
   of the host's work is the real thing (PyTorch's allocator, streams, events, autograd, the choice of kernels), and no
   number that a kernel computes is. Structures are those of CUDA 13. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define ARENA ((size_t)32 << 40)
#define SMALL_ARENA ((size_t)64 << 30) /* its first part: pages behind it, for PyTorch's segments of small tensors */
#define GRAIN ((size_t)2 << 20)
#define EXPORT __attribute__((visibility("default")))

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *arena;
static size_t next_small, next_free = SMALL_ARENA, in_use, most_used, capacity;

static void start(void) {
    if (arena) return;
    const char *gib = getenv("VIRTUAL_GPU_GIB");
    capacity = (size_t)((gib ? atof(gib) : 79.65) * (1 << 30));
    arena = mmap(NULL, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED || mprotect(arena, SMALL_ARENA, PROT_READ | PROT_WRITE)) {
        perror("virtual GPU: no address space");
        abort();
    }
}

static int on_device(const void *p) { return arena && (const char *)p >= arena && (const char *)p < arena + ARENA; }
static int has_pages(const void *p) { return !on_device(p) || (const char *)p < arena + SMALL_ARENA; }

/* sizes of allocations, by address / GRAIN: one open-addressed table */
#define SLOTS (1 << 20)
static struct { void *at; size_t bytes; } held[SLOTS];
static size_t slot_of(const void *p) {
    size_t i = ((uintptr_t)p / GRAIN * 0x9E3779B97F4A7C15ull) >> 44;
    while (held[i].at && held[i].at != p) i = (i + 1) % SLOTS;
    return i;
}

EXPORT cudaError_t cudaMalloc(void **out, size_t bytes) {
    pthread_mutex_lock(&lock);
    start();
    size_t rounded = (bytes + GRAIN - 1) / GRAIN * GRAIN;
    cudaError_t answer = cudaErrorMemoryAllocation;
    if (in_use + rounded <= capacity && next_free + rounded <= ARENA) {
        size_t *next = rounded <= GRAIN && next_small + rounded <= SMALL_ARENA ? &next_small : &next_free;
        void *p = arena + *next;
        *next += rounded;
        in_use += rounded;
        if (in_use > most_used) most_used = in_use;
        size_t i = slot_of(p);
        held[i].at = p, held[i].bytes = rounded;
        *out = p;
        answer = cudaSuccess;
    }
    pthread_mutex_unlock(&lock);
    return answer;
}
EXPORT cudaError_t cudaFree(void *p) {
    if (!p) return cudaSuccess;
    pthread_mutex_lock(&lock);
    size_t i = slot_of(p);
    in_use -= held[i].bytes;
    held[i].bytes = 0; /* the slot stays taken: addresses are never used again */
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMallocAsync(void **out, size_t bytes, cudaStream_t s) { return cudaMalloc(out, bytes); }
EXPORT cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }
EXPORT cudaError_t cudaMemGetInfo(size_t *f, size_t *t) { start(); *t = capacity; *f = capacity - in_use; return cudaSuccess; }
EXPORT cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags) {
    return posix_memalign(out, 4096, bytes ? bytes : 1) ? cudaErrorMemoryAllocation : cudaSuccess;
}
EXPORT cudaError_t cudaFreeHost(void *p) { free(p); return cudaSuccess; }

static void copy(void *to, const void *from, size_t bytes) {
    if (!has_pages(to)) return;
    if (has_pages(from)) memmove(to, from, bytes);
    else memset(to, 0, bytes);
}
EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind k) { copy(to, from, n); return cudaSuccess; }
EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind k, cudaStream_t s) { copy(to, from, n); return cudaSuccess; }
EXPORT cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t n, cudaStream_t s) { copy(to, from, n); return cudaSuccess; }
EXPORT cudaError_t cudaMemcpy2DAsync(void *to, size_t tp, const void *from, size_t fp, size_t w, size_t h, enum cudaMemcpyKind k, cudaStream_t s) {
    for (size_t i = 0; i < h; i++) copy((char *)to + i * tp, (const char *)from + i * fp, w);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemset(void *p, int v, size_t n) { if (has_pages(p)) memset(p, v, n); return cudaSuccess; }
EXPORT cudaError_t cudaMemsetAsync(void *p, int v, size_t n, cudaStream_t s) { return cudaMemset(p, v, n); }
EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof *a);
    a->type = on_device(p) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    if (on_device(p)) a->devicePointer = (void *)p;
    return cudaSuccess;
}

/* the device: what PyTorch asks of an H100 (SXM, 80 GB) */
EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    start();
    strcpy(p->name, "virtual H100");
    p->totalGlobalMem = capacity;
    p->major = 9, p->minor = 0;
    p->multiProcessorCount = 132, p->warpSize = 32, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
    p->sharedMemPerBlock = 49152, p->sharedMemPerMultiprocessor = 233472, p->sharedMemPerBlockOptin = 232448;
    p->regsPerBlock = 65536, p->regsPerMultiprocessor = 65536, p->l2CacheSize = 50 << 20;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxBlocksPerMultiProcessor = 32, p->memoryBusWidth = 5120, p->unifiedAddressing = 1, p->concurrentKernels = 1;
    p->totalConstMem = 65536, p->textureAlignment = 512;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int device) {
    switch ((int)a) {
        case cudaDevAttrComputeCapabilityMajor: *v = 9; break;
        case cudaDevAttrMultiProcessorCount: *v = 132; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = 232448; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *v = 49152; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = 233472; break;
        case cudaDevAttrMaxGridDimX: *v = 2147483647; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *v = 2048; break;
        case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
        case cudaDevAttrWarpSize: *v = 32; break;
        case cudaDevAttrL2CacheSize: *v = 50 << 20; break;
        default: *v = 0;
    }
    return cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceCount(int *n) { /* as many as processes; only the first is used */
    const char *count = getenv("VIRTUAL_GPU_WORLD"), *visible = getenv("CUDA_VISIBLE_DEVICES");
    *n = 0;
    if (visible && !*visible) return cudaErrorNoDevice;
    *n = count ? atoi(count) : 1;
    if (*n > 8) *n = 8; /* of this node */
    return cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int *d) { *d = 0; return cudaSuccess; }
EXPORT cudaError_t cudaDriverGetVersion(int *v) { *v = 13000; return cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int *v) { *v = 13000; return cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d) { snprintf(s, n, "0000:00:00.0"); return cudaSuccess; }
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *v, int a, int b) { *v = 0; return cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *l, int *g) { *l = 0, *g = -5; return cudaSuccess; }
EXPORT const char *cudaGetErrorString(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "out of memory" : "error of the virtual GPU"; }
EXPORT const char *cudaGetErrorName(cudaError_t e) { return "cudaError"; }

/* streams and events: everything has happened */
static uintptr_t names = 0x1000;
static cudaError_t name_it(void **out) { *out = (void *)__sync_add_and_fetch(&names, 16); return cudaSuccess; }
EXPORT cudaError_t cudaStreamCreate(cudaStream_t *s) { return name_it((void **)s); }
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { return name_it((void **)s); }
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { return name_it((void **)s); }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return cudaSuccess; }
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *v) { *v = cudaStreamCaptureStatusNone; return cudaSuccess; }
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *v, unsigned long long *id, cudaGraph_t *g, const cudaGraphNode_t **d, const cudaGraphEdgeData **e, size_t *n) {
    *v = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t s) { return cudaSuccess; }
EXPORT cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
struct event { struct timespec at; };
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { *e = calloc(1, sizeof(struct event)); return cudaSuccess; }
EXPORT cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t e) { free(e); return cudaSuccess; }
EXPORT cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { clock_gettime(CLOCK_MONOTONIC, &((struct event *)e)->at); return cudaSuccess; }
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) { return cudaEventRecord(e, s); }
EXPORT cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    struct timespec x = ((struct event *)a)->at, y = ((struct event *)b)->at;
    *ms = (y.tv_sec - x.tv_sec) * 1e3 + (y.tv_nsec - x.tv_nsec) / 1e6;
    return cudaSuccess;
}

/* kernels */
#define KERNELS (1 << 18)
static struct { const void *host; const char *name; uint64_t launches; } kernels[KERNELS];
static size_t kernel_slot(const void *host) {
    size_t i = ((uintptr_t)host * 0x9E3779B97F4A7C15ull) >> 46;
    while (kernels[i].host && kernels[i].host != host) i = (i + 1) % KERNELS;
    return i;
}
static void count(const void *host) {
    pthread_mutex_lock(&lock);
    size_t i = kernel_slot(host);
    if (!kernels[i].host) kernels[i].host = host, kernels[i].name = "?";
    kernels[i].launches++;
    pthread_mutex_unlock(&lock);
}
static void count_named(const char *name) {
    count(name);
    kernels[kernel_slot(name)].name = name;
}
EXPORT void **__cudaRegisterFatBinary(void *f) { static void *handle; return &handle; }
EXPORT void __cudaRegisterFatBinaryEnd(void **h) {}
EXPORT void __cudaUnregisterFatBinary(void **h) {}
EXPORT void __cudaRegisterVar(void **h, char *a, char *b, const char *c, int d, size_t e, int f, int g) {}
EXPORT char __cudaInitModule(void **h) { return 1; }
EXPORT void __cudaRegisterFunction(void **h, const char *host, char *device, const char *name, int limit, void *a, void *b, void *c, void *d, int *e) {
    pthread_mutex_lock(&lock);
    size_t i = kernel_slot(host);
    kernels[i].host = host, kernels[i].name = name;
    pthread_mutex_unlock(&lock);
}
static __thread struct { dim3 grid, block; size_t shared; void *stream; } call;
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    call.grid = grid, call.block = block, call.shared = shared, call.stream = stream;
    return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = call.grid, *block = call.block, *shared = call.shared, *(void **)stream = call.stream;
    return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *host) { *k = (cudaKernel_t)host; return cudaSuccess; }
static cudaError_t launch(const void *f, dim3 grid) {
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) {
        fprintf(stderr, "virtual GPU: grid %u x %u x %u of %s\n", grid.x, grid.y, grid.z, kernels[kernel_slot(f)].name);
        return cudaErrorInvalidConfiguration;
    }
    count(f);
    return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s) { return launch(f, g); }
EXPORT cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s) { return launch(f, g); }
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { return launch(f, c->gridDim); }
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s) { return launch(f, g); }
EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->ptxVersion = a->binaryVersion = 90;
    a->maxDynamicSharedSizeBytes = 232448;
    return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t m) { *n = 2; return cudaSuccess; }
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t m, unsigned g) { *n = 2; return cudaSuccess; }
EXPORT cudaError_t cudaGetSymbolAddress(void **p, const void *s) { return cudaMalloc(p, 1); }
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *d) { f(d); return cudaSuccess; }
EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *d, unsigned g) { f(s, cudaSuccess, d); return cudaSuccess; }

#define NOTHING(name) EXPORT cudaError_t nothing_##name(void) __asm__(#name); cudaError_t nothing_##name(void) { return cudaSuccess; }
NOTHING(cudaSetDevice) NOTHING(cudaStreamWaitEvent) NOTHING(cudaGetLastError) NOTHING(cudaPeekAtLastError)
NOTHING(cudaEventSynchronize) NOTHING(cudaEventQuery) NOTHING(cudaStreamQuery) NOTHING(cudaStreamDestroy)
NOTHING(cudaThreadExchangeStreamCaptureMode) NOTHING(cudaHostRegister) NOTHING(cudaHostUnregister)
NOTHING(cudaDeviceEnablePeerAccess) NOTHING(cudaProfilerStart) NOTHING(cudaProfilerStop) NOTHING(cudaMemcpyToSymbol)
NOTHING(cudaFuncSetAttribute) NOTHING(cudaKernelSetAttributeForDevice)

/* cuBLAS, whose own libraries would look for a driver */
static long handle[64];
#define MAKES(name) EXPORT int name(void **h) { *h = handle; return 0; }
#define FINE(name) EXPORT int name(void) { return 0; }
#define PRODUCT(name) EXPORT int name(void) { count_named(#name); return 0; }
MAKES(cublasCreate_v2) MAKES(cublasLtMatmulPreferenceCreate)
EXPORT int cublasLtMatmulDescCreate(void **h, int a, int b) { *h = handle; return 0; }
EXPORT int cublasLtMatrixLayoutCreate(void **h, int a, uint64_t b, uint64_t c, int64_t d) { *h = handle; return 0; }
EXPORT int cublasGetMathMode(void *h, int *m) { *m = 0; return 0; }
EXPORT int cublasGetPointerMode_v2(void *h, int *m) { *m = 0; return 0; }
FINE(cublasDestroy_v2) FINE(cublasSetMathMode) FINE(cublasSetPointerMode_v2) FINE(cublasSetStream_v2)
FINE(cublasSetWorkspace_v2) FINE(cublasSetSmCountTarget) FINE(cublasLtMatmulDescDestroy) FINE(cublasLtMatmulDescSetAttribute)
FINE(cublasLtMatmulPreferenceDestroy) FINE(cublasLtMatmulPreferenceSetAttribute) FINE(cublasLtMatrixLayoutDestroy)
FINE(cublasLtMatrixLayoutSetAttribute)
PRODUCT(cublasLtMatmul) PRODUCT(cublasGemmEx) PRODUCT(cublasGemmStridedBatchedEx) PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmStridedBatched) PRODUCT(cublasSgemmEx) PRODUCT(cublasDgemm_v2) PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2) PRODUCT(cublasSdot_v2) PRODUCT(cublasDdot_v2) PRODUCT(cublasDotEx)
struct heuristic { char algo[64]; size_t workspace; int state; float waves; int reserved[4]; };
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *e, void *p, int asked, struct heuristic *r, int *n) {
    memset(r, 0, sizeof *r);
    r->waves = 1;
    *n = 1;
    return 0;
}

/* NCCL: every rank but this one is imagined */
struct communicator { int rank, size; };
static int communicator(void **c, int size, int rank) {
    struct communicator *made = malloc(sizeof *made);
    made->rank = rank, made->size = size;
    *c = made;
    return 0;
}
EXPORT int ncclGetUniqueId(char *id) { memset(id, 1, 128); return 0; }
struct id { char bytes[128]; };
EXPORT int ncclCommInitRank(void **c, int n, struct id id, int rank) { return communicator(c, n, rank); }
EXPORT int ncclCommInitRankConfig(void **c, int n, struct id id, int rank, void *config) { return communicator(c, n, rank); }
EXPORT int ncclCommInitRankScalable(void **c, int n, int rank, int ids, void *id, void *config) { return communicator(c, n, rank); }
EXPORT int ncclCommSplit(struct communicator *from, int color, int key, void **c, void *config) { return communicator(c, from->size, from->rank); }
EXPORT int ncclCommCount(struct communicator *c, int *n) { *n = c->size; return 0; }
EXPORT int ncclCommUserRank(struct communicator *c, int *n) { *n = c->rank; return 0; }
EXPORT int ncclCommGetAsyncError(void *c, int *e) { *e = 0; return 0; }
FINE(ncclCommAbort) FINE(ncclCommDestroy) FINE(ncclCommFinalize) FINE(ncclCommRegister) FINE(ncclCommDeregister)
FINE(ncclGroupStart) FINE(ncclGroupEnd)
static size_t bytes_of(size_t count, int type) {
    static const int size[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return count * size[type];
}
/* what the other ranks send is what this one sends */
EXPORT int ncclAllGather(const char *from, char *to, size_t n, int type, struct communicator *c, cudaStream_t s) {
    count_named("ncclAllGather");
    size_t each = bytes_of(n, type);
    for (int rank = 0; rank < c->size; rank++)
        if (to + rank * each != from) copy(to + rank * each, from, each);
    return 0;
}
EXPORT int ncclAllReduce(const void *from, void *to, size_t n, int type, int op, void *c, cudaStream_t s) {
    count_named("ncclAllReduce");
    if (from != to) copy(to, from, bytes_of(n, type));
    return 0;
}
EXPORT int ncclReduce(const void *from, void *to, size_t n, int type, int op, int root, void *c, cudaStream_t s) {
    count_named("ncclReduce");
    if (to && from != to) copy(to, from, bytes_of(n, type));
    return 0;
}
EXPORT int ncclBroadcast(const void *from, void *to, size_t n, int type, int root, void *c, cudaStream_t s) {
    count_named("ncclBroadcast");
    if (from != to) copy(to, from, bytes_of(n, type));
    return 0;
}
EXPORT int ncclReduceScatter(const char *from, void *to, size_t n, int type, int op, struct communicator *c, cudaStream_t s) {
    count_named("ncclReduceScatter");
    copy(to, from + c->rank * bytes_of(n, type), bytes_of(n, type));
    return 0;
}
EXPORT int ncclAlltoAll(const char *from, char *to, size_t n, int type, struct communicator *c, cudaStream_t s) {
    count_named("ncclAlltoAll");
    copy(to, from, c->size * bytes_of(n, type));
    return 0;
}
PRODUCT(ncclBcast) PRODUCT(ncclSend) PRODUCT(ncclRecv)

/* for the tests, by ctypes */
EXPORT size_t virtual_gpu_most_used(void) { return most_used; }
/* "launches name\n" for every kernel that was launched; returns the bytes it takes, writes at most `room` */
EXPORT size_t virtual_gpu_launches(char *text, size_t room) {
    size_t used = 0;
    for (size_t i = 0; i < KERNELS; i++)
        if (kernels[i].launches) {
            int n = snprintf(used < room ? text + used : NULL, used < room ? room - used : 0, "%llu %s\n", (unsigned long long)kernels[i].launches, kernels[i].name);
            used += n;
        }
    return used;
}

/* the driver, where PyTorch asks it: this library's name is libcuda.so.1 */
EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }
EXPORT int cuInit(unsigned flags) { return 0; }
EXPORT int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
EXPORT int cuDeviceGetCount(int *n) { return cudaGetDeviceCount(n); }
EXPORT int cuCtxGetCurrent(void **c) { *c = handle; return 0; }
EXPORT int cuCtxSetCurrent(void *c) { return 0; }
EXPORT int cuDevicePrimaryCtxRetain(void **c, int d) { *c = handle; return 0; }
EXPORT int cuGetErrorString(int e, const char **s) { *s = "error of the virtual GPU"; return 0; }

/* and where Triton does, which compiles kernels with its own ptxas */
EXPORT int cuDeviceGet(int *d, int n) { *d = n; return 0; }
EXPORT int cuDeviceGetAttribute(int *v, int a, int d) { return cudaDeviceGetAttribute(v, a, d); }
EXPORT int cuCtxGetDevice(int *d) { *d = 0; return 0; }
EXPORT int cuModuleLoadData(void **m, const void *image) { return name_it(m); }
EXPORT int cuModuleLoad(void **m, const char *path) { return name_it(m); }
EXPORT int cuModuleUnload(void *m) { return 0; }
EXPORT int cuModuleGetFunction(void **f, void *m, const char *name) { *f = strdup(name); return 0; }
EXPORT int cuFuncGetAttribute(int *v, int a, void *f) { *v = a == 0 ? 1024 : 0; return 0; }
FINE(cuFuncSetAttribute) FINE(cuFuncSetCacheConfig) FINE(cuCtxPushCurrent_v2) FINE(cuCtxPopCurrent_v2)
EXPORT int cuLaunchKernelEx(void *c, const char *f, void **a, void **e) { count_named(f); return 0; }
EXPORT int cuLaunchKernel(const char *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned m, void *s, void **a, void **e) {
    count_named(f);
    return 0;
}
EXPORT int cuPointerGetAttribute(void *v, int a, unsigned long long p) { *(unsigned long long *)v = p; return 0; }
EXPORT int cuOccupancyMaxActiveClusters(int *n, void *f, void *c) { *n = 1; return 0; }
FINE(cuTensorMapEncodeTiled) FINE(cuTensorMapEncodeIm2col) FINE(cuCtxSetLimit)
EXPORT int cuCtxGetLimit(size_t *v, int limit) { *v = 1 << 20; return 0; }
EXPORT int cuPointerGetAttributes(unsigned n, int *names, void **values, unsigned long long p) { return 1; }
