// What the emulated entry points share: errors as text, memory that notices what it should not hold, the
// stream's counter.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"

// Null, or the text of the error.
template <class F>
inline const char* answer(const F& run) {
  static std::string text;
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

class Workspace {  // of bytes that are NaN, with bytes behind it that must stay
 public:
  explicit Workspace(int64_t bytes) : bytes_(bytes), memory_(size_t(bytes) + 512, char(0xff)) {
    base = memory_.data() + (256 - uintptr_t(memory_.data()) % 256);
  }
  void check() const {
    for (char* at = base + bytes_; at < memory_.data() + memory_.size(); ++at)
      if (*at != char(0xff)) throw std::runtime_error("written past the end of the workspace");
  }
  char* base;

 private:
  int64_t bytes_;
  std::vector<char> memory_;
};

// Whether the stream is being captured: a graph takes no counter of the stream.
inline bool emulator_captures = false;

class Ticket {  // a stream's counter: at 0 before and after
 public:
  unsigned* given() { return emulator_captures ? nullptr : &value_; }
  void check() const {
    if (value_ != 0) throw std::runtime_error("the stream's counter was not left at 0");
  }

 private:
  unsigned value_ = 0;
};
