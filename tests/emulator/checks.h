// The frame of a program of checks: `PROGRAM NAME` runs one and prints what went wrong, `PROGRAM` lists
// them.
#pragma once

#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>

inline void demand(bool holds, const std::string& what) {
  if (!holds) throw std::logic_error(what);
}

inline int run_checks(const std::map<std::string, void (*)()>& checks, int argc, char** argv) {
  if (argc != 2 || checks.count(argv[1]) == 0) {
    for (const auto& check : checks) std::puts(check.first.c_str());
    return argc != 1;
  }
  try {
    checks.at(argv[1])();
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  return 0;
}
