/* A libnvidia-ml.so.1 whose GPUs are described in a text file, which each nvmlInit reads again. The real pynvml loads it.

   The variable FAKE_NVML names the file; without it, no driver is loaded. One fact a line:

       driver TEXT                       cuda NUMBER
       gpu UUID NAME                     the lines after it describe this GPU
       instance UUID NAME                a MIG instance of the GPU above, described like one
       KEY NUMBER [NUMBER [NUMBER]]      see the functions below; a key that is absent is not supported
       process PID BYTES                 BYTES: `unknown` as on Windows and in some containers
       fail FUNCTION CODE                `*`: every function; before the first GPU: of the system

   An error code stands for itself (nvml.h): 3 not supported, 4 no permission, 6 not found, 9 driver not loaded,
   15 GPU is lost, 18 driver and library do not match. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, NO_DRIVER = 9, MOST = 16, LONGEST = 96 };

typedef unsigned long long number;

typedef struct { char name[LONGEST]; number of[3]; } Fact;

typedef struct Device {
    char uuid[LONGEST], name[LONGEST];
    struct Device *parent; /* of an instance */
    Fact facts[64], faults[64];
    struct { unsigned pid; number bytes; unsigned instance, compute; } processes[MOST];
    int fact_count, fault_count, process_count;
} Device;

static Device system_, devices[MOST];
static int device_count;
static char driver[LONGEST];

static int fault(const Device *device, const char *function) {
    for (int i = 0; i < device->fault_count; i++)
        if (!strcmp(device->faults[i].name, "*") || !strcmp(device->faults[i].name, function))
            return (int) device->faults[i].of[0];
    return SUCCESS;
}

static const Fact *fact(const Device *device, const char *key) {
    for (int i = 0; i < device->fact_count; i++)
        if (!strcmp(device->facts[i].name, key)) return &device->facts[i];
    return NULL;
}

static void add(Fact *facts, int *count, const char *line) {
    Fact *one = &facts[*count];
    if (*count < 64 && sscanf(line, "%95s %lli %lli %lli", one->name, (long long *) &one->of[0],
                              (long long *) &one->of[1], (long long *) &one->of[2]) >= 2)
        ++*count;
}

static int read_file(void) {
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512], size[LONGEST];
    unsigned pid;
    Device *now = &system_, *whole = NULL;
    if (!file) return NO_DRIVER;
    memset(&system_, 0, sizeof system_);
    memset(devices, 0, sizeof devices);
    device_count = 0;
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "driver %95s", driver) == 1) continue;
        if (!strncmp(line, "gpu ", 4) || !strncmp(line, "instance ", 9)) {
            now = &devices[device_count++];
            sscanf(line, "%*s %95s %95[^\n]", now->uuid, now->name);
            if (line[0] == 'g') whole = now; else now->parent = whole;
        } else if (sscanf(line, "process %u %95s", &pid, size) == 2) {
            now->processes[now->process_count].pid = pid;
            now->processes[now->process_count++].bytes = strcmp(size, "unknown") ? strtoull(size, NULL, 0) : ~0ULL;
        } else if (!strncmp(line, "fail ", 5)) {
            add(now->faults, &now->fault_count, line + 5);
        } else {
            add(now->facts, &now->fact_count, line);
        }
    }
    fclose(file);
    return fault(&system_, "nvmlInitWithFlags");
}

static int text(int failed, char *to, unsigned length, const char *from) {
    if (!failed) snprintf(to, length, "%s", from);
    return failed;
}

/* Look up a fact of a device: return the code of a fault, or NOT_SUPPORTED without the fact. */
#define LOOK_UP(device, key)                                                                                           \
    const Fact *found = fact(device, key);                                                                             \
    int failed = fault(device, __func__);                                                                              \
    if (failed || !found) return failed ? failed : NOT_SUPPORTED

#define ONE_NUMBER(function, type, key)                                                                                \
    int function(Device *device, type *to) {                                                                           \
        LOOK_UP(device, key);                                                                                          \
        *to = (type) found->of[0];                                                                                     \
        return SUCCESS;                                                                                                \
    }

/* The system */

