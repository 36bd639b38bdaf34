// The stand-in libopapi.so. torch_npu builds descriptions of tensors through aclCreate*, then calls
// aclnn<Op>GetWorkspaceSize with them. Here a description is its own text, and such a call appends a
// line to a log that Python reads with take_record. Nothing computes: results hold what malloc gave.
#include "recorder.hpp"

#include <cstdio>
#include <map>
#include <mutex>

#include "acl/acl.h"

namespace {

std::mutex lock;
std::map<const void *, std::string> descriptions;
std::string record;
std::string taken;

const char *dtype_name(int dtype) {
  switch (dtype) {
    case ACL_FLOAT: return "float32";
    case ACL_FLOAT16: return "float16";
    case ACL_BF16: return "bfloat16";
    case ACL_INT8: return "int8";
    case ACL_UINT8: return "uint8";
    case ACL_INT4: return "int4";
    case ACL_INT16: return "int16";
    case ACL_INT32: return "int32";
    case ACL_INT64: return "int64";
    case ACL_UINT64: return "uint64";
    case ACL_BOOL: return "bool";
    default: return nullptr;
  }
}

std::string format_name(int format) {
  switch (format) {
    case ACL_FORMAT_ND: return "ND";
    case ACL_FORMAT_NCHW: return "NCHW";  // what a plain tensor of 4 dimensions is called
    case ACL_FORMAT_NCL: return "NCL";    // and one of 3
    case ACL_FORMAT_FRACTAL_NZ: return "NZ";
    default: return "format" + std::to_string(format);
  }
}

std::string list(const int64_t *values, uint64_t count) {
  std::string text = "[";
  for (uint64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

bool contiguous(const int64_t *sizes, const int64_t *strides, uint64_t count) {
  int64_t expected = 1;
  for (uint64_t i = count; i-- > 0;) {
    if (sizes[i] != 1 && strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

void *describe(const std::string &text) {
  std::lock_guard<std::mutex> guard(lock);
  void *handle = new char;
  descriptions[handle] = text;
  return handle;
}

std::string description(const void *handle) {
  std::lock_guard<std::mutex> guard(lock);
  auto found = descriptions.find(handle);
  // A wrong prototype shows here: what should be a tensor is none.
  return found == descriptions.end() ? "NOT-A-TENSOR" : found->second;
}

int destroy(const void *handle) {
  std::lock_guard<std::mutex> guard(lock);
  if (descriptions.erase(handle) != 0) delete static_cast<const char *>(handle);
  return 0;
}

int append(const std::string &line) {
  std::lock_guard<std::mutex> guard(lock);
  record += line + "\n";
  return 0;
}

}  // namespace

namespace recorder {

void Call::add(const char *name, const std::string &value) {
  text_ += (first_ ? "" : ", ") + std::string(name) + "=" + value;
  first_ = false;
}

void Call::tensor(const char *name, const void *handle) {
  if (handle != nullptr) add(name, description(handle));
}

void Call::integer(const char *name, int64_t value) { add(name, std::to_string(value)); }

void Call::boolean(const char *name, bool value) { add(name, value ? "true" : "false"); }

void Call::real(const char *name, double value) {
  char digits[32];
  snprintf(digits, sizeof digits, "%.9g", value);
  add(name, digits);
}

void Call::text(const char *name, const char *value) {
  add(name, value == nullptr ? "null" : "'" + std::string(value) + "'");
}

int Call::end(uint64_t *workspace_size, aclOpExecutor **executor) {
  *workspace_size = 0;
  *executor = nullptr;
  return append(text_ + ")");
}

int unknown(const char *name) { return append(std::string(name) + "(arguments not recorded)"); }

}  // namespace recorder

extern "C" {

// All lines since the last call, for Python; valid until the next call.
const char *take_record() {
  std::lock_guard<std::mutex> guard(lock);
  taken.swap(record);
  record.clear();
  return taken.c_str();
}

void *aclCreateTensor(const int64_t *sizes, uint64_t count, int dtype, const int64_t *strides,
                      int64_t offset, int format, const int64_t *storage, uint64_t storage_count,
                      void *) {
  const char *name = dtype_name(dtype);
  std::string text = (name ? name : "dtype" + std::to_string(dtype)) + list(sizes, count) + ":" +
                     format_name(format);
  if (!contiguous(sizes, strides, count)) text += ":strides" + list(strides, count);
  if (offset != 0) text += ":offset" + std::to_string(offset);
  if (format == ACL_FORMAT_FRACTAL_NZ) text += ":storage" + list(storage, storage_count);
  return describe(text);
}
void *aclCreateScalar(void *, int dtype) {
  const char *name = dtype_name(dtype);
  return describe(std::string("scalar:") + (name ? name : std::to_string(dtype)));
}
void *aclCreateIntArray(const int64_t *values, uint64_t count) {
  return describe(list(values, count));
}
void *aclCreateFloatArray(const float *, uint64_t count) {
  return describe("floats[" + std::to_string(count) + "]");
}
void *aclCreateBoolArray(const bool *values, uint64_t count) {
  std::string text = "[";
  for (uint64_t i = 0; i < count; ++i) text += std::string(i ? ", " : "") + (values[i] ? "true" : "false");
  return describe(text + "]");
}
void *aclCreateTensorList(void *const *tensors, uint64_t count) {
  std::string text = "{";
  for (uint64_t i = 0; i < count; ++i) text += (i ? "; " : "") + description(tensors[i]);
  return describe(text + "}");
}
void *aclCreateScalarList(void *const *, uint64_t count) {
  return describe("scalars[" + std::to_string(count) + "]");
}
int aclDestroyTensor(const void *handle) { return destroy(handle); }
int aclDestroyScalar(const void *handle) { return destroy(handle); }
int aclDestroyIntArray(const void *handle) { return destroy(handle); }
int aclDestroyFloatArray(const void *handle) { return destroy(handle); }
int aclDestroyBoolArray(const void *handle) { return destroy(handle); }
int aclDestroyTensorList(const void *handle) { return destroy(handle); }
int aclDestroyScalarList(const void *handle) { return destroy(handle); }
int aclDestroyAclOpExecutor(void *) { return 0; }

}  // extern "C"
