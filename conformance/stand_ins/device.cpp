// A pretend Ascend device for torch_npu's host code: memory is malloc's, every stream and event is
// finished at once, nothing computes. The prototypes come from the headers in torch_npu's own wheel,
// so that a signature which has changed is a compile error. What is not defined here and is only
// linked, never needed, returns 0 (see build.py).
#include "acl/acl.h"
#include "acl/acl_op_compiler.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr size_t kAlignment = 512;  // what CANN's allocator gives
constexpr size_t kMemoryBytes = size_t{8} << 30;
constexpr int kCubeCores = 24;  // Ascend 910B1

char context_storage;
int32_t current_device = 0;
uintptr_t last_handle = 0x1000;

aclError allocate(void **pointer, size_t size) {
  return posix_memalign(pointer, kAlignment, size == 0 ? kAlignment : size) == 0 ? 0 : 1;
}

void *new_handle() { return reinterpret_cast<void *>(last_handle += 16); }

aclError copy(void *to, const void *from, size_t count) {
  memcpy(to, from, count);
  return 0;
}

}  // namespace

extern "C" {

const char *aclrtGetSocName() { return "Ascend910B1"; }
const char *aclGetRecentErrMsg() { return ""; }

// Devices and contexts.
aclError aclrtGetDeviceCount(uint32_t *count) { return *count = 1, 0; }
aclError aclrtSetDevice(int32_t device) { return current_device = device, 0; }
aclError aclrtGetDevice(int32_t *device) { return *device = current_device, 0; }
aclError aclrtGetCurrentContext(aclrtContext *context) { return *context = &context_storage, 0; }
aclError aclrtGetPrimaryCtxState(int32_t, uint32_t *flags, int32_t *active) {
  if (flags != nullptr) *flags = 0;
  if (active != nullptr) *active = 1;
  return 0;
}
aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t, int32_t) { return *can = 0, 0; }
aclError aclrtDeviceGetBareTgid(int32_t *pid) { return *pid = 1, 0; }
aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo, int64_t *value) { return *value = 0, 0; }
aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr, int64_t *value) {
  return *value = kCubeCores, 0;
}
aclError aclrtGetDeviceResLimit(int32_t, aclrtDevResLimitType, uint32_t *value) {
  return *value = kCubeCores, 0;
}
aclError aclrtGetStreamResLimit(aclrtStream, aclrtDevResLimitType, uint32_t *value) {
  return *value = kCubeCores, 0;
}
aclError aclrtGetResInCurrentThread(aclrtDevResLimitType, uint32_t *value) {
  return *value = kCubeCores, 0;
}

// Memory.
aclError aclrtGetMemInfo(aclrtMemAttr, size_t *free_bytes, size_t *total) {
  return *free_bytes = *total = kMemoryBytes, 0;
}
aclError aclrtMalloc(void **to, size_t size, aclrtMemMallocPolicy) { return allocate(to, size); }
aclError aclrtMallocAlign32(void **to, size_t size, aclrtMemMallocPolicy) {
  return allocate(to, size);
}
aclError aclrtMallocHost(void **to, size_t size) { return allocate(to, size); }
aclError aclrtMallocHostWithCfg(void **to, uint64_t size, aclrtMallocConfig *) {
  return allocate(to, size);
}
aclError aclrtFree(void *pointer) { return free(pointer), 0; }
aclError aclrtFreeHost(void *pointer) { return free(pointer), 0; }
aclError aclrtMemcpy(void *to, size_t, const void *from, size_t count, aclrtMemcpyKind) {
  return copy(to, from, count);
}
aclError aclrtMemcpyAsync(void *to, size_t, const void *from, size_t count, aclrtMemcpyKind,
                          aclrtStream) {
  return copy(to, from, count);
}
aclError aclrtMemcpyAsyncWithCondition(void *to, size_t, const void *from, size_t count,
                                       aclrtMemcpyKind, aclrtStream) {
  return copy(to, from, count);
}
aclError aclrtMemset(void *to, size_t, int32_t value, size_t count) {
  return memset(to, value, count), 0;
}
aclError aclrtMemsetAsync(void *to, size_t, int32_t value, size_t count, aclrtStream) {
  return memset(to, value, count), 0;
}

