/* libcuda.so.1 and libnvidia-ml.so.1 of a card that does not exist, for tests of what a worker does about its faults.

   How the card is stands in the file that STAND_IN_CARD names: "well"; "lost" as after Xid 79, when it has fallen off
   the bus; "no-uvm" while /dev/nvidia-uvm is missing, or after a resume that broke CUDA, when NVML still answers;
   "unloaded" without the kernel's module; "mute" where CUDA works and NVML does not;
   "full" of what process 1 holds. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NVML_DRIVER_NOT_LOADED = 9, NVML_GPU_IS_LOST = 15, NVML_NOT_SUPPORTED = 3, NVML_INSUFFICIENT_SIZE = 7, NVML_UNKNOWN = 999 };
enum { CUDA_NO_DEVICE = 100, CUDA_UNKNOWN = 999, CUDA_NOT_LOADED = 35 };

static const char uuid[] = "GPU-00000000-0000-0000-0000-000000000001";

static int is(const char *state)
{
    static char read[32];
    FILE *file = fopen(getenv("STAND_IN_CARD"), "r");
    if (!file)
        abort();
    memset(read, 0, sizeof read);
    fread(read, 1, sizeof read - 1, file);
    fclose(file);
    return !strncmp(read, state, strlen(state));
}

static int nvml(void) { return is("unloaded") ? NVML_DRIVER_NOT_LOADED : is("lost") ? NVML_GPU_IS_LOST : is("mute") ? NVML_UNKNOWN : 0; }
static int cuda(void) { return is("unloaded") ? CUDA_NOT_LOADED : is("lost") ? CUDA_NO_DEVICE : is("no-uvm") ? CUDA_UNKNOWN : 0; }

int nvmlInit_v2(void) { return is("unloaded") ? NVML_DRIVER_NOT_LOADED : 0; }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return nvmlInit_v2(); }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **card) { *card = (void *)1; return index ? 2 : nvml(); }
int nvmlDeviceGetHandleByUUID(const char *name, void **card) { *card = (void *)1; return strcmp(name, uuid) ? 6 : nvml(); }
int nvmlDeviceGetName(void *card, char *name, unsigned length) { (void)card; snprintf(name, length, "Stand-in"); return nvml(); }
int nvmlDeviceGetUUID(void *card, char *name, unsigned length) { (void)card; snprintf(name, length, "%s", uuid); return nvml(); }
int nvmlSystemGetDriverVersion(char *name, unsigned length) { snprintf(name, length, "580.0"); return 0; }
int nvmlDeviceGetCudaComputeCapability(void *card, int *major, int *minor) { (void)card; *major = 8; *minor = 9; return nvml(); }
int nvmlDeviceGetNumGpuCores(void *card, unsigned *cores) { (void)card; *cores = 9728; return nvml(); }
int nvmlDeviceGetMaxClockInfo(void *card, int clock, unsigned *mhz) { (void)card; (void)clock; *mhz = 2000; return nvml(); }
int nvmlDeviceGetMaxPcieLinkGeneration(void *card, unsigned *found) { (void)card; *found = 4; return nvml(); }
int nvmlDeviceGetMaxPcieLinkWidth(void *card, unsigned *found) { (void)card; *found = 8; return nvml(); }
int nvmlDeviceGetTemperature(void *card, int sensor, unsigned *celsius) { (void)card; (void)sensor; *celsius = 40; return nvml(); }

int nvmlDeviceGetComputeRunningProcesses_v3(void *card, unsigned *count, void *found)
{
    struct { unsigned pid; unsigned long long bytes; unsigned instances[2]; } *process = found;
    unsigned room = *count;
    (void)card;
    *count = is("full");
    if (room < *count)
        return NVML_INSUFFICIENT_SIZE;
    if (*count) {
        process->pid = 1;
        process->bytes = 15ULL << 30;
    }
    return nvml();
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *card, unsigned *count, void *found) { (void)card; (void)found; *count = 0; return nvml(); }
const char *nvmlErrorString(int status) { return status == NVML_GPU_IS_LOST ? "GPU is lost" : status == NVML_UNKNOWN ? "Unknown Error" : "Driver Not Loaded"; }

int nvmlDeviceGetMemoryInfo(void *card, unsigned long long bytes[3])
{
    (void)card;
    bytes[0] = 16ULL << 30; /* total, free, used */
    bytes[1] = is("full") ? 100ULL << 20 : 15ULL << 30;
    bytes[2] = 1ULL << 30;
    return nvml();
}

static unsigned written;
int cuInit(unsigned flags) { (void)flags; return cuda(); }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return cuda(); }
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = (void *)1; return cuda(); }
int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; return 0; }
int cuCtxSetCurrent(void *context) { (void)context; return cuda(); }
int cuMemAlloc_v2(unsigned long long *memory, size_t size) { (void)size; *memory = 4096; return cuda(); }
int cuMemFree_v2(unsigned long long memory) { (void)memory; return 0; }
int cuMemsetD32_v2(unsigned long long memory, unsigned value, size_t count) { (void)memory; (void)count; written = value; return cuda(); }
int cuMemcpyDtoH_v2(unsigned *to, unsigned long long from, size_t size) { (void)from; (void)size; to[0] = to[1] = written; return cuda(); }
