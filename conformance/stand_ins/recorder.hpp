// What the stand-in libopapi.so notes of each aclnn call; recorder.cpp explains.
#pragma once

#include <cstdint>
#include <string>

extern "C" {
struct aclOpExecutor;
}

namespace recorder {

// One aclnn call: its arguments are written in order, as `name=value`, and absent ones left out.
class Call {
 public:
  explicit Call(const char *name) : text_(std::string(name) + "(") {}
  void tensor(const char *name, const void *handle);
  void integer(const char *name, int64_t value);
  void boolean(const char *name, bool value);
  void real(const char *name, double value);
  void text(const char *name, const char *value);
  int end(uint64_t *workspace_size, aclOpExecutor **executor);

 private:
  void add(const char *name, const std::string &value);
  std::string text_;
  bool first_ = true;
};

// A call of an aclnn function whose prototype nobody has written down: its name alone.
int unknown(const char *name);

}  // namespace recorder