// Streams and events: each is a new number, and done.
aclError aclrtCreateStream(aclrtStream *stream) { return *stream = new_handle(), 0; }
aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t, uint32_t) {
  return *stream = new_handle(), 0;
}
aclError aclrtCreateEvent(aclrtEvent *event) { return *event = new_handle(), 0; }
aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t) { return *event = new_handle(), 0; }
aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t) {
  return *event = new_handle(), 0;
}
aclError aclrtStreamQuery(aclrtStream, aclrtStreamStatus *status) {
  return *status = ACL_STREAM_STATUS_COMPLETE, 0;
}
aclError aclrtQueryEventStatus(aclrtEvent, aclrtEventRecordedStatus *status) {
  return *status = ACL_EVENT_RECORDED_STATUS_COMPLETE, 0;
}
aclError aclrtQueryEventWaitStatus(aclrtEvent, aclrtEventWaitStatus *status) {
  return *status = ACL_EVENT_WAIT_STATUS_COMPLETE, 0;
}
aclError aclrtEventElapsedTime(float *ms, aclrtEvent, aclrtEvent) { return *ms = 0, 0; }
aclError aclrtStreamGetId(aclrtStream, int32_t *id) { return *id = 1, 0; }
aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t *on) { return *on = 0, 0; }

// torch_npu looks these up by name while it runs.
#define SUCCEEDS(name, ...) \
  aclError name(__VA_ARGS__) { return 0; }
SUCCEEDS(aclrtDestroyStream, aclrtStream)
SUCCEEDS(aclrtDestroyStreamForce, aclrtStream)
SUCCEEDS(aclrtDestroyEvent, aclrtEvent)
SUCCEEDS(aclrtRecordEvent, aclrtEvent, aclrtStream)
SUCCEEDS(aclrtResetEvent, aclrtEvent, aclrtStream)
SUCCEEDS(aclrtStreamWaitEvent, aclrtStream, aclrtEvent)
SUCCEEDS(aclrtSynchronizeStream, aclrtStream)
SUCCEEDS(aclrtSynchronizeStreamWithTimeout, aclrtStream, int32_t)
SUCCEEDS(aclrtSynchronizeEvent, aclrtEvent)
SUCCEEDS(aclrtSynchronizeDevice)
SUCCEEDS(aclrtSynchronizeDeviceWithTimeout, int32_t)
SUCCEEDS(aclrtSetOpWaitTimeout, uint32_t)
SUCCEEDS(aclrtSetOpExecuteTimeOut, uint32_t)
SUCCEEDS(aclrtSetStreamFailureMode, aclrtStream, uint64_t)
SUCCEEDS(aclrtSetStreamOverflowSwitch, aclrtStream, uint32_t)
SUCCEEDS(aclrtSetDeviceSatMode, aclrtFloatOverflowMode)
SUCCEEDS(aclrtUseStreamResInCurrentThread, aclrtStream)
SUCCEEDS(aclrtUnuseStreamResInCurrentThread, aclrtStream)
SUCCEEDS(aclrtCtxSetSysParamOpt, aclSysParamOpt, int64_t)
SUCCEEDS(aclrtSetSysParamOpt, aclSysParamOpt, int64_t)
SUCCEEDS(aclSetCompileopt, aclCompileOpt, const char *)

aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t *value) { return *value = 0, 0; }

// "disable" is jit_compile=False: ops go to aclnn entries, not to an operator compiler.
size_t aclGetCompileoptSize(aclCompileOpt) { return 64; }
aclError aclGetCompileopt(aclCompileOpt, char *value, size_t size) {
  if (size > 0) {
    memset(value, 0, size);
    strncpy(value, "disable", size - 1);
  }
  return 0;
}

}  // extern "C"