int nvmlInitWithFlags(unsigned flags) { (void) flags; return read_file(); }
int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) {
    switch (code) {
    case NOT_SUPPORTED: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case NO_DRIVER: return "Driver Not Loaded";
    case 15: return "GPU is lost";
    case 18: return "Driver/library version mismatch";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *to, unsigned length) { return text(fault(&system_, __func__), to, length, driver); }

int nvmlSystemGetCudaDriverVersion(int *to) {
    LOOK_UP(&system_, "cuda");
    *to = (int) found->of[0];
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *to) {
    *to = 0;
    for (int i = 0; i < device_count; i++) *to += !devices[i].parent;
    return fault(&system_, __func__);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **to) {
    for (int i = 0; i < device_count; i++)
        if (!devices[i].parent && index-- == 0) {
            *to = &devices[i];
            return fault(*to, __func__);
        }
    return 2;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Device **to) {
    for (int i = 0; i < device_count; i++)
        if (!strcmp(devices[i].uuid, uuid)) {
            *to = &devices[i];
            return fault(*to, __func__);
        }
    return NOT_FOUND;
}

/* One device, or one MIG instance */

int nvmlDeviceGetName(Device *device, char *to, unsigned length) {
    return text(fault(device, __func__), to, length, device->name);
}

int nvmlDeviceGetUUID(Device *device, char *to, unsigned length) {
    return text(fault(device, __func__), to, length, device->uuid);
}

int nvmlDeviceGetMemoryInfo(Device *device, number *total_free_used) { /* memory TOTAL FREE USED */
    LOOK_UP(device, "memory");
    memcpy(total_free_used, found->of, sizeof found->of);
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(Device *device, int *major, int *minor) { /* capability MAJOR MINOR */
    LOOK_UP(device, "capability");
    *major = (int) found->of[0], *minor = (int) found->of[1];
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(Device *device, unsigned *gpu_memory) { /* utilization GPU MEMORY */
    LOOK_UP(device, "utilization");
    gpu_memory[0] = (unsigned) found->of[0], gpu_memory[1] = (unsigned) found->of[1];
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(Device *device, int kind, unsigned *to) { /* clocks SM MEMORY */
    LOOK_UP(device, "clocks");
    *to = (unsigned) found->of[kind == 2];
    return SUCCESS;
}

int nvmlDeviceGetTemperature(Device *device, int sensor, unsigned *to) {
    LOOK_UP(device, "temperature");
    (void) sensor;
    *to = (unsigned) found->of[0];
    return SUCCESS;
}

int nvmlDeviceGetTotalEccErrors(Device *device, int kind, int counter, number *to) { /* errors CORRECTED UNCORRECTED */
    LOOK_UP(device, "errors");
    (void) counter;
    *to = found->of[kind];
    return SUCCESS;
}

int nvmlDeviceGetAttributes_v2(Device *device, unsigned *to) { /* attributes MULTIPROCESSORS, of an instance only */
    LOOK_UP(device, "attributes");
    to[0] = (unsigned) found->of[0];
    return SUCCESS;
}

ONE_NUMBER(nvmlDeviceGetTotalEnergyConsumption, number, "energy")
ONE_NUMBER(nvmlDeviceGetPowerUsage, unsigned, "power")
ONE_NUMBER(nvmlDeviceGetPowerManagementLimit, unsigned, "limit")
ONE_NUMBER(nvmlDeviceGetCurrentClocksEventReasons, number, "reasons")

int nvmlDeviceGetViolationStatus(Device *device, int policy, number *reference_violation) {
    LOOK_UP(device, "violation");
    (void) policy;
    reference_violation[1] = found->of[0];
    return SUCCESS;
}

typedef struct {
    unsigned id, scope;
    long long timestamp, latency;
    int kind, code;
    union { double real; number whole; } value;
} FieldValue;

int nvmlDeviceGetFieldValues(Device *device, int count, FieldValue *values) { /* fieldNUMBER VALUE; kinds TYPE */
    int failed = fault(device, __func__);
    const Fact *kind = fact(device, "kinds");
    for (int i = 0; i < count; i++) {
        char key[LONGEST];
        snprintf(key, sizeof key, "field%u", values[i].id);
        const Fact *found = fact(device, key);
        values[i].code = found ? SUCCESS : NOT_SUPPORTED;
        values[i].kind = kind ? (int) kind->of[0] : 3; /* unsigned long long */
        values[i].value.whole = found ? found->of[0] : 0;
    }
    return failed;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, void *to) {
    unsigned room = *count;
    int failed = fault(device, __func__);
    *count = (unsigned) device->process_count;
    if (failed || !*count) return failed;
    if (!to || room < *count) return TOO_SMALL;
    memcpy(to, device->processes, *count * sizeof device->processes[0]);
    return SUCCESS;
}

/* MIG */

int nvmlDeviceGetMigMode(Device *device, unsigned *now, unsigned *later) {
    LOOK_UP(device, "mig");
    *now = *later = (unsigned) found->of[0];
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *to) {
    *to = 7;
    return fault(device, __func__);
}

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned index, Device **to) {
    int failed = fault(device, __func__);
    for (int i = 0; i < device_count && !failed; i++)
        if (devices[i].parent == device && index-- == 0) {
            *to = &devices[i];
            return SUCCESS;
        }
    return failed ? failed : NOT_FOUND;
}

int nvmlDeviceIsMigDeviceHandle(Device *device, unsigned *to) {
    *to = device->parent != NULL;
    return fault(device, __func__);
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Device *device, Device **to) {
    *to = device->parent;
    return device->parent ? fault(device, __func__) : 2;
}
